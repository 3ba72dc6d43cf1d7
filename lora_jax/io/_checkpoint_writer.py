"""Hugging Face checkpoints, written: one shard in memory at a time, whole or not at all.

model.safetensors                          where one file holds it all
model-00001-of-00003.safetensors ...       else, and model.safetensors.index.json beside them
"""

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.io._directory import new_directory
from lora_jax.io._inside import check_inside
from lora_jax.io._safetensors import write_tensors
from lora_jax.io.gguf import write_tokenizer
from lora_jax.io.hub import GENERATION_CONFIG, TOKENIZER_FILES
from lora_jax.io.hugging_face import INDEX, SINGLE, published_shape, published_tensors
from lora_jax.io.names import NameTable

MAX_SHARD_BYTES = 5 * 10**9
COPIED_FILES = (*TOKENIZER_FILES, GENERATION_CONFIG)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deferred:
    """A weight that is made when it is written, and not before.

    Attributes:
        shape: What it will have.
        dtype: Likewise.
        make: Gives the array.
    """

    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[], Any]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """What ``np.asarray`` asks for."""
        return np.asarray(self.make(), dtype)


def write_checkpoint(
    directory: str | os.PathLike,
    table: NameTable,
    weights: Mapping[str, Any],
    config_json: Mapping[str, Any],
    *,
    source: Path | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Writes a directory that Hugging Face's libraries and `from_pretrained` load.

    It is written beside ``directory`` and then renamed, so no half of it is ever seen.

    Args:
        directory: Where; made, with its parents.
        table: The names of the weights.
        weights: Path to array or `Deferred`, for every path of ``table``.
        config_json: What goes into ``config.json``.
        source: A directory whose `COPIED_FILES` are copied, those that it has; or a GGUF file,
            whose tokenizer is written out.
        max_shard_bytes: How much one file holds; a single larger tensor has its own.
        overwrite: Whether a directory that holds files may be replaced.

    Raises:
        ValueError: ``weights`` are not those of ``table``, or ``directory`` holds files.
        OSError: A file could not be written.
    """
    odd = sorted(weights.keys() ^ table.entries.keys())
    if odd:
        raise ValueError(f"These weights are not those of the model: {', '.join(odd)}.")
    sizes = _sizes(table, weights)
    shards = plan_shards(sizes, max_shard_bytes)
    with new_directory(directory, overwrite=overwrite) as beside:
        for name, tensors in shards.items():
            _write_shard(beside / name, table, weights, tensors)
        if len(shards) > 1:
            _write_json(beside / INDEX, _index(shards, sizes))
        _write_json(beside / "config.json", config_json)
        copy_files(source, beside)
    return Path(directory)


def plan_shards(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """Which tensors go into which file, in their order; a file is full before the next is begun.

    Args:
        sizes: Tensor to bytes.
        limit: How many bytes of tensors a file holds; a single larger tensor has its own.

    Raises:
        ValueError: ``limit`` is not positive.

    Example:
        >>> plan_shards({"a": 3, "b": 3, "c": 9}, limit=6)
        {'model-00001-of-00002.safetensors': ['a', 'b'], 'model-00002-of-00002.safetensors': ['c']}
        >>> plan_shards({"a": 3, "b": 3}, limit=6)
        {'model.safetensors': ['a', 'b']}
    """
    if limit < 1:
        raise ValueError(f"`max_shard_bytes` must be at least 1, got {limit}.")
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    stem, count = SINGLE.removesuffix(".safetensors"), len(shards)
    return {
        f"{stem}-{number:05d}-of-{count:05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def copy_files(source: Path | None, target: Path, names: Sequence[str] = COPIED_FILES) -> None:
    """Copies the files of these names, those that there are; of a GGUF file, its tokenizer.

    Raises:
        ValueError: One is a link out of ``source``: what it leads to was never published.
    """
    if source is None:
        return
    if source.is_file():
        write_tokenizer(source, target)
        return
    for name in names:
        if (source / name).is_file():
            check_inside(source / name)
            shutil.copyfile(source / name, target / name)


def _sizes(table: NameTable, weights: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of every published tensor."""
    return {
        tensor: math.prod(published_shape(entry, weights[path].shape))
        * np.dtype(weights[path].dtype).itemsize
        for path, entry in table.entries.items()
        for tensor in entry.tensors
    }


def _write_shard(
    file: Path, table: NameTable, weights: Mapping[str, Any], tensors: Iterable[str]
) -> None:
    wanted = set(tensors)
    held: dict[str, np.ndarray] = {}
    for path, entry in table.entries.items():
        if wanted.intersection(entry.tensors):
            published = published_tensors(entry, weights[path])
            held |= {name: tensor for name, tensor in published.items() if name in wanted}
    write_tensors(file, held)


def _index(shards: Mapping[str, list[str]], sizes: Mapping[str, int]) -> dict[str, Any]:
    weight_map = {tensor: file for file, tensors in shards.items() for tensor in tensors}
    return {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}


def _write_json(file: Path, fields: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
