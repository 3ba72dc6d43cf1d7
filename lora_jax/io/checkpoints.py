"""Checkpoints of the trainable state alone: small, atomic, verified, the latest and the best kept.

Orbax writes them; a step is listed only once it is whole, and no longer once its deletion began.
A state is stored as one flat table, path -> array, so that what is in a checkpoint can be read
without the code that made it. Beside it lies a manifest: notes, score, a SHA-256 for each array.
"""

import contextlib
import dataclasses
import logging
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from . import _manifest, _steps

LOG = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A restored checkpoint: its step, the state, and what was noted beside it."""

    step: int
    state: Any
    notes: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Checkpoints(_steps.Steps):
    """An open directory of checkpoints, from `open_checkpoints`.

    Attributes:
        orbax: What reads and writes one step.
    """

    orbax: ocp.Checkpointer

    def close(self) -> None:
        """Gives back what Orbax holds; the end of a ``with`` does it too."""
        self.orbax.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_checkpoints(
    directory: str | Path, *, keep: int = 1, best: Literal["max", "min"] = "max"
) -> Checkpoints:
    """Opens a directory of checkpoints, made if it does not exist. Close it after use.

    Args:
        directory: Where they are.
        keep: How many of the latest to keep; the one of the best score is kept beside them. With
            one alone, there may be none to go back to if it is damaged.
        best: Whether the best score is the highest or the lowest.
    """
    directory = Path(directory).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.StandardCheckpointHandler(), manifest=ocp.JsonCheckpointHandler(_steps.MANIFEST)
    )
    return Checkpoints(directory, keep, best, ocp.Checkpointer(handler))


def save(
    checkpoints: Checkpoints,
    step: int,
    state: Any,
    *,
    notes: Mapping[str, Any] | None = None,
    score: float | None = None,
) -> None:
    """Saves a state; when this returns, the step is listed and whole.

    Args:
        checkpoints: From `open_checkpoints`.
        step: Its number, higher than all before.
        state: Any tree of arrays; PRNG keys are stored as their data.
        notes: Plain values to store beside it, as JSON.
        score: What the best checkpoint is chosen by; a checkpoint without one is never the best.

    Raises:
        ValueError: This step or a later one was saved before.
        OSError: It could not be written. It is not listed, and the steps before are as they were.
    """
    steps = checkpoints.all_steps()
    if step in steps:
        raise ValueError(f"Step {step} is saved already in {checkpoints.directory}.")
    if steps and step < steps[-1]:
        raise ValueError(f"Step {step} is older than step {steps[-1]} in {checkpoints.directory}.")
    table = _table(state)
    manifest = _manifest.make(table, notes or {}, None if score is None else float(score))
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(table), manifest=ocp.args.JsonSave(manifest)
    )
    _steps.on_one_process(checkpoints.sweep)
    try:
        with _alone():
            checkpoints.orbax.save(checkpoints.path(step), args=args)
    except Exception as error:  # Orbax and TensorStore have no class for it
        checkpoints.sweep()
        raise OSError(
            f"Checkpoint {step} could not be written to {checkpoints.directory}, which has "
            f"{steps or 'none'}: {_reason(error)}"
        ) from error
    _steps.on_one_process(checkpoints.delete_old)


def restore(checkpoints: Checkpoints, like: Any, step: int | None = None) -> Restored:
    """Restores a checkpoint, bit for bit.

    If the latest was asked for and is damaged, the one before is taken, and so on: a warning is
    logged that says what was found, and the damaged ones are moved out of the list.

    Args:
        checkpoints: From `open_checkpoints`.
        like: A state of the same structure, shapes and dtypes (values unused); arrays are placed
            on the devices as its own are.
        step: Which one; the latest that is whole if None.

    Raises:
        ValueError: There is no such step, it is damaged, or it holds another state than ``like``;
            the message names the arrays.
    """
    steps = checkpoints.all_steps()
    if not steps or step not in (None, *steps):
        raise ValueError(
            f"{checkpoints.directory} has no checkpoint{'' if step is None else f' {step}'}. "
            f"It has {steps or 'none'}."
        )
    if step is None:
        return _restore_latest(checkpoints, like, steps)
    try:
        return _restore(checkpoints, like, step)
    except _manifest.DamagedError as error:
        raise ValueError(
            f"Checkpoint {step} in {checkpoints.directory} cannot be restored: {error}."
        ) from error


def _restore_latest(checkpoints: Checkpoints, like: Any, steps: Sequence[int]) -> Restored:
    """Restores the last of some steps that is whole."""
    damaged = {}
    for step in reversed(steps):
        try:
            restored = _restore(checkpoints, like, step)
        except _manifest.DamagedError as error:
            damaged[step] = error
            continue
        for later, error in damaged.items():
            LOG.warning(
                "Checkpoint %d in %s cannot be restored: %s. Step %d is used instead, and the "
                "damaged one is renamed to %d.damaged.",
                *(later, checkpoints.directory, error, step, later),
            )
            _steps.on_one_process(checkpoints.set_aside, later)
        return restored
    raise ValueError(
        f"No checkpoint in {checkpoints.directory} can be restored:"
        + "".join(f"\n  {step}: {error}" for step, error in damaged.items())
    )


def _restore(checkpoints: Checkpoints, like: Any, step: int) -> Restored:
    """Restores a step, or raises DamagedError if it is not what was saved."""
    manifest = checkpoints.manifest(step)
    wanted = _table(like)
    _check(checkpoints, step, manifest, wanted)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(jax.tree.map(_abstract, wanted)))
    try:
        with _alone():
            table = checkpoints.orbax.restore(checkpoints.path(step), args=args)["state"]
    except Exception as error:  # whatever Orbax and TensorStore make of damaged files
        raise _manifest.DamagedError(f"it cannot be read: {_reason(error)}") from error
    _manifest.verify(manifest, table)
    leaves = [
        jax.random.wrap_key_data(table[path], impl=jax.random.key_impl(leaf))
        if _is_key(leaf)
        else table[path]
        for path, leaf in zip(wanted, jax.tree.leaves(like), strict=True)
    ]
    return Restored(step, jax.tree.unflatten(jax.tree.structure(like), leaves), manifest.notes)


def _table(state: Any) -> dict[str, jax.Array]:
    """Path -> array; leaves in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            jax.random.key_data(leaf) if _is_key(leaf) else leaf
        )
        for path, leaf in leaves
    }


def _check(
    checkpoints: Checkpoints, step: int, manifest: _manifest.Manifest, wanted: Mapping[str, Any]
) -> None:
    """Compares names and shapes before any array is read."""
    stored = {path: (leaf.shape, leaf.dtype) for path, leaf in manifest.leaves.items()}
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


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """What Orbax leaves behind when it fails is waited for and kept quiet.

    Its threads go on for a moment: they write into what is being removed, and log a traceback for
    every array. The error that it raises says it all. TensorStore's own threads cannot be waited
    for, so a directory of an unfinished step may come back; the next save removes it.
    """
    before = set(threading.enumerate())
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    except Exception:
        end = time.monotonic() + 10  # one that is not of Orbax may have begun meanwhile
        while (left := set(threading.enumerate()) - before) and time.monotonic() < end:
            threading.Thread.join(left.pop(), timeout=0.1)  # Orbax's own join raises
        raise
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first line of what caused an error; TensorStore names the array there."""
    while error.__cause__ is not None:
        error = error.__cause__
    return textwrap.shorten(f"{type(error).__name__}: {error}".splitlines()[0], 600)
