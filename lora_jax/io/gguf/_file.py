"""The weights of a GGUF file: found by our own reading of the header, decoded when asked for.

Blocks are decoded by the ``gguf`` package: ``pip install 'lora_jax[gguf]'``. It is given the
bytes of one tensor at a time, after our own reading of the header has found them in the file.
"""

import math
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from lora_jax.io.gguf._architectures import architecture_of
from lora_jax.io.gguf._config import config_of
from lora_jax.io.gguf._header import Header, Stored, read_header
from lora_jax.io.gguf._names import ROPE_FACTORS, Restore, published_names, restoring


class GgufTensor(NamedTuple):
    """A tensor in a GGUF file, not read yet.

    Attributes:
        file: The file.
        name: As published.
        shape: As published.
        dtype: Of what `read` gives: always ``"F32"``.
        encoding: How the file has it, such as ``"Q4_1"``.
        stored: Where the file has it.
        restore: From GGUF's layout to the published one.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str
    stored: Stored
    restore: Restore

    def read(self) -> np.ndarray:
        """Its values, float32.

        Raises:
            ValueError: The file was cut short since its header was read, or its values are not
                finite: no model is so, and a damaged block is.
        """
        values = _decoded(self.file, self.stored)
        if not np.isfinite(values).all():
            raise ValueError(f"{self.file}: {self.name} is not finite: fetch the file again.")
        return np.ascontiguousarray(self.restore(values))


def read_config_json(file: Path) -> dict[str, Any]:
    """The fields of the ``config.json`` that the model was published with.

    Raises:
        ValueError: The file is damaged, or its model is none that is known here: the keys that
            are not honoured, in one list.
    """
    return _config_json(read_header(file))


def find_tensors(file: Path) -> dict[str, GgufTensor]:
    """The weights of a GGUF file by their published names; their values are not read.

    Raises:
        ValueError: The file is damaged, has an encoding that ``gguf`` does not decode, or has
            tensors that are not the model's; or ``gguf`` is not installed.
    """
    header = read_header(file)
    architecture, _ = architecture_of(header)
    config_json = _config_json(header)
    _check_extents(header)
    found = {}
    for name, own in published_names(header, architecture).items():
        stored = header.tensors[own]
        restore = restoring(own, architecture, config_json)
        shape = stored.shape[::-1] if restore is np.transpose else stored.shape
        encoding = _package().GGMLQuantizationType(stored.kind).name
        found[name] = GgufTensor(file, name, shape, "F32", encoding, stored, restore)
    return found


def _config_json(header: Header) -> dict[str, Any]:
    factors = header.tensors.get(ROPE_FACTORS)
    if factors is None:
        return config_of(header, None)
    _check_extents(header)
    return config_of(header, _decoded(header.file, factors).reshape(-1))


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            "Weights of a GGUF file are decoded by gguf: pip install 'lora_jax[gguf]'."
        ) from error
    return gguf


def _block(kind: int) -> tuple[int, int]:
    """Values and bytes in a block of an encoding.

    Raises:
        ValueError: The package does not know it, or does not decode it.
    """
    gguf = _package()
    try:
        encoding = gguf.GGMLQuantizationType(kind)
        values, size = gguf.GGML_QUANT_SIZES[encoding]
        gguf.dequantize(np.zeros((1, size), np.uint8), encoding)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"encoding {kind} is not decoded by gguf ({error})") from error
    return values, size


def _check_extents(header: Header) -> None:
    """Refuses tensors that are not wholly in the file, or share bytes."""
    blocks = {}
    for kind in {stored.kind for stored in header.tensors.values()}:
        try:
            blocks[kind] = _block(kind)
        except ValueError as error:
            names = [name for name, stored in header.tensors.items() if stored.kind == kind]
            raise ValueError(f"{header.file}: {error}: {', '.join(names[:5])}.") from error
    end, before = 0, ""
    for name, stored in sorted(header.tensors.items(), key=lambda item: item[1].offset):
        values, size = blocks[stored.kind]
        if stored.shape[-1] % values:
            raise ValueError(f"{header.file}: {name} has rows that are not whole blocks.")
        if stored.offset < end:
            raise ValueError(f"{header.file}: {name} and {before} share bytes.")
        end, before = stored.offset + math.prod(stored.shape) // values * size, name
        if end > header.size:
            raise ValueError(
                f"{header.file}: {name} ends at byte {end} of {header.size}: the file is cut "
                "short or damaged; fetch it again."
            )


def _decoded(file: Path, stored: Stored) -> np.ndarray:
    """A tensor's values as GGUF lays them out."""
    gguf = _package()
    values, size = _block(stored.kind)
    *rows, columns = stored.shape
    count = math.prod(stored.shape) // values * size
    with file.open("rb") as opened:
        opened.seek(stored.offset)
        data = opened.read(count)
    if len(data) != count:
        raise ValueError(f"{file} was cut short while it was read.")
    blocks = np.frombuffer(data, np.uint8).reshape(*rows, columns // values * size)
    with np.errstate(all="ignore"):  # a damaged scale may be infinite; who reads it looks
        values = gguf.dequantize(blocks, gguf.GGMLQuantizationType(stored.kind))
    return values.astype(np.float32, copy=False)
