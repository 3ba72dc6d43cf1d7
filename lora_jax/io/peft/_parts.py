"""Fused kernels, adapted in part: one block adapter in the file, and a note that says so.

    parts (True, False, True)   ->   lora_A (2 * rank, in),  lora_B = | b_0   0  |  (out, 2 * rank)
                                                                      |  0    0  |
                                                                      |  0   b_2 |

The note is in the file's metadata, which other libraries do not read: to them it is an adapter
of rank ``2 * rank``, with the same result.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_jax._config import Parts
from lora_jax.io._header import read_header
from lora_jax.io._json import parse_object

NOTE = "lora_jax.parts"


def write_note(parts: Mapping[str, Parts]) -> dict[str, str]:
    """The metadata that says which parts of which modules have factors; empty if none."""
    return {NOTE: json.dumps(parts)} if parts else {}


def read_note(file: Path) -> dict[str, Parts]:
    """The parts of the modules that a file's note names.

    Raises:
        ValueError: The note is malformed.
    """
    text = read_header(file).notes.get(NOTE, "{}")
    refusal = f"The note {NOTE!r} in {file} does not name parts:"
    parts = parse_object(text, f"{refusal} it")
    for flags in parts.values():
        of_bools = isinstance(flags, list) and all(isinstance(flag, bool) for flag in flags)
        if not of_bools or not any(flags):
            raise ValueError(f"{refusal} {text[:200]}.")
    return {module: tuple(flags) for module, flags in parts.items()}


def misfit(b: np.ndarray, parts: Parts) -> str | None:
    """Why the factor ``b (rank, out)`` of a module is not one of these parts."""
    if b.shape[0] % sum(parts) or b.shape[1] % len(parts):
        return f"factors {b.shape} do not divide into {sum(parts)} of {len(parts)} parts"
    blocks = _blocks(b, parts)
    for own, part in enumerate(_chosen(parts)):
        blocks[own, :, part] = 0
    return "lora_B is not zero outside the blocks of its parts" if blocks.any() else None


def take_apart(a: np.ndarray, b: np.ndarray, parts: Parts) -> tuple[np.ndarray, np.ndarray]:
    """The factors of each part, of those of the whole: `lora_jax.PartFactors.whole` backwards.

    Args:
        a: ``(in, n * rank)``.
        b: ``(n * rank, out)``.
        parts: Which of the equal parts of the out axis have factors; ``n`` of them.

    Returns:
        ``(in, n, rank)`` and ``(n, rank, out / len(parts))``.
    """
    n = sum(parts)
    blocks = _blocks(b, parts)
    chosen = [blocks[own, :, part] for own, part in enumerate(_chosen(parts))]
    return a.reshape(a.shape[0], n, a.shape[1] // n), np.stack(chosen)


def _blocks(b: np.ndarray, parts: Parts) -> np.ndarray:
    """A copy of ``b`` as ``(n, rank, parts, out / parts)``."""
    n, (ranks, out) = sum(parts), b.shape
    return b.reshape(n, ranks // n, len(parts), out // len(parts)).copy()


def _chosen(parts: Parts) -> list[int]:
    return [part for part, is_chosen in enumerate(parts) if is_chosen]
