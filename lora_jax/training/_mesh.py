"""Data parallelism: the batch is cut along the mesh's one axis, all else stands on every device."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices (or of those given) with the one axis ``"data"``.

    The axis is ``Auto``: XLA places what happens between the inputs and the outputs.
    """
    devices = jax.devices() if devices is None else list(devices)
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis cut over the mesh's ``"data"`` axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Puts every array of a tree on every device of the mesh.

    An array that is on a device already may be shared and not copied: where the result is
    donated, as the state of a train step is, the original is gone with it.
    """
    return jax.device_put(tree, replicated(mesh))


def shard_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Puts a host batch on the devices, its first axis cut over them.

    Args:
        batch: A tree of arrays ``(examples, ...)``.
        mesh: The mesh of `data_mesh`.

    Raises:
        ValueError: The number of examples does not divide by the number of devices.
    """
    check_batch(batch, mesh)
    return jax.device_put(batch, batch_sharding(mesh))


def check_batch(batch: Any, mesh: Mesh) -> None:
    """Refuses a batch that the mesh's devices cannot share evenly.

    Args:
        batch: A tree of arrays, or of their shapes.
        mesh: The mesh of `data_mesh`.

    Raises:
        ValueError: Says the sizes, and the nearest batch size that works.
    """
    for leaf in jax.tree.leaves(batch):
        size = leaf.shape[0]
        if size % mesh.size:
            nearest = max(mesh.size, round(size / mesh.size) * mesh.size)
            raise ValueError(
                f"A batch of {size} examples does not divide over {mesh.size} devices. "
                f"The nearest batch size that does is {nearest}."
            )
