"""Many adapters trained at once on one frozen base: the train step under `jax.vmap`.

    state, metrics = sweep_step(state, frozen, batch)      state (members, ...), frozen as ever
    loss_m = loss_fn(a_m, scale_m * b_m)                   scale_m = alpha_m / rank_m, data

An adapter is data, so members may differ in whatever is data too: weights, keys, batches, settings
of the optimizer, scale, and rank. A smaller rank is filled up with zeros, columns of ``a`` and rows
of ``b``, that stay zero: each of the two has a gradient that the other multiplies.

    grad b = scale * (x @ a)^T @ dy      zero where a is
    grad a = scale * x^T @ (dy @ b^T)    zero where b is
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._joined import apart
from .._weights import Factors
from ._batch import BATCH_AXES, check_batch
from ._compiler import jit_over
from ._gradient import LossFn, StepKeys, mean_gradient
from ._mesh import replicated
from ._precision import Precision
from ._steps import TrainState, advanced, in_precision, step_keys

Tree = TypeVar("Tree")


class SweepState(NamedTuple):
    """The states of all members, and what they differ in.

    Attributes:
        states: A `TrainState` with an axis of members in front of every array. Its factors have
            scale 1 and the largest of the members' ranks.
        scales: Path -> ``(members,)``, ``alpha / rank`` of each member.
        settings: Name -> ``(members,)`` float32, what ``make_tx`` is called with.
        running: ``(members,)`` bool: whose loss and gradient have been finite so far.
    """

    states: TrainState
    scales: dict[str, jax.Array]
    settings: dict[str, jax.Array]
    running: jax.Array


MakeTx = Callable[[Mapping[str, jax.Array]], optax.GradientTransformation]
"""One member's settings, ``()`` each -> its optimizer."""


def stack_states(
    states: Sequence[TrainState],
    settings: Mapping[str, Sequence[float]] | None = None,
    running: Sequence[bool] | None = None,
) -> SweepState:
    """Puts the states of members together; `member_state` takes one out.

    Args:
        states: Of `init_state`, one a member: they adapt the same weights, and may differ in rank
            and scale.
        settings: Name -> a value for each member.
        running: Who goes on; all if None.

    Raises:
        ValueError: They train different weights, or settings are not one a member.
    """
    settings = settings or {}
    if wrong := [name for name, values in settings.items() if len(values) != len(states)]:
        raise ValueError(
            f"There are {len(states)} members, and {len(settings[wrong[0]])} values of "
            f"{wrong[0]!r}: give one a member."
        )
    plain = [_without_scale(state) for state in states]
    kinds = {jax.tree.structure(state) for state in plain}
    if len(kinds) > 1:
        raise ValueError(
            "The members train different weights, or have different optimizers: all that may "
            "differ between their states is numbers, rank and scale."
        )
    scales = {
        path: jnp.array([state.trainable[path].scale for state in states], weight.b.dtype)
        for path, weight in states[0].trainable.items()
        if isinstance(weight, Factors)
    }
    return SweepState(
        jax.tree.map(_stack, *plain, is_leaf=_is_factors),
        scales,
        {name: jnp.array(values, jnp.float32) for name, values in settings.items()},
        jnp.array([True] * len(states) if running is None else running),
    )


def member_state(sweep: SweepState, member: int, like: TrainState) -> TrainState:
    """The state of one member, as its own run would have it.

    Args:
        sweep: The states of all.
        member: Which one.
        like: A state of this member, or its shapes: of its rank and scale.
    """

    def own(leaf: Any, wanted: Any) -> Any:
        return leaf[member][tuple(slice(size) for size in wanted.shape)]

    leaves = zip(jax.tree.leaves(sweep.states), jax.tree.leaves(like), strict=True)
    return jax.tree.unflatten(jax.tree.structure(like), [own(*pair) for pair in leaves])


