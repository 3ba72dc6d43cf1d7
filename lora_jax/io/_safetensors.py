"""Safetensors files: read, their headers first and their tensors when asked; and written."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes  # noqa: F401  (numpy learns bfloat16)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FLOATS = ("F16", "BF16", "F32", "F64")


class Tensor(NamedTuple):
    """A tensor in a file, not read yet."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        """Its values, as stored."""
        with safe_open(self.file, framework="numpy") as opened:
            return opened.get_tensor(self.name)


def tensors_in(file: Path) -> dict[str, Tensor]:
    """The tensors that a file's header lists.

    Raises:
        ValueError: The file is not a whole safetensors file.
    """
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: Tensor(file, name, tuple(s.get_shape()), s.get_dtype())
                for name, s in slices.items()
            }
    except SafetensorError as error:
        raise ValueError(
            f"{file} is not a complete safetensors file ({error}): fetch it again."
        ) from error


def write_tensors(
    file: Path, tensors: Mapping[str, np.ndarray], note: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file as PyTorch's libraries read it; who may read its directory may.

    Args:
        file: Where.
        tensors: Name to values, C-contiguous.
        note: More of its metadata.

    Raises:
        OSError: It could not be written: a full disk, for one.
    """
    try:
        save_file(dict(tensors), file, metadata={"format": "pt", **(note or {})})
    except SafetensorError as error:
        raise OSError(f"{file.name} could not be written: {error}.") from error
    # safetensors 0.8 lets nobody but the owner read what it writes: as the directory does instead.
    file.chmod(file.parent.stat().st_mode & 0o666)


def tensors_of_index(index: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint in several files, as its index lists them.

    Raises:
        ValueError: The index is malformed, names a file that is not a plain file inside its
            own directory, or disagrees with the files about which tensors there are.
    """
    weight_map = _weight_map(index)
    files = {shard: _shard(index.parent, shard) for shard in sorted(set(weight_map.values()))}
    found = {shard: tensors_in(file) for shard, file in files.items()}
    listed = set(weight_map.items())
    present = {(name, shard) for shard, tensors in found.items() for name in tensors}
    if listed != present:
        odd = sorted(f"{name} ({shard})" for name, shard in listed ^ present)
        raise ValueError(f"{index} and its files disagree about: {', '.join(odd)}.")
    return {name: found[shard][name] for name, shard in weight_map.items()}


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if all(isinstance(shard, str) for shard in weight_map.values()):
            return weight_map
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f'{index} must be a JSON object with {{"weight_map": {{tensor: file}}}}.')


def _shard(directory: Path, shard: str) -> Path:
    if shard in ("", ".", "..") or "/" in shard or "\\" in shard or os.path.isabs(shard):
        raise ValueError(
            f"The index of {directory} names {shard!r}: only plain file names are read."
        )
    file = directory / shard
    if not file.is_file():
        raise ValueError(f"The index of {directory} names {shard!r}, which is not there.")
    if not any(file.resolve().is_relative_to(root) for root in _roots(directory)):
        raise ValueError(
            f"{file} is a link to {file.resolve()}, outside its directory: copy the file there."
        )
    return file


def _roots(directory: Path) -> list[Path]:
    """The directory, and for a snapshot of the hub's cache the blobs that it links to."""
    here = directory.resolve()
    blobs = [here.parent.parent / "blobs"] if here.parent.name == "snapshots" else []
    return [here, *blobs]
