"""Files that others made to do harm: refused in words, at little cost, and never executed."""

import json
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from lora_jax.io import load_adapter
from lora_jax.io._checkpoint_writer import write_checkpoint
from lora_jax.io._header import MAX_HEADER, MAX_TENSORS, read_header
from lora_jax.io._json import MAX_BYTES, read_object
from lora_jax.io._safetensors import FLOATS, tensors_in
from lora_jax.io.hugging_face import find_tensors
from lora_jax.io.names import NameTable, Row, expand
from lora_jax.io.peft import _parts
from lora_jax.io.tokenizers import load_tokenizer
from lora_jax.models import from_pretrained
from tests.lora_jax.generation import toys
from tests.lora_jax.io.safetensors_files import (
    PLAIN,
    PLAIN_DATA,
    empty_tensors,
    file_of,
    mutated,
    place,
)
from tests.references.checkpoints import checkpoint, config_json, write

TASK = "sequence-classification"
MUTATIONS = int(os.environ.get("LORA_JAX_FUZZ", "10000"))
MIB = 1 << 20

A = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
HOSTILE = {
    "empty": (b"", "has 0 bytes"),
    "length-cut": (b"\x02\0\0", "has 3 bytes"),
    "length-huge": (file_of("{}", length=2**64 - 1), "would have 18446744073709551615 bytes"),
    "length-beyond": (file_of("{}", b"", length=3), "would have 3 bytes, and 2 are left"),
    "length-zero": (file_of("{}", length=0), "does not begin with '{'"),
    "length-short": (file_of(f"{{{A}}}", length=20), "byte 9, .* does not begin a name"),
    "header-large": (file_of(b"{" + b" " * MAX_HEADER + b"}"), "at most 16777216 are read"),
    "begin-negative": (file_of({"a": place(begin=-8, end=0)}), "-8 is neither a size nor"),
    "end-before-begin": (file_of({"a": place(begin=8, end=0)}), "has the bytes 8 to 0"),
    "offset-true": (file_of({"a": place(begin=False)}), r"the offsets \[False, 8\]"),
    "offset-float": (file_of({"a": place(end=8.0)}), "8.0 is neither a size nor"),
    "offset-infinite": (file_of({"a": place(end=float("inf"))}), "Infinity is neither"),
    "offset-text": (file_of({"a": place(end="8")}), r"the offsets \[0, '8'\]"),
    "offset-missing": (file_of(f"{{{A.replace('0,8', '8')}}}"), r"the offsets \[8\]"),
    "overlap": (file_of({"a": place(), "b": place(begin=4, end=12)}, bytes(12)), "overlap or"),
    "shared": (file_of({"a": place(), "b": place()}), "overlap or leave a hole"),
    "hole": (file_of({"a": place(), "b": place(begin=9, end=17)}, bytes(17)), "leave a hole"),
    "hole-at-start": (file_of({"a": place(begin=8, end=16)}, bytes(16)), "leave a hole"),
    "beyond": (file_of({"a": place(shape=(4,), end=16)}), "end at byte .*, and it has"),
    "cut": (file_of({"a": place()}, bytes(7)), "end at byte .*, and it has"),
    "trailing": (file_of({"a": place()}, bytes(9)), "end at byte .*, and it has"),
    "no-tensors-but-data": (file_of("{}", bytes(1)), "end at byte 10, and it has 11"),
    "product": (file_of({"a": place(shape=(3,))}), r"F32 of shape \(3,\), and has the bytes 0"),
    "product-overflow": (file_of({"a": place(shape=(2**62, 4))}), "larger than any memory"),
    "product-hidden": (file_of({"a": place(shape=(0, 2**62, 4), end=0)}, b""), "larger than any"),
    "axis-negative": (file_of({"a": place(shape=(-1, -2))}), "-1 is neither a size nor"),
    "axis-huge": (file_of({"a": place(shape=(10**30,))}), "1000000.* is neither a size nor"),
    "half-a-byte": (file_of({"a": place("F4", (3,), 0, 1)}, bytes(1)), "F4 of shape"),
    "rank-100": (file_of({"a": place(shape=(1,) * 99 + (2,))}), "has 100 axes; at most 8"),
    "dtype": (file_of({"a": place("F31")}), "dtype 'F31', which is not known"),
    "dtype-list": (file_of({"a": place(["F32"])}), r"dtype \['F32'\], which is not known"),
    "field-missing": (file_of({"a": {"dtype": "F32", "shape": [2]}}), "has the fields"),
    "field-more": (file_of({"a": {**place(), "code": "x"}}), "has the fields .'code'"),
    "field-twice": (file_of(f"{{{A[:-1]},{A[5:]}}}"), "'dtype' occurs twice"),
    "tensor-twice": (file_of(f"{{{A},{A}}}"), "'a' is there twice"),
    "tensor-twice-escaped": (file_of(f"{{{A},{A.replace('a', chr(92) + 'u0061', 1)}}}"), "twice"),
    "metadata-twice": (file_of('{"__metadata__":{},"__metadata__":{}}', b""), "there twice"),
    "metadata-number": (file_of({"__metadata__": {"a": 1}}, b""), "'a' something else than text"),
    "metadata-nested": (file_of({"__metadata__": {"a": {}}}, b""), "does not begin a name"),
    "metadata-list": (file_of({"__metadata__": []}, b""), "does not begin a name"),
    "metadata-null": (file_of({"__metadata__": None}, b""), "does not begin a name"),
    "metadata-half": (file_of('{"__metadata__":{"a":"\\ud800"}}', b""), "surrogates"),
    "metadata-large": (file_of({"__metadata__": {"a": "a" * MIB}}, b""), "at most 1048576 are"),
    "list": (file_of("[]", b""), "does not begin with '{'"),
    "number": (file_of("7", b""), "does not begin with '{'"),
    "not-json": (file_of("{a:1}", b""), "does not begin a name"),
    "half": (file_of(f"{{{A}"), "does not begin a name"),
    "comma": (file_of(f"{{{A},}}"), "does not begin a name"),
    "deep": (file_of('{"a":' + '{"a":' * 100_000, b""), "does not begin a name"),
    "deep-list": (file_of('{"a":{"shape":' + "[" * 900 + "]" * 900 + "}}", b""), "at most 1000"),
    "nested-list": (file_of('{"a":{"shape":' + "[" * 480 + "]" * 480 + "}}", b""), "the fields"),
    "not-utf-8": (file_of(b'{"\xff":' + A[4:].encode() + b"}"), "can't decode byte 0xff"),
    "utf-16": (file_of(f"{{{A}}}".encode("utf-16")), "does not begin with '{'"),
    "bom": (file_of(b"\xef\xbb\xbf" + f"{{{A}}}".encode()), "does not begin with '{'"),
    "space-before": (file_of(f" {{{A}}}"), "does not begin with '{'"),
    "text-after": (file_of(f"{{{A}}} {{}}"), "follows its header's last brace"),
    "nul-after": (file_of(f"{{{A}}}\0\0"), "follows its header's last brace"),
    "name-up": (file_of({"../../x": place()}), "'../../x' is no name of a tensor"),
    "name-up-inside": (file_of({"a/../../x": place()}), "is no name of a tensor"),
    "name-up-backslash": (file_of({"a\\..\\x": place()}), "is no name of a tensor"),
    "name-absolute": (file_of({"/etc/x": place()}), "'/etc/x' is no name of a tensor"),
    "name-nul": (file_of({"a\0b": place()}), r"'a\\x00b' is no name of a tensor"),
    "name-escape": (file_of({"\x1b[2J": place()}), r"'\\x1b\[2J' is no name of a tensor"),
    "name-half": (file_of('{"\\ud800":' + A[4:] + "}"), r"'\\ud800' is no name of a tensor"),
    "name-long": (file_of({"a" * 5000: place()}), "has 5002 bytes; at most 1000 are read"),
    "number-long": (file_of({"a": place(end=int("9" * 4000))}), "bytes; at most 1000 are read"),
    "pickle": (b"\x80\x04\x95" + bytes(100), "would have"),
    "zip": (b"PK\x03\x04" + bytes(100), "at most|would have"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_file_that_lies_is_refused(tmp_path, case):
    data, match = HOSTILE[case]
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=match) as caught:
        find_tensors(tmp_path)
    assert str(caught.value).startswith(f"{file} is not a complete safetensors file")
    assert len(str(caught.value)) < 1000


def assert_as_safetensors_reads(file):
    """Names, shapes, dtypes and values are those that the safetensors library reads."""
    ours = tensors_in(file)
    with safe_open(file, framework="numpy") as theirs:
        assert read_header(file).notes == (theirs.metadata() or {})
        assert ours.keys() == set(theirs.keys())
        for name, tensor in ours.items():
            there = theirs.get_slice(name)
            assert (tensor.shape, tensor.dtype) == (tuple(there.get_shape()), there.get_dtype())
            if tensor.dtype in (*FLOATS, "BOOL", "I8", "I16", "I32", "I64", "U8", "U16", "U32"):
                values = theirs.get_tensor(name)
                assert tensor.read().dtype == values.dtype
                assert tensor.read().tobytes() == values.tobytes()


@pytest.mark.parametrize(
    ("header", "data"),
    [
        pytest.param(PLAIN, PLAIN_DATA, id="plain"),
        pytest.param(f"{{{A}}}     ", bytes(8), id="padded"),
        pytest.param(f'{{\n "__metadata__" : {{ }} ,\t{A} }}', bytes(8), id="spaces-inside"),
        pytest.param("{}      ", b"", id="no-tensors"),
        pytest.param({"__metadata__": {"a": '{"}\\"\n\x7f'}}, b"", id="braces-in-metadata"),
        pytest.param({"b": place(begin=8, end=16), "a": place()}, bytes(range(16)), id="any-order"),
        pytest.param({"模型.層": place(), "a..b/c": place(begin=8, end=16)}, bytes(16), id="names"),
        pytest.param({"a": place("F4", (4,), 0, 2)}, bytes(2), id="two-in-a-byte"),
    ],
)
def test_a_file_that_may_look_so_is_read(tmp_path, header, data):
    file = tmp_path / "a.safetensors"
    file.write_bytes(file_of(header, data))
    assert_as_safetensors_reads(file)


def test_what_is_accepted_of_mutated_headers_is_what_safetensors_reads(tmp_path):
    """``LORA_JAX_FUZZ=1000000`` for a million."""
    rng, file, refused, named = random.Random(0), tmp_path / "a.safetensors", 0, 0
    with file.open("wb", buffering=0) as held:  # held open: to open is most of the time
        for _ in range(MUTATIONS):
            held.seek(0)
            held.truncate(held.write(mutated(rng)))
            try:
                tensors_in(file)
            except ValueError as error:
                refused += 1
                named += str(error).startswith(f"{file} is not a complete")
            else:
                assert_as_safetensors_reads(file)
    assert named == refused
    assert MUTATIONS // 2 < refused < MUTATIONS * 19 // 20


BOMBS = {
    "tensors": empty_tensors(290_000),
    "name": b'{"' + b"a" * 15 * MIB + b'":{}}',
    "name-of-escapes": b'{"' + b"\\n" * 7 * MIB + b'":{}}',
    "name-of-one-wide-letter": b'{"' + b"a" * 15 * MIB + "😀".encode() + b'":{}}',
    "shape": b'{"a":{"shape":[' + b"0," * 7 * MIB + b"0]}}",
    "metadata": b'{"__metadata__":{' + b'"":"",' * 2 * MIB + b'"":""}}',
    "metadata-value": b'{"__metadata__":{"a":"' + b"a" * 15 * MIB + '😀"}}'.encode(),
    "lists": b'{"a":{"shape":' + b"[" * 15 * MIB + b"}}",
    "objects": b'{"a":' * 3 * MIB,
    "spaces": b"{" + b" " * 15 * MIB,
}


def peak_of(read):
    """Bytes that Python held at most while ``read`` refused a file."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="is not a complete safetensors file"):
            read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("case", BOMBS)
def test_a_hostile_header_costs_at_most_three_times_its_bytes(tmp_path, case):
    file, header = tmp_path / "a.safetensors", BOMBS[case]
    assert len(header) <= MAX_HEADER
    file.write_bytes(file_of(header, b""))
    assert peak_of(lambda: tensors_in(file)) < 3 * len(header) + MIB


def test_a_million_empty_tensors_are_refused_unread(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(file_of(empty_tensors(1_000_000), b""))
    assert peak_of(lambda: tensors_in(file)) < MIB


def test_what_many_tensors_cost(tmp_path):
    file, header = tmp_path / "a.safetensors", empty_tensors(MAX_TENSORS // 10)
    file.write_bytes(file_of(header, b""))
    tracemalloc.start()
    try:
        count = len(tensors_in(file))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # What is given back is not the header's to bound: a name, a tuple and their place in a dict.
    assert peak < 3 * len(header) + 400 * count


def test_the_number_of_tensors_is_capped(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(file_of(empty_tensors(MAX_TENSORS), b""))
    assert len(tensors_in(file)) == MAX_TENSORS
    file.write_bytes(file_of(empty_tensors(MAX_TENSORS + 1), b""))
    with pytest.raises(ValueError, match="more than 100000 tensors"):
        tensors_in(file)


def test_a_file_cut_short_after_its_header_was_read(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"a": np.zeros(8, np.float32)}, file)
    tensor = tensors_in(file)["a"]
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"a.safetensors was cut short while it was read"):
        tensor.read()


def test_a_dtype_that_numpy_lacks_is_named_when_it_is_read(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes(file_of({"a": place("F4", (4,), 0, 2)}, bytes(2)))
    with pytest.raises(ValueError, match=r"a.safetensors: a is F4, which is not read"):
        tensors_in(file)["a"].read()


def test_values_that_are_not_finite_are_read_as_they_are(tmp_path):
    """A model that diverged is one, and may be looked at."""
    values = np.array([np.nan, np.inf, 1.0], np.float32)
    save_file({"a": values}, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(find_tensors(tmp_path)["a"].read(), values)


@pytest.mark.parametrize(
    ("shard", "match"),
    [
        pytest.param("../x.safetensors", "only plain file names are read", id="parent"),
        pytest.param("/x.safetensors", "only plain file names are read", id="absolute"),
        pytest.param("C:x.safetensors", "only plain file names are read", id="drive"),
        pytest.param("a\0.safetensors", "only plain file names are read", id="nul"),
        pytest.param("a\n.safetensors", "only plain file names are read", id="newline"),
        pytest.param("sub", "no such file", id="directory"),
        pytest.param("fifo.safetensors", "no such file", id="fifo"),
        pytest.param("a" * 5000 + ".safetensors", "only plain file names are read", id="long"),
        pytest.param("link.safetensors", "outside its directory", id="link"),
        pytest.param("pytorch_model.bin", "only .safetensors files are read", id="pickle"),
    ],
)
def test_a_shard_is_a_plain_safetensors_file_of_its_directory(tmp_path, shard, match):
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    os.mkfifo(directory / "fifo.safetensors")
    save_file({"x": np.zeros(2)}, tmp_path / "x.safetensors")
    save_file({"x": np.zeros(2)}, directory / "pytorch_model.bin")
    os.symlink("../x.safetensors", directory / "link.safetensors")
    index = {"weight_map": {"x": shard}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=match) as caught:
        find_tensors(directory)
    assert str(directory) in str(caught.value)


NO_JSON = {
    "nothing": (b"", "is not JSON"),
    "half": (b'{"a":', "is not JSON"),
    "python": (b"{'a': __import__('os')}", "is not JSON"),
    "two": (b"{} {}", "is not JSON: Extra data"),
    "not-utf-8": (b'{"a": "\xff"}', "is not JSON: byte 7 is not UTF-8"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "is not JSON: byte 0 is not UTF-8"),
    "bom": (b"\xef\xbb\xbf{}", "BOM"),
    "list": (b"[]", "must hold one JSON object, got list"),
    "null": (b"null", "must hold one JSON object, got NoneType"),
    "twice": (b'{"a": 1, "a": 2}', "the name 'a' occurs twice"),
    "twice-inside": (b'{"a": [{"b": 1, "\\u0062": 2}]}', "the name 'b' occurs twice"),
    "nan": (b'{"a": NaN}', "NaN is not a finite number"),
    "infinity": (b'{"a": [-Infinity]}', "-Infinity is not a finite number"),
    "overflow": (b'{"a": 1e999}', "1e999 is not a finite number"),
    "digits": (b'{"a": 1' + b"0" * 10_000 + b"}", "is not JSON"),
    "deep": (b'{"a":' * 100_000, "is not JSON"),
    "rather-deep": (b'{"a":' * 99 + b"1" + b"}" * 99, "is nested deeper than 64"),
    "rather-deep-lists": (b'{"a":' + b"[" * 99 + b"]" * 99 + b"}", "is nested deeper than 64"),
    "control": (b'{"a\\u001b[2J": 1}', r"'a\\x1b\[2J' is no name of a field"),
    "nul": (b'{"a\\u0000": 1}', r"'a\\x00' is no name of a field"),
    "long-name": (b'{"' + b"a" * 1001 + b'": 1}', "is no name of a field"),
    "large": (b'{"a": "' + b"a" * MAX_BYTES + b'"}', "is larger than 16 MiB"),
}
READERS = {
    "config.json": from_pretrained,
    "model.safetensors.index.json": find_tensors,
    "adapter_config.json": lambda directory: load_adapter(directory, None),  # type: ignore
    "tokenizer_config.json": load_tokenizer,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("case", NO_JSON)
def test_a_file_that_is_no_json_object_is_refused(tmp_path, name, case):
    data, match = NO_JSON[case]
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=match) as caught:
        READERS[name](tmp_path)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert len(str(caught.value)) < 1000


def test_json_is_read_as_the_standard_library_reads_it(tmp_path):
    found = {"a": [1, 2.5, -1e-3, True, None, "é😀\n", {"b": {}}], "$.*[x]": 10**30}
    file = tmp_path / "a.json"
    for ascii_only in (True, False):
        file.write_text(json.dumps(found, ensure_ascii=ascii_only), encoding="utf-8")
        assert read_object(file) == found


def test_a_note_of_parts_that_is_no_note_is_refused(tmp_path):
    file = tmp_path / "adapter_model.safetensors"
    for note in ("[" * 100_000, '{"a": "tf"}', '{"a": [1]}', '{"a": [false]}', '{"a": 1}', "[]"):
        save_file({"x": np.zeros(2)}, file, metadata={_parts.NOTE: note})
        with pytest.raises(ValueError, match=r"The note 'lora_jax.parts' in .*adapter_model"):
            _parts.read_note(file)


SIZES = [10**9, 10**400, -1, 0, True, 2.5, 1e300, "12", None, [], {"a": 1}]


@pytest.mark.parametrize("field", ["num_hidden_layers", "hidden_size", "vocab_size", "num_labels"])
@pytest.mark.parametrize("value", SIZES, ids=lambda value: repr(value)[:12])
def test_an_absurd_size_is_refused_before_anything_is_allocated(tmp_path, field, value):
    directory = tmp_path
    fields = config_json("bert", TASK)
    if field == "num_labels":
        del fields["id2label"]
    (directory / "config.json").write_text(json.dumps(fields | {field: value}))
    (directory / "model.safetensors").write_bytes(file_of("{}", b""))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"{field}|does not fit the model"):
            from_pretrained(directory, TASK)
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        pytest.param({"id2label": 3}, "`id2label` must be an object, got 3", id="labels"),
        pytest.param({"id2label": "abc"}, "`id2label` must be an object", id="labels-text"),
        pytest.param({"num_hidden_layers": 1001}, "must be at most 1000, got 1001", id="layers"),
        pytest.param(
            {"id2label": None, "num_labels": 100_001}, "`num_labels` must be at most", id="drawn"
        ),
        pytest.param({f"x{i}": 1 for i in range(1000)}, "more than 1000", id="fields"),
        pytest.param({"auto_map": {"AutoModel": "m.M"}}, "`auto_map` is unknown", id="code"),
        pytest.param({"hidden_act": "os.system"}, "`hidden_act` 'os.system' is not", id="function"),
        pytest.param({"hidden_act": "x" * 9999}, r"`hidden_act` 'x{79} is not", id="long"),
    ],
)
def test_a_hostile_config_is_refused(tmp_path, fields, match):
    with pytest.raises(ValueError, match=match) as caught:
        from_pretrained(checkpoint(tmp_path, "bert", TASK, **fields))
    assert len(str(caught.value)) < 200_000


@pytest.mark.parametrize("scaling", [{"factor": 10**400}, {"factor": True}, {"factor": "8"}])
def test_a_rotary_embedding_of_no_number_is_refused(tmp_path, scaling):
    found = json.loads((Path(__file__).parents[2] / "references/llama/config.json").read_text())
    fields = found | {"rope_scaling": {"rope_type": "linear", **scaling}}
    fields.pop("rope_parameters", None)
    with pytest.raises(ValueError, match="`factor` must be a number"):
        from_pretrained(write(tmp_path, fields, {"x": np.zeros(2)}), "causal-lm")


@pytest.mark.parametrize("suffix", [".bin", ".pth", ".pt", ".ckpt", ".pkl"])
def test_pickles_are_refused_by_name_and_never_opened(tmp_path, suffix):
    """The file is a link to itself: who opens it gets an `OSError`."""
    (tmp_path / "config.json").write_text(json.dumps(config_json("bert", TASK)))
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    os.symlink(f"weights{suffix}", tmp_path / f"weights{suffix}")
    with pytest.raises(ValueError, match=rf"weights{suffix} only.*not read.*save_pretrained"):
        from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"weights{suffix} only.*not read.*PEFT.*safetensors"):
        load_adapter(tmp_path, None)  # type: ignore


def test_a_file_that_links_out_of_its_directory_is_not_copied(tmp_path):
    """Else a base could have a file of its user published with the merged model."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "base").mkdir()
    os.symlink("../secret", tmp_path / "base" / "vocab.txt")
    table = NameTable(expand([Row("x/kernel", "x.weight", "linear")], 0, stacked=False), prefix="p")
    weights = {"x/kernel": np.ones((2, 3), np.float32)}
    with pytest.raises(ValueError, match=r"vocab.txt is a link to .*secret, outside"):
        write_checkpoint(tmp_path / "new", table, weights, {}, source=tmp_path / "base")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "secret"]


