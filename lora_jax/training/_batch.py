"""Batches that are cut over a mesh: how large they are, who holds which rows, what fills them up.

rows of a step = rows of a device and pass * passes (accumulate) * devices along data and fsdp
"""

import math
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")

BATCH_AXES = ("data", "fsdp")


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is cut."""
    return math.prod(size for name, size in mesh.shape.items() if name in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis cut over the mesh's axes ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_size(
    mesh: Mesh, *, total: int | None = None, per_device: int | None = None, accumulate: int = 1
) -> int:
    """How many examples a step has, from either number, or from both if they agree.

    Args:
        mesh: The mesh of `make_mesh`.
        total: Examples a step, over all devices and passes together.
        per_device: Examples of one device in one pass.
        accumulate: Passes a step, as in `make_train_step`.

    Raises:
        ValueError: Neither is given, they disagree, or the devices cannot share the total evenly.

    >>> from lora_jax.training import make_mesh
    >>> batch_size(make_mesh(), per_device=4, accumulate=2) // len(jax.devices())
    8
    """
    parts = batch_shards(mesh) * accumulate
    if per_device is None and total is None:
        raise ValueError("Give a batch size: `total`, `per_device`, or both.")
    if total is None:
        return _positive("per_device", per_device) * parts
    _check(_positive("total", total), batch_shards(mesh), accumulate)
    if per_device is not None and per_device * parts != total:
        raise ValueError(
            f"{total} examples a step are {total // parts} for each of {_parts(mesh, accumulate)}, "
            f"not {per_device}: {per_device} each would be {per_device * parts}. Leave one out."
        )
    return total


def check_batch(batch: Any, mesh: Mesh, accumulate: int = 1) -> None:
    """Refuses a batch that the mesh's devices cannot share evenly.

    Args:
        batch: A tree of arrays ``(examples, ...)``, or of their shapes.
        mesh: The mesh of `make_mesh`.
        accumulate: Into how many batches a step takes it apart.

    Raises:
        ValueError: Says the sizes, and the nearest batch size that works.
    """
    for size in {leaf.shape[0] for leaf in jax.tree.leaves(batch)}:
        _check(size, batch_shards(mesh), accumulate)


def own_rows(size: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a batch of ``size`` this process's devices hold, rising; all, if it is alone.

    Args:
        size: Examples of the batch, over all processes together.
        mesh: The mesh of `make_mesh`.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in held if index]))


def shard_batch(batch: Tree, mesh: Mesh) -> Tree:
    """Puts a host batch on the devices, its first axis cut over them.

    Args:
        batch: A tree of arrays ``(examples, ...)``: where several processes share the mesh, the
            `own_rows` of this one.
        mesh: The mesh of `make_mesh`.

    Raises:
        ValueError: The number of examples does not divide by the number of parts.
    """
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:
        check_batch(batch, mesh)
        return jax.device_put(batch, sharding)
    with jax.transfer_guard_host_to_device("allow"):  # JAX counts this one as not asked for
        return jax.tree.map(
            lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch
        )


def pad_batch(batch: Tree, mesh: Mesh, accumulate: int = 1) -> tuple[Tree, np.ndarray]:
    """Fills a batch up until the devices can share it, and says which examples count.

    Args:
        batch: A tree of host arrays ``(examples, ...)``, at least one example.
        mesh: The mesh of `make_mesh`.
        accumulate: As in `check_batch`.

    Returns:
        The batch, its last example repeated, and weights ``(examples,)`` float32: 1 for each that
        was there, 0 for what fills up. ``(sum, weight)`` of `make_train_step` counts with them.

    >>> from lora_jax.training import make_mesh
    >>> batch, weights = pad_batch({"x": np.arange(3)}, make_mesh(devices=jax.devices()[:1]), 2)
    >>> batch["x"].tolist(), weights.tolist()
    ([0, 1, 2, 2], [1.0, 1.0, 1.0, 0.0])
    """
    count = jax.tree.leaves(batch)[0].shape[0]
    parts = batch_shards(mesh) * accumulate
    places = np.minimum(np.arange(math.ceil(count / parts) * parts), count - 1)
    weights = (np.arange(len(places)) < count).astype(np.float32)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[places], batch), weights


def _positive(name: str, size: int | None) -> int:
    if size is None or size < 1:
        raise ValueError(f"`{name}` must be at least 1, got {size}.")
    return size


def _check(size: int, shards: int, accumulate: int) -> None:
    parts = shards * accumulate
    if size % parts:
        nearest = max(parts, round(size / parts) * parts)
        times = f", {accumulate} times each" if accumulate > 1 else ""
        raise ValueError(
            f"A batch of {size} examples does not divide over {shards} devices{times}. "
            f"The nearest batch size that does is {nearest}."
        )


def _parts(mesh: Mesh, accumulate: int) -> str:
    times = f" in each of {accumulate} passes" if accumulate > 1 else ""
    return f"{batch_shards(mesh)} devices{times}"
