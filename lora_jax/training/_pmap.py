"""The same step under `jax.pmap`, for scripts that are written that way.

state, metrics = train_step(state, frozen, batch)      every leaf (devices, ...)
"""

from typing import Any, TypeVar

import jax
import numpy as np
import optax
from jax import lax

from ._gradient import LossFn, mean, summed_gradient
from ._precision import Precision
from ._steps import TrainState, advanced, in_precision, step_keys

Tree = TypeVar("Tree")


def make_pmap_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    axis_name: str = "batch",
    accumulate: int = 1,
    precision: Precision | None = None,
    devices: Any = None,
) -> Any:
    """Makes the train step as a `jax.pmap`.

    Args:
        loss_fn: As `make_train_step` takes it, of the examples of one device.
        tx: The optimizer.
        axis_name: Of the devices, for collectives that ``loss_fn`` may have.
        accumulate: As in `make_train_step`, of each device's examples.
        precision: As in `make_train_step`.
        devices: Those to run on; all of the process's if None.

    Returns:
        ``(state, frozen, batch) -> (state, metrics)``: every leaf has an axis of devices in front,
        state and frozen that of `pmap_replicate`, the batch ``(devices, examples, ...)``. The
        state that goes in is donated. ``metrics`` are alike on all devices. Each device draws its
        own dropout.
    """
    loss_fn = in_precision(loss_fn, precision)

    def train_step(state: TrainState, frozen: Any, batch: Any):
        keys = step_keys(state.key, state.step)
        own = jax.tree.map(lambda key: jax.random.fold_in(key, lax.axis_index(axis_name)), keys)
        sums = summed_gradient(loss_fn, state.trainable, frozen, batch, own, accumulate)
        total, weight, grads = lax.psum(sums, axis_name)
        return advanced(state, tx, *mean(total, weight, grads, state.trainable))

    return jax.pmap(train_step, axis_name=axis_name, devices=devices, donate_argnums=(0,))


def pmap_replicate(tree: Tree, devices: Any = None) -> Tree:
    """Puts every array on every device, once, behind a new axis of devices.

    Args:
        tree: A tree of arrays, ``(...)`` each; the results are ``(devices, ...)``.
        devices: All of the process's if None.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    mesh = jax.sharding.Mesh(np.array(devices), ("devices",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))

    def replicate(leaf: Any) -> jax.Array:
        copies = [jax.device_put(leaf[None], device) for device in devices]
        shape = (len(devices), *leaf.shape)
        return jax.make_array_from_single_device_arrays(shape, place, copies)

    return jax.tree.map(replicate, tree)
