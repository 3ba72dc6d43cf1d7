"""The adapted weight, as a node in a parameter tree.

    w + scale * a @ b        w: (in, out)   a: (in, rank)   b: (rank, out)   scale = alpha / rank

``b`` starts at zero, so that an adapted model starts as the model. A weight of more axes keeps
them: stacked axes come first in both factors, then ``a`` has the in axes and ``b`` the out axes,
each in the weight's own order.

    w: (layers, in, heads, dim)   a: (layers, in, rank)   b: (layers, rank, heads, dim)
"""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from ._config import Layout
from ._targets import Target


@dataclasses.dataclass(frozen=True)
class Factors:
    """What trains of one adapted weight, of whichever kind: its only leaves are ``a`` and ``b``.

    Attributes:
        a: The factor on the input's side, rank last, float32 (float64 under a float64 weight).
        b: The factor on the output's side, of the same dtype, zero at the start.
        scale: ``alpha / rank``, static.
        layout: What each axis of the weight does, static.
        dropout: Probability of dropping an entry of the input of ``a``, static.
    """

    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})
    layout: Layout = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def rank(self) -> int:
        """Inner dimension: the last axis of ``a``."""
        return self.a.shape[-1]

    def whole(self) -> "LoraFactors":
        """The same update as factors of the whole weight, differentiable in ``a`` and ``b``."""
        raise NotImplementedError

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether these are factors of a weight of this shape."""
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraFactors(Factors):
    """Factors of a whole weight: ``a (*stack, *in, rank)`` and ``b (*stack, rank, *out)``."""

    def whole(self) -> "LoraFactors":
        """Itself."""
        return self

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether these are factors of a weight of this shape."""
        if len(shape) != len(self.layout):
            return False
        return (self.a.shape, self.b.shape) == factor_shapes(shape, self.layout, self.rank)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeight:
    """One adapted weight in a parameter tree, for functions that `adapt` has lifted.

    Attributes:
        w: The frozen weight.
        factors: Its `Factors`.
        dropout_keys: None, or a PRNG key for each stacked weight, ``(*stack)``: dropout is on.
        path: Where the weight stands in its tree, static.
    """

    w: Any
    factors: Factors
    dropout_keys: jax.Array | None = None
    path: str = dataclasses.field(default="", metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainedWeight:
    """A weight that trains in full, marked so that `mask` knows it in a combined tree."""

    w: Any


def is_node(leaf: Any) -> bool:
    """Whether ``leaf`` is a weight that only an adapted function understands."""
    return isinstance(leaf, LoraWeight | TrainedWeight)


def init_factors(
    path: str, weight: Any, target: Target, dropout: float, key: jax.Array
) -> LoraFactors:
    """Draws the factors of one weight: ``a`` uniform in ``±1 / sqrt(in)``, ``b`` zero.

    The distribution is that of the reference implementation (Kaiming uniform with slope
    ``sqrt(5)``). The key is folded from the path, so a weight's ``a`` depends neither on the
    tree's order nor on which other weights are adapted.

    Args:
        path: The weight's path.
        weight: The weight, or anything with its ``shape`` and ``dtype``.
        target: Its layout, rank and scale.
        dropout: Probability of dropping an entry of the input of ``a``.
        key: The key of the whole tree.
    """
    layout = target.layout
    a_shape, b_shape = factor_shapes(weight.shape, layout, target.rank)
    a = draw_a(path_key(key, path), a_shape, weight, layout)
    return LoraFactors(a, jnp.zeros(b_shape, a.dtype), target.scale, layout, dropout)


def draw_a(key: jax.Array, shape: tuple[int, ...], weight: Any, layout: Layout) -> jax.Array:
    """Draws ``a`` of one shape for a weight: uniform in ``±1 / sqrt(in)``."""
    fan_in = math.prod(n for n, kind in zip(weight.shape, layout, strict=True) if kind == "in")
    dtype = jnp.float64 if weight.dtype == jnp.float64 else jnp.float32
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def factor_shapes(
    shape: tuple[int, ...], layout: Layout, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``a`` and ``b``: ``(*stack, *in, rank)`` and ``(*stack, rank, *out)``.

    >>> factor_shapes((12, 64, 4, 16), ("stack", "in", "out", "out"), rank=8)
    ((12, 64, 8), (12, 8, 4, 16))
    """
    stack, ins, outs = (
        tuple(n for n, kind in zip(shape, layout, strict=True) if kind == wanted)
        for wanted in ("stack", "in", "out")
    )
    return (*stack, *ins, rank), (*stack, rank, *outs)


def path_key(key: Any, path: str) -> jax.Array:
    """The key of one weight: ``key`` folded with a checksum of the weight's path."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def delta(factors: LoraFactors) -> jax.Array:
    """The update ``scale * a @ b`` in the weight's own shape and the factors' dtype."""
    axes = range(len(factors.layout))
    rank = len(factors.layout)
    stack, ins, outs = (
        [axis for axis in axes if factors.layout[axis] == kind] for kind in ("stack", "in", "out")
    )
    a = jnp.asarray(factors.a)
    return factors.scale * jnp.einsum(
        a,
        [*stack, *ins, rank],
        factors.b,
        [*stack, rank, *outs],
        list(axes),
        precision=jax.lax.Precision.HIGHEST,
    )
