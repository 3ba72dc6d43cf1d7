"""Checkpoints of the trainable state alone: small, atomic, the latest and the best kept.

Orbax writes them; a step is listed only once it is whole. A state is stored as one flat table,
path -> array, so that what is in a checkpoint can be read without the code that made it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers


class Restored(NamedTuple):
    """A restored checkpoint: its step, the state, and what was noted beside it."""

    step: int
    state: Any
    notes: dict[str, Any]


def open_checkpoints(
    directory: str | Path, *, keep: int = 1, best: Literal["max", "min"] = "max"
) -> ocp.CheckpointManager:
    """Opens a directory of checkpoints, made if it does not exist. Close it after use.

    Args:
        directory: Where they are.
        keep: How many of the latest to keep; the one of the best score is kept beside them.
        best: Whether the best score is the highest or the lowest.
    """

    def score(metrics: Mapping[str, float]) -> float:
        return metrics["score"] if best == "max" else -metrics["score"]

    policy = checkpoint_managers.AnyPreservationPolicy(
        [
            checkpoint_managers.LatestN(keep),
            checkpoint_managers.BestN(get_metric_fn=score, n=1),
        ]
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policy, best_fn=score, enable_async_checkpointing=False
    )
    handlers = {
        "state": ocp.StandardCheckpointHandler(),
        "notes": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(Path(directory).resolve(), options=options, item_handlers=handlers)


def save(
    checkpoints: ocp.CheckpointManager,
    step: int,
    state: Any,
    *,
    notes: Mapping[str, Any] | None = None,
    score: float | None = None,
) -> None:
    """Saves a state; when this returns, the step is listed and whole.

    Args:
        checkpoints: From `open_checkpoints`.
        step: Its number.
        state: Any tree of arrays; PRNG keys are stored as their data.
        notes: Plain values to store beside it, as JSON.
        score: What the best checkpoint is chosen by; a checkpoint without one is never the best.

    Raises:
        ValueError: The step was saved before.
    """
    if step in checkpoints.all_steps():
        raise ValueError(f"Step {step} is saved already in {checkpoints.directory}.")
    checkpoints.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(_table(state)),
            notes=ocp.args.JsonSave(dict(notes or {})),
        ),
        metrics=None if score is None else {"score": float(score)},
    )


def restore(checkpoints: ocp.CheckpointManager, like: Any, step: int | None = None) -> Restored:
    """Restores a checkpoint, bit for bit.

    Args:
        checkpoints: From `open_checkpoints`.
        like: A state of the same structure, shapes and dtypes (values unused); arrays are placed
            on the devices as its own are.
        step: Which one; the latest if None.

    Raises:
        ValueError: There is no such step, or it holds another state than ``like``; the message
            names the arrays that differ.
    """
    step = checkpoints.latest_step() if step is None else step
    if step is None or step not in checkpoints.all_steps():
        raise ValueError(
            f"{checkpoints.directory} has no checkpoint{'' if step is None else f' {step}'}. "
            f"It has {sorted(checkpoints.all_steps()) or 'none'}."
        )
    wanted = _table(like)
    _check(checkpoints, step, wanted)
    restored = checkpoints.restore(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(jax.tree.map(_abstract, wanted)),
            notes=ocp.args.JsonRestore(),
        ),
    )
    leaves = [
        jax.random.wrap_key_data(restored["state"][path], impl=jax.random.key_impl(leaf))
        if _is_key(leaf)
        else restored["state"][path]
        for path, leaf in zip(wanted, jax.tree.leaves(like), strict=True)
    ]
    return Restored(step, jax.tree.unflatten(jax.tree.structure(like), leaves), restored["notes"])


def _table(state: Any) -> dict[str, jax.Array]:
    """Path -> array; leaves in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            jax.random.key_data(leaf) if _is_key(leaf) else leaf
        )
        for path, leaf in leaves
    }


def _check(checkpoints: ocp.CheckpointManager, step: int, wanted: Mapping[str, Any]) -> None:
    """Compares names and shapes before any byte is read."""
    stored = checkpoints.item_metadata(step)["state"]
    stored = {path: (tuple(array.shape), str(array.dtype)) for path, array in stored.items()}
    asked = {path: (tuple(array.shape), str(array.dtype)) for path, array in wanted.items()}
    if stored == asked:
        return
    lines = [
        f"{path}: stored {stored.get(path, 'nothing')}, asked for {asked.get(path, 'nothing')}"
        for path in sorted(stored.keys() | asked.keys())
        if stored.get(path) != asked.get(path)
    ]
    more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
    raise ValueError(
        f"Checkpoint {step} in {checkpoints.directory} holds another state:\n  "
        + "\n  ".join(lines[:10])
        + more
    )


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)
