"""Quantised weights: codes in the tree, and the weight itself only while something reads it.

    x @ w   ->   x @ dequantize(codes)      once in the forward pass, again in the backward pass

A `QuantizedWeight` stands in a parameter tree where the weight stood, with the weight's shape and
dtype. Only an adapted function understands it. Its scheme is a subclass: one file of
`lora_jax.ops.quantized` each.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from ._config import Layout
from ._held import HeldWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedWeight(HeldWeight):
    """Base of the schemes.

    Attributes:
        codes: ``(*stack, ...)``: what the scheme keeps of each entry.
        sizes: Sizes of the axes that are not stacked, in the weight's own order, static.
        axes: How many axes the codes of one matrix have, a constant of the scheme.
    """

    axes: ClassVar[int] = 2

    codes: jax.Array
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def matrices(self, dtype: Any = jnp.float32) -> jax.Array:
        """The values, ``(*stack, out, in)``: out and in axes each flattened to one.

        Args:
            dtype: What they, computed in float32, are rounded to.
        """
        raise NotImplementedError

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the stacked axes."""
        return self.codes.shape[: self.layout.count("stack")]

    @property
    def shape(self) -> tuple[int, ...]:
        stack, rest = iter(self.stack), iter(self.sizes)
        return tuple(next(stack if kind == "stack" else rest) for kind in self.layout)

    @property
    def nbytes(self) -> int:
        """Bytes held, of all arrays of the scheme."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def fits(self) -> bool:
        return self.codes.ndim == self.layout.count("stack") + self.axes

    def whole(self) -> jax.Array:
        return self.dequantize()

    def dequantize(self) -> jax.Array:
        """The weight, of its own shape and dtype: computed in float32 and rounded once."""
        order = matrix_order(self.layout)
        values = self.matrices(self.dtype).reshape([self.shape[axis] for axis in order])
        return jnp.transpose(values, [order.index(axis) for axis in range(self.ndim)])

    def astype(self, dtype: Any) -> Self:
        """The same codes, giving back another dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def transposed(self, order: Sequence[int]) -> Self | None:
        """The same codes, unless axes of one kind change places among themselves."""
        for kind in ("stack", "in", "out"):
            places = [axis for axis in order if self.layout[axis] == kind]
            if places != sorted(places):
                return None
        sizes = iter(self.sizes)
        extents = [None if kind == "stack" else next(sizes) for kind in self.layout]
        turned = tuple(extents[axis] for axis in order if extents[axis] is not None)
        layout = tuple(self.layout[axis] for axis in order)
        return dataclasses.replace(self, layout=layout, sizes=turned)


def matrix_order(layout: Layout) -> list[int]:
    """The weight's axes as a scheme sees them: stacked ones, then out, then in.

    The in axes come last, so that a block runs along them, as it does in the transposed weights
    of PyTorch.

    >>> matrix_order(("stack", "in", "out", "out"))
    [0, 2, 3, 1]
    """
    return [
        axis
        for kind in ("stack", "out", "in")
        for axis, label in enumerate(layout)
        if label == kind
    ]


def matrices_of(weight: jax.Array, layout: Layout) -> jax.Array:
    """A plain weight as ``(*stack, out, in)``, float32: what `QuantizedWeight.matrices` undoes.

    Args:
        weight: Of any float dtype.
        layout: What each axis does.
    """
    order = matrix_order(layout)
    n_stack, n_out = layout.count("stack"), layout.count("out")
    turned = jnp.transpose(weight, order)
    stack, rest = turned.shape[:n_stack], turned.shape[n_stack:]
    matrix = (math.prod(rest[:n_out]), math.prod(rest[n_out:]))
    return turned.reshape((*stack, *matrix)).astype(jnp.float32)


def is_quantized(leaf: Any) -> bool:
    """Whether ``leaf`` is a quantised weight."""
    return isinstance(leaf, QuantizedWeight)
