"""Safetensors files: read, their headers first and their tensors when asked; and written.

A tensor is read from where the header has it: to open the file with the safetensors library would
parse the header once more for every tensor.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from lora_jax.io._header import read_header
from lora_jax.io._inside import checked_file
from lora_jax.io._json import read_object

FLOATS = ("F16", "BF16", "F32", "F64")
SUFFIX = ".safetensors"

_DTYPES: Mapping[str, Any] = {
    **{"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64},
    **{"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64},
    **{"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "U64": np.uint64},
    **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2},
    **{"BOOL": np.bool_, "C64": np.complex64},
}


class Tensor(NamedTuple):
    """A tensor in a file, not read yet.

    Attributes:
        file: The file.
        name: What the file calls it.
        shape: Its shape.
        dtype: As the file spells it: ``"F32"``.
        start: Its first byte, counted from the start of the file.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int

    def read(self) -> np.ndarray:
        """Its values, as stored.

        Raises:
            ValueError: Its dtype is none that is read, or the file was cut short since its
                header was read.
        """
        if self.dtype not in _DTYPES:
            raise ValueError(f"{self.file}: {self.name} is {self.dtype}, which is not read.")
        dtype = np.dtype(_DTYPES[self.dtype])
        size = math.prod(self.shape) * dtype.itemsize
        with self.file.open("rb") as opened:
            opened.seek(self.start)
            data = np.fromfile(opened, np.uint8, size)
        if len(data) != size:
            raise ValueError(f"{self.file} was cut short while it was read: fetch it again.")
        return data.view(dtype).reshape(self.shape)


def tensors_in(file: Path) -> dict[str, Tensor]:
    """The tensors that a file's header lists.

    Raises:
        ValueError: The file is not a whole safetensors file.
    """
    return {
        name: Tensor(file, name, stored.shape, stored.dtype, stored.start)
        for name, stored in read_header(file).tensors.items()
    }


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
        more = f" and {len(odd) - 20} more" if len(odd) > 20 else ""
        raise ValueError(f"{index} and its files disagree about: {', '.join(odd[:20])}{more}.")
    return {name: found[shard][name] for name, shard in weight_map.items()}


def _weight_map(index: Path) -> Mapping[str, str]:
    weight_map = read_object(index).get("weight_map")
    if isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values()):
        return weight_map
    raise ValueError(f'{index} must be a JSON object with {{"weight_map": {{tensor: file}}}}.')


def _shard(directory: Path, shard: str) -> Path:
    try:
        file = checked_file(directory, shard)
    except ValueError as error:
        raise ValueError(f"The index of {directory} names {shard!r:.200}: {error}") from error
    if file.suffix != SUFFIX:
        raise ValueError(
            f"The index of {directory} names {shard!r:.200}: only {SUFFIX} files are read."
        )
    return file
