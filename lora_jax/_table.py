"""A table whose features are cut over devices: rows are looked up in the parts, and then sent.

    table[ids]   ==   all_to_all(part[all_gather(ids)])

A batch has fewer rows than a table, which would be sent otherwise. What reads the table as a whole,
as a head that is tied to it does, has it gathered, once; if nothing does, a compiler drops that.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ._config import Layout
from ._held import HeldWeight


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TableWeight(HeldWeight):
    """A table, ``(rows, features)``, of which each device has some features.

    Attributes:
        part: The array, cut: ``(rows, features / devices)`` on each device.
        gathered: The same array, ``(rows, features)`` on each, once something reads it.
        place: Where the part is, static. A batch is cut over all devices of that mesh.
        passes: How often a step looks up rows, static. The whole table would be sent once.
    """

    waits: ClassVar[bool] = False
    stays: ClassVar[bool] = True

    part: jax.Array
    gathered: jax.Array
    place: NamedSharding = dataclasses.field(metadata={"static": True})
    passes: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.gathered.shape)

    @property
    def is_computed(self) -> bool:
        return False

    def whole(self) -> jax.Array:
        return self.gathered.astype(self.dtype)

    def rows(
        self, take: Callable[[jax.Array, jax.Array], jax.Array], ids: jax.Array
    ) -> jax.Array | None:
        axis, mesh = self.place.spec[1], self.place.mesh
        rows_of_one = math.prod(ids.shape[:-1]) // mesh.size
        if ids.ndim < 3 or ids.shape[0] % mesh.size or self.passes * rows_of_one >= self.shape[0]:
            return None
        if _is_inside_another(self.place):
            return None

        def own(part: jax.Array, ids: jax.Array) -> jax.Array:
            found = take(part, lax.all_gather(ids, axis, axis=0, tiled=True)).astype(self.dtype)
            return lax.all_to_all(found, axis, split_axis=0, concat_axis=ids.ndim - 1, tiled=True)

        by_rows = PartitionSpec(_used(self.place))
        looked_up = jax.shard_map(
            own,
            mesh=mesh,
            in_specs=(self.place.spec, by_rows),
            out_specs=by_rows,
            check_vma=False,
        )
        return looked_up(self.part, ids)

    def astype(self, dtype: Any) -> Self:
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def transposed(self, order: Sequence[int]) -> Self | None:
        return None

    def fits(self) -> bool:
        return self.gathered.ndim == len(self.layout)


def _used(place: NamedSharding) -> tuple[str, ...]:
    """The axes of a mesh that have more than one device."""
    return tuple(name for name, size in place.mesh.shape.items() if size > 1)


def _is_inside_another(place: NamedSharding) -> bool:
    """Whether another mesh is set around, where a `shard_map` over this one cannot be."""
    around = jax.sharding.get_abstract_mesh()
    return not around.empty and around != place.mesh.abstract_mesh


def look_up_parts(
    part: jax.Array,
    gathered: jax.Array,
    place: NamedSharding,
    axis: str,
    layout: Layout,
    passes: int = 1,
) -> Any:
    """A table whose rows are looked up in its parts; the gathered one if it is not cut so.

    Args:
        part: The table, ``(rows, features)`` of any dtype, inside a jitted function over the mesh.
        gathered: The same, gathered over an axis of the mesh.
        place: Where the part is.
        axis: That axis. A batch is cut over it, and over ``data``.
        layout: What each axis of the table does.
        passes: How often a step looks up rows.
    """
    is_cut = part.ndim == 2 and tuple(place.spec) == (None, axis)
    if not is_cut or not {*_used(place)} <= {"data", axis}:
        return gathered
    return TableWeight(
        part=part,
        gathered=gathered,
        place=place,
        passes=passes,
        layout=layout,
        dtype=part.dtype,
    )
