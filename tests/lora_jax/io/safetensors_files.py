"""Safetensors files put together byte by byte, as hostile as the format lets one be."""

import json
import random
import re
import struct

U64 = struct.Struct("<Q").pack


def file_of(header: dict | str | bytes, data: bytes = bytes(8), *, length: int | None = None):
    """The bytes of a file; ``length`` is what it says of its header."""
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return U64(len(header) if length is None else length) + header + data


def place(dtype: object = "F32", shape: tuple = (2,), begin: object = 0, end: object = 8) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def empty_tensors(count: int) -> bytes:
    """A header of tensors without elements."""
    member = '"%x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return b"{" + ",".join(member % i for i in range(count)).encode() + b"}"


PLAIN = {
    "__metadata__": {"format": "pt"},
    "a.weight": place(shape=(2, 3), end=24),
    "b/é": place("BF16", (5,), 24, 34),
    "c": place("I64", (), 34, 42),
    "d": place("U8", (0, 7), 42, 42),
    "e": place("F16", (1, 1, 3), 42, 48),
}
PLAIN_DATA = bytes(range(48))

_NAMES = ["x", "", "a.weight", "__metadata__", "../x", "/x", "a\0", "\n", "é" * 2000, "a..b"]
_NUMBERS = [-1, -0.0, 0, 1, 2, 7, 8, 24, 48, 2**32, 2**63, 2**64, 10**30, 1.0, True, None, "8", [8]]
_DTYPES = [
    "F32",
    "I32",
    "U32",
    "F64",
    "C64",
    "BF16",
    "I16",
    "BOOL",
    "I8",
    "F4",
    "F8_E4M3",
    "x",
    None,
]
_TOKENS = [
    *("-1", "-0", "01", "1e2", "1.0", "NaN", "true", "null", '"x"', '"\\ud800"', '"\\u0061"', "[]"),
    *("[[]]", "{}", '{"x":{}}', "{", "}", "[", "]", ",", ":", " ", "\n", "\\", '"', "\0", "é"),
    *("[" * 900, '"shape":', '"__metadata__":', '"c":{"dtype":"I64","shape":[],'),
]


def mutated(rng: random.Random) -> bytes:
    """The plain file with something other: a field, a member, or any of its bytes."""
    members = json.loads(json.dumps(list(PLAIN.items())))
    kinds = rng.choices((_other_member, _other_text, _other_bytes), (6, 3, 1), k=1)
    if kinds == [_other_member]:
        _other_member(members, rng)
    write = json.JSONEncoder(ensure_ascii=rng.random() < 0.5).encode
    text = "{" + ",".join(f"{write(name)}:{write(value)}" for name, value in members) + "}"
    if kinds == [_other_text]:
        text = _other_text(text, rng)
    text += rng.choice(("", "", "", "   ", "\n"))
    data = file_of(text.encode("utf-8", "surrogatepass"), PLAIN_DATA)
    return _other_bytes(data, rng) if kinds == [_other_bytes] else data


def _other_member(members: list, rng: random.Random) -> None:
    at = rng.randrange(len(members))
    name, value = members[at]
    edit = rng.randrange(8)
    if edit == 0:
        members.insert(rng.randrange(len(members)), [name, value])
    elif edit == 1:
        del members[at]
    elif edit == 2:
        members[at][0] = rng.choice(_NAMES)
    elif edit == 3:
        members[at], members[0] = members[0], members[at]
    elif edit == 4:
        value[rng.choice(("dtype", "shape", "data_offsets", "x"))] = rng.choice(_NUMBERS)
    elif "dtype" not in value:
        value["format"] = rng.choice(_NUMBERS)
    elif edit == 5:
        value["dtype"] = rng.choice(_DTYPES)
    elif edit == 6:
        numbers = value[rng.choice(("shape", "data_offsets"))]
        numbers[rng.randrange(len(numbers) + 1) :] = rng.choices(_NUMBERS, k=rng.randrange(3))
    else:
        rng.shuffle(value["shape"])
        value["shape"] += [1] * rng.choice((0, 1, 9))


def _other_text(text: str, rng: random.Random) -> str:
    pieces = re.findall(r'"[^"]*"|\d+|\s+|.', text)
    at = rng.randrange(len(pieces))
    pieces[at] = rng.choice((rng.choice(_TOKENS), rng.choice(pieces), "", pieces[at] * 2))
    return "".join(pieces)


def _other_bytes(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(8) if rng.random() < 0.3 else rng.randrange(len(data))
    new = rng.choice((b"", rng.randbytes(1), rng.randbytes(1), rng.randbytes(5)))
    return data[:at] + new + data[at + rng.randrange(3) :]
