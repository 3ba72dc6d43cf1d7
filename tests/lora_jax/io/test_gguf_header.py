"""Damaged and hostile GGUF files: one kind of error, and no memory for what is not there."""

import random
import struct
import tracemalloc

import numpy as np
import pytest

from lora_jax.io.gguf import find_tensors
from lora_jax.io.gguf._header import MAX_ELEMENTS, read_header
from tests.lora_jax.io import gguf_files

MUTATIONS = 1000
U32, U64 = struct.Struct("<I").pack, struct.Struct("<Q").pack


def text(value: bytes) -> bytes:
    return U64(len(value)) + value


def file_of(*parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + U32(version) + U64(tensors) + U64(keys) + b"".join(parts)


def tensor(name: bytes, shape: tuple[int, ...], *, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + U32(len(shape)) + b"".join(map(U64, shape)) + U32(kind) + U64(offset)


KEY = text(b"general.alignment") + U32(4)
HUGE = 2**63
HOSTILE = {
    "empty": (b"", "4 bytes are wanted at byte 0"),
    "no-magic": (b"GGML" + bytes(64), "starts with b'GGML'"),
    "version-1": (file_of(version=1), "version is 1"),
    "big-endian": (file_of(version=3 << 24), "big-endian"),
    "tensors": (file_of(tensors=HUGE), "announces 9223372036854775808 tensors"),
    "keys": (file_of(keys=HUGE), "and 9223372036854775808 keys"),
    "tensors-without-room": (file_of(bytes(64), tensors=99), "99 items of 24 bytes"),
    "keys-without-room": (file_of(bytes(64), keys=99), "99 items of 13 bytes"),
    "key-s-name": (file_of(U64(HUGE) + bytes(64), keys=1), "9223372036854775808 bytes are wanted"),
    "not-utf-8": (file_of(text(b"\xff") + bytes(64), keys=1), "can't decode byte 0xff"),
    "string": (file_of(text(b"k") + U32(8) + U64(HUGE) + bytes(64), keys=1), "bytes are wanted"),
    "type": (file_of(text(b"k") + U32(13) + bytes(64), keys=1), "'k' is of type 13"),
    "bool": (file_of(text(b"k") + U32(7) + b"\2" + bytes(9), keys=1), "neither 0 nor 1"),
    "array-count": (
        file_of(text(b"k") + U32(9) + U32(0) + U64(HUGE) + bytes(64), keys=1),
        f"more than {MAX_ELEMENTS}",
    ),
    "array-without-room": (
        file_of(text(b"k") + U32(9) + U32(8) + U64(999) + bytes(64), keys=1),
        "999 items of 8 bytes",
    ),
    "array-of-arrays": (
        file_of(text(b"k") + U32(9) + U32(9) + U64(1) + bytes(64), keys=1),
        "'k' is of type 9",
    ),
    "key-twice": (file_of(*2 * [KEY + U32(32)], keys=2), "'general.alignment' is there twice"),
    "alignment-zero": (file_of(KEY + U32(0), keys=1), "not a power of two"),
    "alignment-odd": (file_of(KEY + U32(48), keys=1), "not a power of two"),
    "tensor-twice": (
        file_of(*2 * [tensor(b"t", (8,))], bytes(64), tensors=2),
        "'t' is there twice",
    ),
    "axes": (file_of(text(b"t") + U32(2**31) + bytes(64), tensors=1), "has 2147483648 axes"),
    "no-axes": (file_of(text(b"t") + U32(0) + bytes(64), tensors=1), "has 0 axes"),
    "empty-axis": (file_of(tensor(b"t", (8, 0)), bytes(64), tensors=1), "an axis is empty"),
    "far": (file_of(tensor(b"t", (8,), offset=HUGE), bytes(64), tensors=1), "cut short"),
    "unaligned": (file_of(tensor(b"t", (8,), offset=4), bytes(64), tensors=1), "steps of 32"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_header_that_lies_is_refused(tmp_path, case):
    data, match = HOSTILE[case]
    file = tmp_path / "m.gguf"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=match):
        read_header(file)


def with_tensors(file, **places):
    """The tiny model with tensors' kinds, shapes or offsets rewritten in its header."""
    data = gguf_files.llama(file).read_bytes()
    for name, place in places.items():
        at = data.index(text(name.replace("__", ".").encode() + b".weight"))
        at += 8 + len(name.replace("__", ".")) + len(".weight")
        axes = struct.unpack_from("<I", data, at)[0]
        new = tensor(b"", place["shape"], kind=place["kind"], offset=place["offset"])[8:]
        assert len(place["shape"]) == axes
        data = data[:at] + new + data[at + len(new) :]
    file.write_bytes(data)
    return file


@pytest.mark.parametrize(
    ("place", "match"),
    [
        pytest.param({"shape": (2**40,)}, "ends at byte .* the file is cut short", id="size"),
        pytest.param({"shape": (2**63,)}, "ends at byte .* the file is cut short", id="overflow"),
        pytest.param({"offset": 0}, "share bytes", id="overlap"),
        pytest.param({"kind": 5}, "encoding 5 is not decoded", id="removed-encoding"),
        pytest.param({"kind": 24}, "encoding 24 is not decoded.*output_norm", id="integers"),
        pytest.param({"kind": 2, "shape": (33,)}, "not whole blocks", id="part-of-a-block"),
    ],
)
def test_a_tensor_that_cannot_be_there_is_refused(tmp_path, place, match):
    file = gguf_files.llama(tmp_path / "whole.gguf")
    header = read_header(file)
    first = min(stored.offset for stored in header.tensors.values())
    offset = header.tensors["output_norm.weight"].offset - first
    place = {"shape": (64,), "kind": 0, "offset": offset, **place}
    with pytest.raises(ValueError, match=match):
        find_tensors(with_tensors(tmp_path / "m.gguf", output_norm=place))


def test_a_file_cut_short_after_its_header_was_read(tmp_path):
    file = gguf_files.llama(tmp_path / "m.gguf")
    found = find_tensors(file)
    file.write_bytes(file.read_bytes()[: found["model.norm.weight"].stored.offset])
    with pytest.raises(ValueError, match="was cut short while it was read"):
        found["model.norm.weight"].read()


def mutated(data: bytes, header: int, rng: random.Random) -> bytes:
    """Bytes flipped, numbers overwritten by large or small ones, or the end cut off."""
    changed = bytearray(data)
    kind = rng.choice(["flip", "number", "cut"])
    if kind == "cut":
        return data[: rng.randrange(len(data))]
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(header)
        if kind == "flip":
            changed[at] ^= 1 << rng.randrange(8)
        else:
            number = rng.choice([0, 1, 2**31, 2**32 - 1, 2**48, HUGE, 2**64 - 1])
            changed[at : at + 8] = U64(number)
    return bytes(changed)


@pytest.mark.filterwarnings("error")
def test_mutated_headers_are_read_or_refused(tmp_path):
    """Nothing but a ValueError comes out, and no mutation makes the reader hold much."""
    whole = gguf_files.llama(tmp_path / "whole.gguf", encoding="Q4_1")
    data = whole.read_bytes()
    header = min(stored.offset for stored in read_header(whole).tensors.values())
    find_tensors(whole)  # imports and tables that the decoder keeps
    rng = random.Random(0)
    file, refused = tmp_path / "m.gguf", 0
    tracemalloc.start()
    try:
        for _ in range(MUTATIONS):
            file.write_bytes(mutated(data, header, rng))
            try:
                find_tensors(file)
            except ValueError:
                refused += 1
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert MUTATIONS // 2 < refused < MUTATIONS
    # 266 tokens and 20 tensors take 0.2 MB; a count that is
    # believed without its bytes takes 2**31 bytes or more.
    assert peak < 4 * 2**20


def test_a_damaged_block_is_refused(tmp_path):
    file = gguf_files.llama(tmp_path / "m.gguf", encoding="Q4_1")
    found = find_tensors(file)["model.layers.0.mlp.up_proj.weight"]
    data = bytearray(file.read_bytes())
    data[found.stored.offset : found.stored.offset + 2] = np.float16(np.inf).tobytes()
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj.weight is not finite"):
        found.read()
