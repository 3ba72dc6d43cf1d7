"""Many small arrays, cut over one axis of a mesh, gathered in one bucket.

    w_1, w_2, ...   ==   split(all_gather(concat(part_1, part_2, ...)))

A gather of a few kilobytes takes as long as one of a megabyte, and a layer has a dozen factors to
wait for. Buckets as of PyTorch's DDP (arXiv 2006.15704, section 3.2.3), here for what is read.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._gathered import without


def gathered_in_buckets(tree: Any, places: Any, axis: str) -> Any:
    """A tree whose arrays an axis of the mesh cuts no more; one bucket for each dtype.

    An array that another axis of the mesh cuts as well is gathered alone, as is one of a weak
    type, which it would lose beside others.

    Args:
        tree: Arrays, inside a jitted function over the mesh.
        places: The ``NamedSharding`` of each: where it is.
        axis: The mesh's axis to gather over.
    """
    leaves, treedef = jax.tree.flatten(tree)
    buckets: dict[tuple[Any, Mesh], list[int]] = {}
    cuts: dict[int, int] = {}
    for i, place in enumerate(jax.tree.leaves(places)):
        spec = tuple(place.spec)
        kept = without(spec, axis)
        if axis in spec and not any(kept) and not leaves[i].weak_type:
            cuts[i] = spec.index(axis)
            buckets.setdefault((leaves[i].dtype, place.mesh), []).append(i)
        elif kept != spec:
            leaves[i] = _placed(leaves[i], place.mesh, *kept)
    for (_, mesh), members in buckets.items():
        parts = [jnp.moveaxis(leaves[i], cuts[i], 0) for i in members]
        for i, whole in zip(members, _gathered(parts, mesh, axis), strict=True):
            leaves[i] = jnp.moveaxis(whole, 0, cuts[i])
    return treedef.unflatten(leaves)


def _gathered(parts: Sequence[jax.Array], mesh: Mesh, axis: str) -> list[jax.Array]:
    """Arrays of one dtype that are cut along their first axes, whole."""
    rows = [part.reshape(mesh.shape[axis], -1) for part in parts]
    ends = list(itertools.accumulate(row.shape[1] for row in rows))
    bucket = _placed(_placed(jnp.concatenate(rows, axis=1), mesh, axis), mesh)
    pieces = jnp.split(bucket, ends[:-1], axis=1)
    return [piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def _placed(array: jax.Array, mesh: Mesh, *spec: Any) -> jax.Array:
    return lax.with_sharding_constraint(array, NamedSharding(mesh, PartitionSpec(*spec)))
