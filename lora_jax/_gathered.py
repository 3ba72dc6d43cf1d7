"""A weight that is cut over devices, and gathered where it is read.

    x @ w   ->   x @ all_gather(w)      once in the forward pass, again in the backward pass

Fully sharded data parallelism (arXiv 1910.02054, stage 3; arXiv 2304.11277): no device holds more
than its part between two uses. Left to itself, GSPMD may gather the activations instead.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ._config import Layout
from ._held import HeldWeight, is_held

Spec = tuple[Any, ...]
"""For each axis of an array, what of the mesh it stays cut over."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GatheredWeight(HeldWeight):
    """An array, or the arrays of codes, of which each device has a part.

    Attributes:
        held: The array or the codes.
        specs: For each array, how it is cut once it is gathered, static.
        mesh: The devices, static.
    """

    waits: ClassVar[bool] = False  # the next weights are gathered while something else computes

    held: Any
    specs: tuple[Spec, ...] = dataclasses.field(metadata={"static": True})
    mesh: Mesh = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.held.shape)

    @property
    def is_computed(self) -> bool:
        return is_held(self.held)

    def whole(self) -> jax.Array:
        gathered = self._gathered()
        return gathered.whole() if is_held(gathered) else gathered.astype(self.dtype)

    def arrived(self) -> HeldWeight:
        return self._gathered() if is_held(self.held) else self

    def _gathered(self) -> Any:
        """The array or the codes, brought together."""
        arrays, treedef = jax.tree.flatten(self.held)
        return treedef.unflatten(
            lax.with_sharding_constraint(array, NamedSharding(self.mesh, PartitionSpec(*spec)))
            for array, spec in zip(arrays, self.specs, strict=True)
        )

    def again(self) -> Self:
        return dataclasses.replace(self, held=lax.optimization_barrier(self.held))

    def astype(self, dtype: Any) -> Self:
        held = self.held.astype(dtype) if is_held(self.held) else self.held
        return dataclasses.replace(self, held=held, dtype=jnp.dtype(dtype))

    def transposed(self, order: Sequence[int]) -> Self | None:
        layout: Layout = tuple(self.layout[axis] for axis in order)
        if is_held(self.held):
            held = self.held.transposed(order)
            return None if held is None else dataclasses.replace(self, held=held, layout=layout)
        spec = tuple(self.specs[0][axis] for axis in order)
        held = lax.transpose(self.held, order)
        return dataclasses.replace(self, held=held, specs=(spec,), layout=layout)

    def unstacked(self) -> Self:
        held = self.held.unstacked() if is_held(self.held) else self.held
        specs = tuple(spec[1:] for spec in self.specs)
        return dataclasses.replace(self, held=held, specs=specs, layout=self.layout[1:])

    def fits(self) -> bool:
        return self.held.fits() if is_held(self.held) else self.held.ndim == len(self.layout)


def gather_later(leaf: Any, places: Any, axis: str, layout: Layout) -> Any:
    """What is gathered over one axis of the mesh; the leaf itself if that does not cut it.

    Args:
        leaf: An array or codes, inside a jitted function over the mesh.
        places: The ``NamedSharding`` of each of its arrays.
        axis: The mesh's axis to gather over.
        layout: What each axis of the weight does.
    """
    arrays, shardings = jax.tree.leaves(leaf), jax.tree.leaves(places)
    specs = [
        (*one.spec, *[None] * (a.ndim - len(one.spec)))
        for a, one in zip(arrays, shardings, strict=True)
    ]
    kept = tuple(without(spec, axis) for spec in specs)
    if kept == tuple(specs):
        return leaf
    mesh = shardings[0].mesh
    return GatheredWeight(held=leaf, specs=kept, mesh=mesh, layout=layout, dtype=leaf.dtype)


def without(spec: Spec, axis: str) -> Spec:
    """How an array is cut once it is gathered over an axis of the mesh.

    >>> without((None, "fsdp", ("tensor", "fsdp")), "fsdp")
    (None, None, 'tensor')
    """
    return tuple(_other(names, axis) for names in spec)


def _other(names: Any, axis: str) -> Any:
    """What an axis of an array is cut over beside one axis of the mesh."""
    kept = [name for name in (names if isinstance(names, tuple) else (names,)) if name != axis]
    return tuple(kept) if len(kept) > 1 else (kept or [None])[0]
