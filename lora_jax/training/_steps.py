"""One step of training, jitted over a mesh, and one of evaluation.

    state, metrics = train_step(state, frozen, batch)      # state is donated, frozen is not
    outputs = eval_step(state.trainable, frozen, batch)

Gradients and optimizer state exist for the trainable leaves alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from .._joined import cut_by_rows
from ._batch import batch_sharding, check_batch
from ._bucket import gathered_in_buckets
from ._compiler import jit_over
from ._gradient import LossFn, StepKeys, mean_gradient
from ._mesh import replicated
from ._placement import (
    Placement,
    gathered_later,
    row_shards,
    state_placement,
)
from ._precision import Precision


class TrainState(NamedTuple):
    """All that changes while training, and all that a checkpoint needs.

    Attributes:
        step: Steps taken, ``()`` int32. The data position follows from it.
        trainable: The trainable half of `lora_jax.split`.
        opt_state: The optimizer's state for ``trainable``.
        key: The run's PRNG key, never changed: step keys are folded from it.
    """

    step: jax.Array
    trainable: Any
    opt_state: optax.OptState
    key: jax.Array


def init_state(trainable: Any, tx: optax.GradientTransformation, key: jax.Array) -> TrainState:
    """The state before the first step. Arrays are copied, since a train step consumes them."""
    trainable = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), trainable)
    return TrainState(jnp.int32(0), trainable, tx.init(trainable), jnp.array(key, copy=True))


def step_keys(key: jax.Array, step: jax.Array | int) -> StepKeys:
    """The keys of one step: a function of the run's key and the step's number alone."""
    lora, model = jax.random.split(jax.random.fold_in(key, step))
    return StepKeys(lora, model)


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    *,
    placement: Placement | None = None,
    accumulate: int = 1,
    precision: Precision | None = None,
) -> Any:
    """Makes the jitted train step.

    Args:
        loss_fn: ``(trainable, frozen, batch, keys) -> ()``, the mean over the batch, each example
            alike; or ``-> (sum, weight)``, ``()`` each, whose quotient is the loss: a mean over
            tokens, of which batches have more or fewer. Only adapted functions read ``frozen``:
            what is quantised, or cut over ``fsdp``, is no array there, nor a leaf for each weight.
        tx: The optimizer.
        mesh: The mesh of `make_mesh`: batches are cut over its axes ``data`` and ``fsdp``.
        placement: Where both halves live, of `placements`; None is whole on every device.
        accumulate: Take the batch apart into this many, one after the other, so that only the
            activations of one exist: the gradient is that of the whole batch, to rounding. Each
            has step keys of its own.
        precision: Both halves are cast to its dtype of the arithmetic before ``loss_fn`` gets
            them; None casts nothing. The batch is never cast: it may hold weights that are summed.
            Losses, norms and sums of gradients are float32 at least, whichever it is.

    Returns:
        A jitted ``(state, frozen, batch) -> (state, metrics)``; it has ``.lower``, and may be part
        of another jitted function. The state that goes in is donated: its arrays are gone
        afterwards. ``metrics`` holds ``loss`` and ``grad_norm``, ``()`` each, of this step's
        weights before their update.

    Raises:
        ValueError: ``accumulate`` is below 1; or at the call, for a batch that does not divide
            over the devices and ``accumulate``.
    """
    if accumulate < 1:
        raise ValueError(f"`accumulate` must be at least 1, got {accumulate}.")
    loss_fn = in_precision(loss_fn, precision)

    def train_step(state: TrainState, frozen: Any, batch: Any):
        check_batch(batch, mesh, accumulate)
        batch = jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))
        keys = step_keys(state.key, state.step)
        trainable, frozen = _as_read(state.trainable, frozen, placement, accumulate)
        with cut_by_rows(row_shards(placement, mesh)):
            loss, grads = mean_gradient(loss_fn, trainable, frozen, batch, keys, accumulate)
        state, metrics = advanced(state, tx, loss, grads)
        if placement is not None:  # it comes out where it went in
            places = state_placement(state, placement)
            state = jax.lax.with_sharding_constraint(state, places)
        return state, metrics

    whole = replicated(mesh)
    if placement is None:
        ins, outs = (whole, whole, None), (whole, whole)
    else:
        ins, outs = (None, placement.frozen, None), (None, whole)
    places = {"in_shardings": ins, "out_shardings": outs}
    return jit_over(mesh, train_step, **places, donate_argnums=0)


def make_eval_step(
    apply_fn: Callable[[Any, Any, Any], Any],
    mesh: Mesh,
    *,
    placement: Placement | None = None,
    precision: Precision | None = None,
) -> Any:
    """Makes the jitted eval step.

    Args:
        apply_fn: ``(trainable, frozen, batch) -> outputs``, a tree of ``(examples, ...)``.
        mesh: The mesh of `make_mesh`.
        placement: As in `make_train_step`.
        precision: As in `make_train_step`.

    Returns:
        A jitted function of the same signature whose outputs stand whole on every device.

    Raises:
        ValueError: At the call, for a batch that does not divide over the devices: `pad_batch`
            fills it up.
    """
    apply_fn = in_precision(apply_fn, precision)

    def eval_step(trainable: Any, frozen: Any, batch: Any):
        check_batch(batch, mesh)
        batch = jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))
        with cut_by_rows(row_shards(placement, mesh)):
            return apply_fn(*_as_read(trainable, frozen, placement), batch)

    whole = replicated(mesh)
    ins = (whole, whole) if placement is None else (placement.trainable, placement.frozen)
    return jit_over(mesh, eval_step, in_shardings=(*ins, None), out_shardings=whole)


def in_precision(fn: Callable[..., Any], precision: Precision | None) -> Callable[..., Any]:
    """A function of both halves, a batch and more, with both halves cast to the arithmetic."""
    if precision is None:
        return fn

    def cast(trainable: Any, frozen: Any, *more: Any) -> Any:
        return fn(*precision.for_arithmetic((trainable, frozen)), *more)

    return cast


def _as_read(
    trainable: Any, frozen: Any, placement: Placement | None, passes: int = 1
) -> tuple[Any, Any]:
    """Both halves as a function over the mesh reads them, once in each pass."""
    if placement is None:
        return trainable, frozen
    trainable = gathered_in_buckets(trainable, placement.trainable, "fsdp")
    return trainable, gathered_later(frozen, placement, passes)


def advanced(
    state: TrainState, tx: optax.GradientTransformation, loss: jax.Array, grads: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state one update further, and the step's figures."""
    updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    wide = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads)
    metrics = {"loss": loss, "grad_norm": optax.tree.norm(wide)}
    return TrainState(state.step + 1, trainable, opt_state, state.key), metrics
