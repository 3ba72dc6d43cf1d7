"""Hugging Face checkpoints, read: ``config.json`` and ``model.safetensors``.

Nothing is skipped and nothing is made up: every tensor of the file must have a place in the
model and every weight of the model a tensor in the file, or one error lists them all.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.io._json import read_object
from lora_jax.io._safetensors import FLOATS, tensors_in, tensors_of_index
from lora_jax.io._tensor import Tensor
from lora_jax.io.names import NameTable, Published

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_FIELDS = 1_000

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_config_json(directory: Path) -> dict[str, Any]:
    """The fields of a checkpoint's ``config.json``.

    Raises:
        ValueError: The file is absent, is not a JSON object, or does not name its type and its
            architectures as such files do.
    """
    file = directory / "config.json"
    if not file.is_file():
        raise ValueError(f"{directory} has no config.json: it is not a checkpoint's directory.")
    fields = read_object(file)
    if len(fields) > MAX_FIELDS:
        raise ValueError(f"{file} has {len(fields)} fields, more than {MAX_FIELDS}.")
    model_type, architectures = fields.get("model_type"), fields.get("architectures") or []
    if not isinstance(model_type, str | None):
        raise ValueError(f"{file}: `model_type` must be a name, got {model_type!r:.80}.")
    if not isinstance(architectures, list) or not all(isinstance(n, str) for n in architectures):
        raise ValueError(
            f"{file}: `architectures` must be a list of names, got {architectures!r:.80}."
        )
    return fields


def find_tensors(directory: Path) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint, by their names in the file; their values are not read.

    Of a directory that has both, one file and an index, the one file is read, as transformers do.

    Raises:
        ValueError: There are no safetensors files, or they are not whole and consistent.
    """
    if (directory / SINGLE).is_file():
        return tensors_in(directory / SINGLE)
    if (directory / INDEX).is_file():
        return tensors_of_index(directory / INDEX)
    if pickles := pickles_in(directory):
        raise ValueError(
            f"{directory} has its weights in {', '.join(pickles)} only. These are pickle files, "
            "which run code when they are opened, so they are not read. Convert them where "
            'torch is installed: AutoModel.from_pretrained(...).save_pretrained("new").'
        )
    raise ValueError(f"{directory} has neither {SINGLE} nor {INDEX}.")


def pickles_in(directory: Path) -> list[str]:
    """The names of a directory's pickle files, which nothing here opens."""
    return sorted(file.name for file in directory.iterdir() if file.suffix in _PICKLES)


class Match(NamedTuple):
    """Which tensors of a file make which weights of the model.

    Attributes:
        found: Path of a weight to its tensors: one, or one a layer.
        absent: Paths of which the file has no tensor at all.
    """

    found: dict[str, tuple[Tensor, ...]]
    absent: tuple[str, ...]


def match_tensors(
    tensors: Mapping[str, Tensor],
    table: NameTable,
    shapes: Mapping[str, tuple[int, ...]],
    may_be_absent: Iterable[str] = (),
) -> Match:
    """Finds every weight of a model in a checkpoint, and a weight for every tensor.

    Args:
        tensors: What the file has.
        table: The names of the model's weights.
        shapes: Path to shape, of every weight.
        may_be_absent: Paths that the file need not have.

    Raises:
        ValueError: One list of all tensors missing, left over, of another shape or not of a
            float dtype, and of tied copies that differ.
    """
    by_key = _by_key(tensors, table)
    wanted = {path: [table.key(t) for t in e.tensors] for path, e in table.entries.items()}
    absent = tuple(path for path in may_be_absent if not any(key in by_key for key in wanted[path]))
    needed = {path: keys for path, keys in wanted.items() if path not in absent}
    found = {
        path: tuple(by_key[key] for key in keys)
        for path, keys in needed.items()
        if all(key in by_key for key in keys)
    }
    known = {*table.unused, *table.tied, *(key for keys in wanted.values() for key in keys)}
    problems = [
        *_missing(table, needed, by_key),
        *(f"left over: {t.name} {t.shape}" for key, t in by_key.items() if key not in known),
        *_misfits(table, found, shapes),
        *_untied(table, by_key),
    ]
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"The checkpoint does not fit the model:{listed}")
    return Match(found, absent)


def _by_key(tensors: Mapping[str, Tensor], table: NameTable) -> dict[str, Tensor]:
    by_key: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        other = by_key.setdefault(table.key(name), tensor)
        if other is not tensor:
            raise ValueError(f"The checkpoint has one weight twice: {other.name} and {name}.")
    return by_key


def _missing(
    table: NameTable, needed: Mapping[str, list[str]], by_key: Mapping[str, Tensor]
) -> list[str]:
    return [
        f"missing: {tensor} (for {path})"
        for path, keys in needed.items()
        for key, tensor in zip(keys, table.entries[path].tensors, strict=True)
        if key not in by_key
    ]


def _misfits(
    table: NameTable,
    found: Mapping[str, tuple[Tensor, ...]],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[str]:
    problems = []
    for path, parts in found.items():
        shape = published_shape(table.entries[path], shapes[path])
        for part in parts:
            if part.shape != shape:
                problems.append(f"shape: {part.name} is {part.shape}, the model has {shape}")
            if part.dtype not in FLOATS:
                problems.append(f"dtype: {part.name} is {part.dtype}, not one of {FLOATS}")
    return problems


def _untied(table: NameTable, by_key: Mapping[str, Tensor]) -> list[str]:
    pairs = ((by_key.get(copy), by_key.get(original)) for copy, original in table.tied.items())
    return [
        f"tied: {copy.name} differs from {original.name}"
        for copy, original in pairs
        if copy and original and not np.array_equal(copy.read(), original.read())
    ]


def published_shape(entry: Published, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of each published tensor of a weight of ours."""
    one = shape[1:] if entry.stacked else shape
    return one[::-1] if entry.transposed else one


def read_weight(entry: Published, tensors: tuple[Tensor, ...], dtype: Any) -> jax.Array:
    """Reads a weight: transposed, stacked over layers and rounded to ``dtype``."""
    parts = [read_tensor(entry, tensor, dtype) for tensor in tensors]
    return jnp.asarray(np.stack(parts) if entry.stacked else parts[0])


def read_tensor(entry: Published, tensor: Tensor, dtype: Any) -> np.ndarray:
    """Reads one published tensor of a weight, on the host: transposed and rounded to ``dtype``."""
    values = tensor.read()
    return (values.T if entry.transposed else values).astype(dtype)


def published_tensors(entry: Published, weight: Any) -> dict[str, np.ndarray]:
    """The published tensors of a weight of ours: `read_weight` backwards."""
    whole = np.asarray(weight)
    parts = list(whole) if entry.stacked else [whole]
    turned = (np.ascontiguousarray(part.T if entry.transposed else part) for part in parts)
    return dict(zip(entry.tensors, turned, strict=True))
