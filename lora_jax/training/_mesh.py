"""A mesh of devices, and arrays that are put on it.

data     examples are cut, weights stand on every device
fsdp     examples are cut, and so are weights: each is gathered where it is read
tensor   examples stand on every device, weights are cut and multiply what they hold
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Tree = TypeVar("Tree")

AXES = ("data", "fsdp", "tensor")


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


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """Puts every array of a tree on every device of the mesh.

    An array that is on a device already may be shared and not copied: where the result is
    donated, as the state of a train step is, the original is gone with it.
    """
    return place(tree, jax.tree.map(lambda _: replicated(mesh), tree))


def place(tree: Tree, shardings: Any) -> Tree:
    """Puts every array of a tree where it belongs, also on devices of several processes.

    Args:
        tree: Arrays, all processes hold the same ones; or shapes, which learn where they belong.
        shardings: A sharding for each, as `placements` and `state_placement` give them.
    """
    return jax.tree.map(_place, tree, shardings)


def _place(array: Any, sharding: NamedSharding) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return jax.jit(lambda array: array, out_shardings=sharding)(array)
    if sharding.is_fully_addressable:
        return jax.device_put(array, sharding)
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = _place(jax.random.key_data(array), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(array))
    host = np.asarray(array)  # each process cuts out its own parts: nothing is sent
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
