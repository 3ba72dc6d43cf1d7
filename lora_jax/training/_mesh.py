"""A mesh of devices, and batches that are cut over it.

data     examples are cut, weights stand on every device
fsdp     examples are cut, and so are weights: each is gathered where it is read
tensor   examples stand on every device, weights are cut and multiply what they hold
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(
    *,
    data: int | None = None,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with the axes ``data``, ``fsdp`` and ``tensor``.

    The axes are ``Auto``: XLA places what happens between the inputs and the outputs.

    Args:
        data: Devices along this axis; None takes as many as there are for the other two.
        fsdp: Devices along this axis.
        tensor: Devices along this axis.
        devices: All of the process's, and of all processes together, if None.

    Raises:
        ValueError: The sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    asked = {"data": data, "fsdp": fsdp, "tensor": tensor}
    if wrong := [f"{name}={size}" for name, size in asked.items() if size is not None and size < 1]:
        raise ValueError(f"An axis of a mesh has at least one device, got {', '.join(wrong)}.")
    if data is None:
        data = max(1, len(devices) // (fsdp * tensor))
    sizes = (data, fsdp, tensor)
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"A mesh of data={data}, fsdp={fsdp} and tensor={tensor} takes {math.prod(sizes)} "
            f"devices, and there are {len(devices)}. Make the sizes multiply to that, or name "
            "the devices."
        )
    return jax.make_mesh(sizes, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is cut."""
    return math.prod(size for name, size in mesh.shape.items() if name in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis cut over the mesh's axes ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


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
        mesh: The mesh of `make_mesh`.

    Raises:
        ValueError: The number of examples does not divide by the number of parts.
    """
    check_batch(batch, mesh)
    return jax.device_put(batch, batch_sharding(mesh))


def check_batch(batch: Any, mesh: Mesh, accumulate: int = 1) -> None:
    """Refuses a batch that the mesh's devices cannot share evenly.

    Args:
        batch: A tree of arrays, or of their shapes.
        mesh: The mesh of `make_mesh`.
        accumulate: Into how many batches a step takes it apart.

    Raises:
        ValueError: Says the sizes, and the nearest batch size that works.
    """
    parts = batch_shards(mesh) * accumulate
    for leaf in jax.tree.leaves(batch):
        size = leaf.shape[0]
        if size % parts:
            nearest = max(parts, round(size / parts) * parts)
            times = f", {accumulate} times each" if accumulate > 1 else ""
            raise ValueError(
                f"A batch of {size} examples does not divide over {batch_shards(mesh)} devices"
                f"{times}. The nearest batch size that does is {nearest}."
            )
