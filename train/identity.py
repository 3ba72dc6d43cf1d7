"""What a run resumes on must be what it began on: its settings, its data, its base model's weights.

checksum(w) = sum_i mix(bits(w_i) + i)  mod 2**32        for each array, on its device

Not against malice: it finds another model, another revision, another dtype or another quantisation.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .config import Config
from .config_file import differences, from_plain
from .tasks import Sets, Task

BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}

ODD = (np.uint32(0x9E3779B1), np.uint32(0x85EBCA6B))

WEIGHTS = "model.weights"


def check_unchanged(notes: dict[str, Any], config: Config, hashes: dict[str, str]) -> list[str]:
    """Refuses to go on with another run.

    Args:
        notes: Those of the last checkpoint: its ``config`` and ``hashes``.
        config: Of the run that is to go on.
        hashes: Of `hashes_of`, likewise.

    Returns:
        What differs and may, a line each.

    Raises:
        ValueError: Names all that differ and may not.
    """
    changed = differences(from_plain(notes["config"]), config)
    changed += [
        f"{name}: hash {notes['hashes'][name]} -> {found}"
        for name, found in hashes.items()
        if notes["hashes"][name] != found
    ]
    allowed = [line for line in changed if _named(line) in config.output.allow_changes]
    if changed := [line for line in changed if line not in allowed]:
        raise ValueError(
            f"{config.output.directory} cannot be resumed: with these changes it would be another "
            "run.\n  "
            + "\n  ".join(changed)
            + "\nUndo them, start anew with --overwrite or another output.directory, or allow "
            f"them: output.allow_changes=[{', '.join(map(_named, changed))}]"
        )
    return allowed


def _named(change: str) -> str:
    """What a line of changes is about."""
    return change.partition(":")[0]


def hashes_of(task: Task, sets: Sets, params: Any) -> dict[str, str]:
    """A short hash of each set and of the base model, by the names that the config has."""
    rows = {"data.train": sets.train, "data.validation": sets.evaluation}
    found = {name: task.fingerprint(encoded) for name, encoded in rows.items()}
    return found | {WEIGHTS: fingerprint_of_weights(params)}


def fingerprint_of_weights(params: Any) -> str:
    """A short hash of all arrays of a tree: their paths, shapes, dtypes and entries."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    found = hashlib.sha256()
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path)
        found.update(f"{name} {leaf.shape} {leaf.dtype} {int(_checksum(leaf))}\n".encode())
    return found.hexdigest()[:16]


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(array, BITS[array.dtype.itemsize]).astype(jnp.uint32)
    mixed = bits.ravel() + jax.lax.iota(jnp.uint32, bits.size) * ODD[0]
    for odd in ODD:  # so that every bit of an entry moves every bit of the sum
        mixed = (mixed ^ (mixed >> 16)) * odd
    return (mixed ^ (mixed >> 16)).sum(dtype=jnp.uint32)
