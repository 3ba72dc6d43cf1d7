"""The header of a GGUF file, every number in it checked before it is believed.

magic, version, counts | (key, type, value) ... | (name, axes, type, offset) ... | padding | data

A count is believed only where the bytes left in the file have room for what it counts, so a
damaged or hostile file is an error and never an allocation. The layout is that of versions 2
and 3, little-endian (github.com/ggml-org/ggml, docs/gguf.md).
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

MAX_HEADER = 256 << 20  # bytes; the header of a 262144-token vocabulary has about 16 MB
MAX_TENSORS = 100_000
MAX_KEYS = 100_000
MAX_ELEMENTS = 4_000_000  # of all arrays together; such a vocabulary has 1.3 million
MAX_AXES = 4  # as ggml has

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q"}
_SCALARS[12] = "d"
_SMALLEST_KEY = 8 + 4 + 1  # the length of its name, its type, one byte of value
_SMALLEST_TENSOR = 8 + 4 + 4 + 8  # the length of its name, count of axes, type, offset


class Stored(NamedTuple):
    """Where a tensor is.

    Attributes:
        shape: Slowest axis first, as in numpy; the file lists them the other way round.
        kind: The number of its encoding, as `gguf.GGMLQuantizationType` has it.
        offset: Of its first byte, from the start of the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


class Header(NamedTuple):
    """What a file says of itself.

    Attributes:
        file: The file.
        metadata: Key to value: numbers, bools, strings and lists of these.
        tensors: Name to place, as the file names them.
        size: Bytes in the file.
    """

    file: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    size: int


def read_header(file: Path) -> Header:
    """Reads metadata and the list of tensors; no tensor's values.

    Raises:
        ValueError: The file is not a whole GGUF file of a version that is known.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            return _header(file, _Cursor(opened, min(size, MAX_HEADER)), size)
    except ValueError as error:
        raise ValueError(f"{file} is not a GGUF file that can be read: {error}") from error


class _Cursor:
    """Reads forward, and never more than what is left of the file."""

    def __init__(self, opened: BinaryIO, limit: int):
        self._opened = opened
        self.position = 0
        self.left = limit
        self.elements = MAX_ELEMENTS

    def read(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(
                f"{count} bytes are wanted at byte {self.position}, where {self.left} are left."
            )
        data = self._opened.read(count)
        if len(data) != count:
            raise ValueError(f"it ended at byte {self.position + len(data)} while it was read.")
        self.position += count
        self.left -= count
        return data

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        self.room(count, struct.calcsize(f"<{code}"))
        layout = f"<{count}{code}"
        return struct.unpack(layout, self.read(struct.calcsize(layout)))

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def string(self) -> str:
        return self.read(self.number("Q")).decode("utf-8")

    def room(self, count: int, each: int) -> None:
        """Refuses a count of things of ``each`` bytes at least that cannot be there."""
        if count * each > self.left:
            raise ValueError(
                f"{count} items of {each} bytes are announced at byte {self.position}, where "
                f"{self.left} bytes are left."
            )


def _header(file: Path, cursor: _Cursor, size: int) -> Header:
    _check_version(cursor)
    tensor_count, key_count = cursor.numbers("Q", 2)
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
        raise ValueError(
            f"it announces {tensor_count} tensors and {key_count} keys; at most {MAX_TENSORS} and "
            f"{MAX_KEYS} are read."
        )
    cursor.room(key_count, _SMALLEST_KEY)
    metadata = _without_twins(_pair(cursor) for _ in range(key_count))
    cursor.room(tensor_count, _SMALLEST_TENSOR)
    places = _without_twins(_place(cursor) for _ in range(tensor_count))
    alignment = _alignment(metadata)
    start = -(-cursor.position // alignment) * alignment
    tensors = {n: _from_start(n, t, start, alignment, size) for n, t in places.items()}
    return Header(file, metadata, tensors, size)


def _check_version(cursor: _Cursor) -> None:
    if (magic := cursor.read(4)) != b"GGUF":
        raise ValueError(f"it starts with {magic!r}, not with b'GGUF'.")
    version = cursor.number("I")
    if version not in (2, 3):
        end = " It is big-endian: convert it." if version and version % 65536 == 0 else ""
        raise ValueError(f"its version is {version}; 2 and 3 are read.{end}")


def _without_twins(pairs: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice.")
        found[name] = value
    return found


def _pair(cursor: _Cursor) -> tuple[str, Any]:
    name = cursor.string()
    kind = cursor.number("I")
    return name, (_array(cursor, name) if kind == _ARRAY else _values(cursor, name, kind, 1)[0])


def _array(cursor: _Cursor, name: str) -> list[Any]:
    kind = cursor.number("I")
    count = cursor.number("Q")
    if count > cursor.elements:
        raise ValueError(
            f"the arrays up to {name!r} have more than {MAX_ELEMENTS} elements in all."
        )
    cursor.elements -= count
    return _values(cursor, name, kind, count)


def _values(cursor: _Cursor, name: str, kind: int, count: int) -> list[Any]:
    if kind == _STRING:
        cursor.room(count, 8)
        return [cursor.string() for _ in range(count)]
    if kind not in _SCALARS:
        raise ValueError(f"{name!r} is of type {kind}, which is not known here.")
    values = list(cursor.numbers(_SCALARS[kind], count))
    if kind != _BOOL:
        return values
    if any(value > 1 for value in values):
        raise ValueError(f"{name!r} is a bool that is neither 0 nor 1.")
    return [bool(value) for value in values]


def _place(cursor: _Cursor) -> tuple[str, Stored]:
    name = cursor.string()
    axes = cursor.number("I")
    if not 1 <= axes <= MAX_AXES:
        raise ValueError(f"tensor {name!r} has {axes} axes; 1 to {MAX_AXES} are read.")
    shape = cursor.numbers("Q", axes)[::-1]
    if 0 in shape:
        raise ValueError(f"tensor {name!r} has shape {shape}: an axis is empty.")
    kind = cursor.number("I")
    return name, Stored(shape, kind, cursor.number("Q"))


def _alignment(metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not (type(alignment) is int and alignment > 0 and alignment & (alignment - 1) == 0):
        raise ValueError(f"'general.alignment' is {alignment!r}, not a power of two.")
    return alignment


def _from_start(name: str, place: Stored, start: int, alignment: int, size: int) -> Stored:
    offset = start + place.offset
    if place.offset % alignment or offset >= size:
        raise ValueError(
            f"tensor {name!r} starts at byte {offset} of {size}, counted in steps of {alignment}: "
            "the file is damaged or cut short."
        )
    return place._replace(offset=offset)
