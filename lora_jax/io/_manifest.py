"""What a checkpoint must hold, bit for bit: a SHA-256 for each array, and one of the manifest.

Storage loses bits without an error, so what is read is believed only if its hash is the one that
was taken from memory before anything was written.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils


class DamagedError(ValueError):
    """What is stored is not what was saved."""


class Leaf(NamedTuple):
    """What one array must be: its shape, the name of its dtype, and its `digest`."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str


class Manifest(NamedTuple):
    """All of a checkpoint but its arrays' bytes."""

    leaves: dict[str, Leaf]
    notes: dict[str, Any]
    score: float | None


def digest(leaf: jax.Array) -> str:
    """The SHA-256 of an array's dtype, shape and bytes, wherever its parts lie.

    The bytes are copied to the host, one array at a time. An array of which this process holds
    only a part is gathered, so every process must ask for it.
    """
    if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    host = np.ascontiguousarray(jax.device_get(leaf))
    found = hashlib.sha256(f"{leaf.dtype} {leaf.shape} ".encode())
    found.update(host.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def make(
    table: Mapping[str, jax.Array], notes: Mapping[str, Any], score: float | None
) -> dict[str, Any]:
    """A manifest as JSON is written: what it says, and the hash of that.

    Args:
        table: Path -> array.
        notes: Plain values.
        score: As given to `checkpoints.save`.
    """
    leaves = {
        path: Leaf(tuple(leaf.shape), str(leaf.dtype), digest(leaf)) for path, leaf in table.items()
    }
    content = Manifest(leaves, dict(notes), score)._asdict()
    content = json.loads(json.dumps(content))  # as it will be read: keys are strings
    return {"content": content, "sha256": _hash(content)}


def read(file: Path) -> Manifest:
    """Reads a manifest.

    Raises:
        DamagedError: It is missing, or is not what `make` made.
    """
    try:
        written = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise DamagedError("its manifest is missing") from error
    except (OSError, ValueError) as error:
        raise DamagedError(f"its manifest cannot be read: {error}") from error
    if not isinstance(written, dict) or written.keys() != {"content", "sha256"}:
        raise DamagedError("its manifest is damaged: it is another kind of JSON")
    if _hash(written["content"]) != written["sha256"]:
        raise DamagedError("its manifest is damaged: its SHA-256 is not the one in it")
    content = Manifest(**written["content"])
    leaves = {
        path: Leaf(tuple(shape), dtype, sha256)
        for path, (shape, dtype, sha256) in content.leaves.items()
    }
    return content._replace(leaves=leaves)


def verify(manifest: Manifest, table: Mapping[str, jax.Array]) -> None:
    """Compares arrays with what they must be.

    Raises:
        DamagedError: Some differ; the message names them.
    """
    differ = [path for path, leaf in table.items() if digest(leaf) != manifest.leaves[path].sha256]
    if differ:
        more = f" and {len(differ) - 10} more" if len(differ) > 10 else ""
        raise DamagedError(
            f"the SHA-256 of {', '.join(differ[:10])}{more} is not the one in its manifest"
        )


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