def make_sweep_train_step(
    loss_fn: LossFn,
    make_tx: MakeTx,
    mesh: Mesh,
    *,
    at_once: int | None = None,
    accumulate: int = 1,
    precision: Precision | None = None,
) -> Any:
    """Makes the jitted train step of all members, equal to each one's own to rounding.

    A member whose loss or gradient is not finite stops: from that step on its state stays as it
    was, and nothing of it touches the others.

    Args:
        loss_fn: As `make_train_step` takes it, of one member.
        make_tx: The optimizer of one member. Padded ranks stay zero under one that gives zero
            updates to zero weights with zero gradients, element by element, as AdamW does.
        mesh: The mesh of `make_mesh`, of one process. Examples are cut over its axes ``data`` and
            ``fsdp``; frozen weights and states stand whole on every device.
        at_once: How many members are computed at once, and have activations in memory; None is
            all of them. One after the other, in one program all the same, suits a CPU.
        accumulate: As in `make_train_step`.
        precision: As in `make_train_step`.

    Returns:
        A jitted ``(state, frozen, batch, chosen=None) -> (state, metrics)``; it has ``.lower``.
        ``batch`` is a tree of arrays ``(members, examples, ...)``. ``chosen``, ``(some,)`` int32,
        are the members that take this step, ``batch`` being ``(some, examples, ...)``; None is
        all of them. State and frozen weights are put on the mesh with `replicate`; the state that
        goes in is donated. ``metrics`` holds ``loss`` and ``grad_norm`` of those, ``(some,)``
        each.

    Raises:
        ValueError: At the call, for a batch that does not divide over the devices and
            ``accumulate``.
    """
    loss_fn = in_precision(loss_fn, precision)

    def step_of_one(one: SweepState, frozen: Any, batch: Any):
        state, keys = one.states, step_keys(one.states.key, one.states.step)

        def own_loss(trainable: Any, frozen: Any, batch: Any, keys: StepKeys) -> Any:
            return loss_fn(with_scales(trainable, one.scales), frozen, batch, keys)

        loss, grads = mean_gradient(own_loss, state.trainable, frozen, batch, keys, accumulate)
        after, metrics = advanced(state, make_tx(one.settings), loss, grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        running = one.running & finite
        kept = jax.tree.map(lambda new, old: jnp.where(running, new, old), after, state)
        return one._replace(states=kept, running=running), metrics

    def train_step(state: SweepState, frozen: Any, batch: Any, chosen: Any = None):
        examples = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), batch)
        check_batch(examples, mesh, accumulate)
        batch = jax.lax.with_sharding_constraint(batch, batches_sharding(mesh))
        some = state if chosen is None else jax.tree.map(lambda leaf: leaf[chosen], state)
        after, metrics = _each(
            lambda one: step_of_one(one[0], frozen, one[1]), (some, batch), at_once
        )
        if chosen is not None:
            after = jax.tree.map(lambda all, own: all.at[chosen].set(own), state, after)
        return after, metrics

    return jit_over(mesh, train_step, out_shardings=replicated(mesh), donate_argnums=0)


def make_sweep_eval_step(
    apply_fn: Callable[[Any, Any, Any], Any], mesh: Mesh, *, at_once: int | None = None
) -> Any:
    """Makes the jitted eval step of all members on one batch.

    Args:
        apply_fn: As `make_eval_step` takes it, of one member.
        mesh: As in `make_sweep_train_step`.
        at_once: As in `make_sweep_train_step`.

    Returns:
        A jitted ``(state, frozen, batch) -> outputs``, a tree of ``(examples, members, ...)``
        that stand whole on every device; the batch, ``(examples, ...)``, is the same for all.
    """

    def eval_step(state: SweepState, frozen: Any, batch: Any):
        check_batch(batch, mesh)
        spread = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        batch = jax.lax.with_sharding_constraint(batch, spread)

        def outputs_of_one(one: Any) -> Any:
            return apply_fn(with_scales(*one), frozen, batch)

        outputs = _each(outputs_of_one, (state.states.trainable, state.scales), at_once)
        return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1), outputs)

    whole = replicated(mesh)
    return jit_over(mesh, eval_step, in_shardings=(whole, whole, None), out_shardings=whole)


def shard_batches(batches: Sequence[Tree], mesh: Mesh) -> Tree:
    """Stacks the host batches of members, ``(members, examples, ...)``, examples cut over devices.

    Args:
        batches: One a member, all of the same shapes.
        mesh: The mesh of `make_mesh`.
    """
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    check_batch(batches[0], mesh)
    return jax.device_put(stacked, batches_sharding(mesh))


def batches_sharding(mesh: Mesh) -> NamedSharding:
    """The second axis cut over the mesh's axes ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))


def with_scales(trainable: Mapping[str, Any], scales: Mapping[str, jax.Array]) -> dict[str, Any]:
    """One member's factors of scale 1 with its own scale, ``()`` each, in ``b``.

    What is computed is bit for bit what a static scale gives, and so is the gradient: Adam's
    steps depend on how a factor is scaled, so the weights that train are ``b`` without it.
    """
    return {
        path: dataclasses.replace(weight, b=scales[path] * weight.b) if path in scales else weight
        for path, weight in trainable.items()
    }


def _each(fn: Callable[[Any], Any], members: Any, at_once: int | None) -> Any:
    """``fn`` of every member of a tree ``(members, ...)``, so many at once."""
    with apart():
        if at_once is None or at_once >= len(jax.tree.leaves(members)[0]):
            return jax.vmap(fn)(members)
        return jax.lax.map(fn, members, batch_size=None if at_once == 1 else at_once)


def _is_factors(node: Any) -> bool:
    return isinstance(node, Factors)


def _without_scale(tree: Any) -> Any:
    """A tree with scale 1 in all factors, those of the optimizer's moments too."""
    return jax.tree.map(
        lambda node: dataclasses.replace(node, scale=1.0) if _is_factors(node) else node,
        tree,
        is_leaf=_is_factors,
    )


def _stack(*nodes: Any) -> Any:
    """Stacks one array or the factors of one weight over members, ranks filled up with zeros."""
    if not _is_factors(nodes[0]):
        return jnp.stack(nodes)
    return jax.tree.map(lambda *leaves: _stack_padded(leaves), *nodes)


def _stack_padded(leaves: Sequence[jax.Array]) -> jax.Array:
    largest = np.max([leaf.shape for leaf in leaves], axis=0)
    widths = [[(0, int(n)) for n in largest - leaf.shape] for leaf in leaves]
    return jnp.stack([jnp.pad(leaf, w) for leaf, w in zip(leaves, widths, strict=True)])
