"""The header of a safetensors file, every number in it checked before it is believed.

length, 8 bytes | {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...} | data

A pattern cuts the header into its members and is given no more bytes than the file has; a member
is parsed only if it is small. So a hostile header costs its own bytes, a copy of its largest
member, and what is given back. The format: github.com/huggingface/safetensors, section "Format".
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lora_jax.io._json import without_twins

MAX_HEADER = 16 << 20  # bytes; a shard of 10,000 tensors has about 1 MB
MAX_TENSORS = 100_000
MAX_AXES = 8
MAX_NOTES = 1 << 20  # bytes of ``__metadata__``
MAX_MEMBER = 1_000  # bytes of a tensor's name, and of what stands for it
MAX_NUMBER = 2**63 - 1  # bytes of a tensor, or places along its axes

BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}
"""Bits of an element of every dtype that the format has."""

_NOTES = "__metadata__"
_KEYS = {"dtype", "shape", "data_offsets"}

# Possessive repeats of what begins unlike what follows: no way back, so no memory for one.
_SPACE = rb"[ \t\n\r]*+"
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_FLAT = rb'\{[^"{}]*+(?:' + _STRING + rb'[^"{}]*+)*+\}'  # an object with none inside
_MEMBER = re.compile(
    _SPACE.join((b"", b"(" + _STRING + b")", b":", b"(" + _FLAT + b")", b"([,}])")), re.DOTALL
)
_EMPTY = re.compile(rb"\{ *+\} *+")


class Stored(NamedTuple):
    """Where a tensor is.

    Attributes:
        dtype: As the file spells it: ``"F32"``.
        shape: Its shape.
        start: Its first byte, counted from the start of the file.
        end: The byte after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Header(NamedTuple):
    """What a file says of itself.

    Attributes:
        notes: Its ``__metadata__``.
        tensors: Name to place.
    """

    notes: Mapping[str, str]
    tensors: Mapping[str, Stored]


def read_header(file: Path) -> Header:
    """Reads the list of tensors; no tensor's values.

    Raises:
        ValueError: It is not a whole safetensors file, or its header has a name twice, tensors
            that overlap, leave a hole or end elsewhere than the file does, or more of anything
            than is read.
    """
    try:
        with file.open("rb") as opened:
            return _header(opened, os.fstat(opened.fileno()).st_size)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} is not a complete safetensors file that can be read ({error}): fetch it "
            "again, or ask whoever made it."
        ) from error


def _header(opened: BinaryIO, size: int) -> Header:
    raw = _raw(opened, size)
    start, notes, tensors = 8 + len(raw), None, {}
    for quoted, value in _members(raw):
        name = _parsed(quoted, MAX_MEMBER)
        if name in tensors or (name == _NOTES and notes is not None):
            raise ValueError(f"{name!r} is there twice")
        if name == _NOTES:
            notes = _notes(_parsed(value, MAX_NOTES))
            continue
        _check_name(name)
        if len(tensors) == MAX_TENSORS:
            raise ValueError(f"it has more than {MAX_TENSORS} tensors")
        tensors[name] = _stored(name, _parsed(value, MAX_MEMBER), start)
    _check_places(tensors, start, size)
    return Header(notes or {}, tensors)


def _raw(opened: BinaryIO, size: int) -> bytes:
    """The header's text, with its padding."""
    if size < 8:
        raise ValueError(f"it has {size} bytes, and the length of its header alone takes 8")
    length = int.from_bytes(opened.read(8), "little")
    if length > size - 8:
        raise ValueError(f"its header would have {length} bytes, and {size - 8} are left")
    if length > MAX_HEADER:
        raise ValueError(f"its header has {length} bytes; at most {MAX_HEADER} are read")
    raw = opened.read(length)
    if len(raw) != length:
        raise ValueError("it was cut short while it was read")
    return raw


def _members(raw: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Every name in the header, in its quotes, with the object that it stands for."""
    if _EMPTY.fullmatch(raw):
        return
    if not raw.startswith(b"{"):
        raise ValueError("its header does not begin with '{'")
    at, after = 1, b","
    while after == b",":
        member = _MEMBER.match(raw, at)
        if member is None:
            found = raw[at : at + 40]
            raise ValueError(f"byte {8 + at}, {found!r}, does not begin a name and its object")
        name, value, after = member.groups()
        yield name, value
        at = member.end()
    if not re.compile(rb" *+").fullmatch(raw, at):
        raise ValueError(f"something follows its header's last brace, at byte {8 + at}")


def _parsed(raw: bytes, most: int) -> Any:
    if len(raw) > most:
        raise ValueError(f"{raw[:40]!r}... has {len(raw)} bytes; at most {most} are read")
    return _DECODER.decode(raw.decode("utf-8"))


def _whole(text: str) -> int:
    number = int(text)
    if text.startswith("-") or number > MAX_NUMBER:
        raise ValueError(f"{text[:40]} is neither a size nor an offset")
    return number


def _no_number(text: str) -> Any:
    raise ValueError(f"{text[:40]} is neither a size nor an offset")


_DECODER = json.JSONDecoder(
    object_pairs_hook=without_twins,
    parse_int=_whole,
    parse_float=_no_number,
    parse_constant=_no_number,
)


def _notes(found: Mapping[str, Any]) -> dict[str, str]:
    for name, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f"{_NOTES} gives {name!r} something else than text")
        (name + value).encode("utf-8")  # half of a surrogate pair is no text
    return dict(found)


def _check_name(name: str) -> None:
    parts = re.split(r"[/\\]", name)
    if not name.isprintable() or ".." in parts or (len(parts) > 1 and not parts[0]):
        raise ValueError(f"{name!r} is no name of a tensor")


def _stored(name: str, found: Mapping[str, Any], data: int) -> Stored:
    """Where a tensor is in a file whose data begin at byte ``data``."""
    if found.keys() != _KEYS:
        raise ValueError(f"{name!r} has the fields {sorted(found)}, not {sorted(_KEYS)}")
    dtype, shape, offsets = found["dtype"], found["shape"], found["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{name!r} is of dtype {dtype!r:.80}, which is not known")
    if not (_are_whole(shape) and _are_whole(offsets) and len(offsets) == 2):
        raise ValueError(f"{name!r} has the shape {shape!r:.80} and the offsets {offsets!r:.80}")
    if len(shape) > MAX_AXES:
        raise ValueError(f"{name!r} has {len(shape)} axes; at most {MAX_AXES} are read")
    if math.prod(axis or 1 for axis in shape) * 8 > MAX_NUMBER:  # no array has such a shape
        raise ValueError(f"{name!r} has the shape {shape}, larger than any memory")
    begin, end = offsets
    if math.prod(shape) * BITS[dtype] != (end - begin) * 8:
        raise ValueError(
            f"{name!r} is {dtype} of shape {tuple(shape)}, and has the bytes {begin} to {end}"
        )
    return Stored(dtype, tuple(shape), data + begin, data + end)


def _are_whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(number) is int for number in numbers)


def _check_places(tensors: Mapping[str, Stored], start: int, size: int) -> None:
    """Refuses tensors that do not fill the data, one after another."""
    at = start
    for name in sorted(tensors, key=lambda name: tensors[name][2:]):
        if tensors[name].start != at:
            raise ValueError(
                f"{name!r} begins at byte {tensors[name].start}, where byte {at} is the next: "
                "tensors overlap or leave a hole"
            )
        at = tensors[name].end
    if at != size:
        raise ValueError(f"its tensors end at byte {at}, and it has {size}")