@pytest.mark.parametrize(
    "field", ["tokenizer_file", "vocab_file", "merges_file", "vocab", "special_tokens_map_file"]
)
def test_a_tokenizers_config_does_not_say_where_its_files_are(tmp_path, field):
    """transformers 5.0 opens what these fields name."""
    tokenizer = toys.tokenizer("a", "b")
    tokenizer.save_pretrained(tmp_path / "own")
    toys.tokenizer("c", "d").save_pretrained(tmp_path / "other")
    file = tmp_path / "own" / "tokenizer_config.json"
    elsewhere = str(tmp_path / "other" / "tokenizer.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: elsewhere}))
    assert load_tokenizer(tmp_path / "own").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fast_tokenizer_files", ["../other/tokenizer.4.0.0.json"]),
        ("init_inputs", ["/etc/passwd"]),
    ],
)
def test_fields_of_a_tokenizers_config_that_are_refused(tmp_path, field, value):
    toys.tokenizer("a", "b").save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=f"`{field}` is .*: remove it"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_is_too_large_is_refused(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(ValueError, match=r"tokenizer.json is larger than 256 MiB"):
        load_tokenizer(tmp_path)


def test_nothing_is_executed_imported_or_opened_elsewhere(tmp_path):
    """Asked of Python itself, in a process of its own: see ``audited.py``."""
    script = Path(__file__).with_name("audited.py")
    ran = subprocess.run(
        [sys.executable, script, tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, sys.path))},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    report = json.loads(ran.stdout.splitlines()[-1])
    assert report["events"] == {}
    assert report["unexpected"] == {}
    assert report["heard"] == ["exec", "import", "open"]  # the hook does hear them
