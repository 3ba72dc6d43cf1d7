"""``lora-jax merge``: what it writes, from what it takes, and nothing where it refuses."""

import json
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import load_adapter, merge, split
from lora_jax._paths import flatten
from lora_jax.io.hugging_face import find_tensors
from lora_jax.models import from_pretrained
from lora_jax.testing import assert_trees_equal
from tests.lora_jax.cli.adapted import SEQUENCE, copy_of, listing, run, run_of
from tests.references.checkpoints import HERE, checkpoint, outputs, write

WEIGHTS = "adapter_model.safetensors"


def merged_in_memory(base, adapter, task, dtype=None, **options):
    model = from_pretrained(base, task, **options)
    frozen, trainable, _ = load_adapter(adapter, model)
    return merge(frozen, trainable, dtype=dtype)


CASES = [
    pytest.param("bert", SEQUENCE, {}, id="bert"),
    pytest.param("roberta", SEQUENCE, {}, id="roberta"),
    pytest.param("bert", "token-classification", {"train": ("classifier/.*",)}, id="tokens"),
    pytest.param("bert", "question-answering", {"train": ("qa_outputs/.*",)}, id="answers"),
    pytest.param("roberta", "masked-lm", {}, id="masked-lm"),
    pytest.param("bert", SEQUENCE, {"train": ()}, id="trained-head-of-the-base"),
    pytest.param(
        "bert", SEQUENCE, {"use_rslora": True, "rank_pattern": {"0/.*/query": 3}}, id="rs"
    ),
    pytest.param("gpt2", "causal-lm", {}, id="gpt2"),
    pytest.param("gpt2", "causal-lm", {"parts": {"qkv": (True, False, True)}}, id="gpt2-parts"),
    pytest.param("llama", "causal-lm", {}, id="llama"),
]


@pytest.mark.parametrize(("family", "task", "changes"), CASES)
def test_the_merged_directory_is_a_model_of_the_merged_weights(
    tmp_path, capsys, shelf, family, task, changes
):
    where = shelf.base(family, task)
    what = shelf.adapter(where, task, **changes)
    code, out, err = run(
        capsys, "merge", "--base", where, "--adapter", what, "--out", tmp_path / "new"
    )
    assert (code, err) == (0, "")
    assert str(tmp_path / "new") in out
    again = from_pretrained(tmp_path / "new", task, new_head=False)
    assert_trees_equal(again.params, merged_in_memory(where, what, task))
    assert again.config_json["architectures"] == from_pretrained(where, task).config_json[
        "architectures"
    ]  # fmt: skip
    assert listing(tmp_path / "new") == ["config.json", "model.safetensors", "tokenizer.json"]


def test_it_says_what_it_did(tmp_path, capsys, shelf):
    where = shelf.base("bert")
    what = shelf.adapter(where)
    arguments = ("merge", "--base", where, "--adapter", what)
    _, out, _ = run(capsys, *arguments, "--out", tmp_path / "one", "--dtype", "bfloat16")
    size = (tmp_path / "one" / "model.safetensors").stat().st_size
    assert out.splitlines() == [
        f"Merged 4 adapted weights and 2 trained in full into {where} ({SEQUENCE}).",
        f"Wrote 41 weights in bfloat16, {size:,} bytes in 1 file, to {tmp_path / 'one'}",
    ]
    code, out, _ = run(capsys, *arguments, "--out", tmp_path / "two", "--json")
    assert code == 0
    assert json.loads(out) == {
        "base": str(where),
        "adapter": str(what),
        "out": str(tmp_path / "two"),
        "task": SEQUENCE,
        "dtype": "float32",
        "trained_on": None,
        "adapted": 4,
        "trained_in_full": 2,
        "weights": 41,
        "bytes": (tmp_path / "two" / "model.safetensors").stat().st_size,
        "files": 1,
    }


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("float32", None),
        ("float32", "bfloat16"),
        ("bfloat16", None),
        ("bfloat16", "float32"),
        ("bfloat16", "float16"),
        ("float16", None),
    ],
)
def test_weights_are_rounded_once_to_the_dtype_asked_for_or_the_bases(
    tmp_path, capsys, shelf, stored, asked
):
    where = shelf.base("bert", dtype=stored)
    what = shelf.adapter(where)
    dtype = ["--dtype", asked] if asked else []
    arguments = ("merge", "--base", where, "--adapter", what, "--out", tmp_path / "new", *dtype)
    assert run(capsys, *arguments)[0] == 0
    wanted = asked or stored
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    assert {tensor.dtype for tensor in find_tensors(tmp_path / "new").values()} == {names[wanted]}
    again = from_pretrained(tmp_path / "new", dtype=jnp.dtype(wanted), new_head=False)
    # Loading is exact in float32, so the one rounding of a merge in float32 is the only one.
    exact = merged_in_memory(where, what, SEQUENCE, dtype=jnp.float32)
    assert_trees_equal(again.params, jax.tree.map(lambda w: w.astype(wanted), exact))


def test_a_head_of_other_classes_comes_from_the_adapter(tmp_path, capsys, shelf):
    where = shelf.base("roberta", None)
    what = shelf.adapter(where, num_labels=5)
    assert (
        run(capsys, "merge", "--base", where, "--adapter", what, "--out", tmp_path / "new")[0] == 0
    )
    again = from_pretrained(tmp_path / "new", new_head=False)
    assert again.config.num_labels == 5
    saved = load_file(what / WEIGHTS)["base_model.model.classifier.out_proj.weight"]
    np.testing.assert_array_equal(again.params["classifier"]["out_proj"]["kernel"], saved.T)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("name", ["peft", "peft-rslora-patterns"])
def test_an_adapter_that_peft_wrote(tmp_path, capsys, shelf, family, name):
    where, stored = checkpoint(tmp_path / "base", family, SEQUENCE), outputs(family)
    what = HERE / family / name
    assert (
        run(capsys, "merge", "--base", where, "--adapter", what, "--out", tmp_path / "new")[0] == 0
    )
    model = from_pretrained(tmp_path / "new", new_head=False)
    given = [stored[key] for key in ("input_ids", "attention_mask", "token_type_ids")]
    logits = jax.jit(model.apply)(model.params, *given)
    np.testing.assert_allclose(logits, stored[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("asked", "wanted"), [(None, "float32"), ("bfloat16", "bfloat16")])
def test_a_quantised_base_is_summed_in_float32_and_rounded_once(
    tmp_path, capsys, shelf, asked, wanted
):
    pytest.importorskip("gguf", reason="The gguf package is not installed")
    from tests.lora_jax.io import gguf_files

    where = gguf_files.llama(tmp_path / "base.gguf", encoding="Q8_0")
    what = shelf.adapter(where, "causal-lm")
    dtype = ["--dtype", asked] if asked else []
    arguments = ("merge", "--base", where, "--adapter", what, "--out", tmp_path / "new", *dtype)
    code, _, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    again = from_pretrained(tmp_path / "new", "causal-lm", dtype=jnp.dtype(wanted))
    exact = merged_in_memory(where, what, "causal-lm")
    assert_trees_equal(again.params, jax.tree.map(lambda w: w.astype(wanted), exact))
    assert {"config.json", "tokenizer.json"} < set(listing(tmp_path / "new"))


@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
def test_a_run_directory_names_its_adapter_and_its_base(tmp_path, capsys, shelf, absolute):
    where = shelf.base("bert")
    named = str(where) if absolute else os.path.relpath(where, tmp_path / "run")
    what = run_of(tmp_path / "run", shelf.adapter(where), named)
    code, out, err = run(capsys, "merge", "--adapter", what, "--out", tmp_path / "new", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["adapter"] == str(tmp_path / "run" / "adapter")
    again = from_pretrained(tmp_path / "new", new_head=False)
    merged = merged_in_memory(where, tmp_path / "run" / "adapter", SEQUENCE)
    assert_trees_equal(again.params, merged)


def test_a_model_is_overwritten_only_when_asked(tmp_path, capsys, shelf):
    where = shelf.base("bert")
    what = shelf.adapter(where)
    arguments = ("merge", "--base", where, "--adapter", what, "--out", tmp_path / "new")
    assert run(capsys, *arguments)[0] == 0
    before = (tmp_path / "new" / "model.safetensors").read_bytes()
    code, _, err = run(capsys, *arguments, "--dtype", "float16")
    assert (code, "add --overwrite" in err) == (2, True)
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == before
    assert run(capsys, *arguments, "--dtype", "float16", "--overwrite")[0] == 0
    assert from_pretrained(tmp_path / "new").config_json["dtype"] == "float16"


def drop(file, *names):
    save_file({k: v for k, v in load_file(file).items() if not k.endswith(names)}, file)


def set_fields(directory, **fields):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def one_layer_of(base, directory):
    """The same encoder without its last layer."""
    fields = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": 1}
    kept = {k: v for k, v in load_file(base / "model.safetensors").items() if ".layer.1." not in k}
    write(directory, fields, kept)


def precious(directory):
    directory.mkdir()
    (directory / "thesis.tex").write_text("")


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        pytest.param(None, {"--base": "nowhere"}, "'.*nowhere' does not exist", id="no-base"),
        pytest.param(None, {"--base": "adapter"}, "has no config.json", id="base-no-model"),
        pytest.param(None, {"--adapter": "nowhere"}, "nowhere does not exist", id="no-adapter"),
        pytest.param(
            None,
            {"--adapter": "base"},
            "base is not an adapter: it has no adapter_config.json",
            id="adapter-no-adapter",
        ),
        pytest.param(None, {"--adapter": "base/config.json"}, "is a file", id="adapter-a-file"),
        pytest.param(None, {"--base": None}, "does not say what its base", id="base-not-named"),
        pytest.param(
            None, {"--base": "smaller"}, r"not fit the model: .*\.\.\. and 1 more", id="other-base"
        ),
        pytest.param(None, {"--out": "base", "--overwrite": ""}, "is read", id="onto-the-base"),
        pytest.param(None, {"--out": ".", "--overwrite": ""}, "is read", id="around-the-base"),
        pytest.param(None, {"--out": "base/config.json"}, "is a file", id="onto-a-file"),
        pytest.param(
            lambda d: precious(d / "new"), {"--overwrite": ""}, "left as it is", id="onto-a-thesis"
        ),
        pytest.param(
            lambda d: (d / "adapter" / WEIGHTS).unlink(),
            {},
            f"not an adapter: it has no {WEIGHTS}, but",
            id="no-adapter-file",
        ),
        pytest.param(
            lambda d: (d / "adapter" / WEIGHTS).write_bytes(b"\x00" * 20),
            {},
            "not a complete safetensors file",
            id="torn-adapter-file",
        ),
        pytest.param(
            lambda d: drop(d / "adapter" / WEIGHTS, "lora_A.weight"), {}, "missing: ", id="halves"
        ),
        pytest.param(
            lambda d: drop(d / "adapter" / WEIGHTS, "classifier.bias"), {}, "missing: ", id="a-head"
        ),
        pytest.param(
            lambda d: set_fields(d / "adapter", use_dora=True), {}, "`use_dora` is True", id="dora"
        ),
        pytest.param(
            lambda d: set_fields(d / "adapter", task_type="SEQ_2_SEQ_LM"),
            {},
            "'SEQ_2_SEQ_LM' is not supported",
            id="task-type",
        ),
        pytest.param(
            lambda d: set_fields(d / "adapter", task_type="CAUSAL_LM"),
            {},
            "'causal-lm' is unknown",
            id="task-of-another-family",
        ),
        pytest.param(
            lambda d: (d / "base" / "model.safetensors").unlink(),
            {},
            "has neither model.safetensors",
            id="base-without-weights",
        ),
        pytest.param(
            lambda d: (d / "adapter" / "config.yaml").write_text("model: {path: 5}"),
            {"--base": None},
            "does not name a model",
            id="run-that-names-a-number",
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, shelf, spoil, options, message):
    where = copy_of(shelf.base("bert"), tmp_path / "base")
    copy_of(shelf.adapter(shelf.base("bert")), tmp_path / "adapter")
    one_layer_of(where, tmp_path / "smaller")
    if spoil:
        spoil(tmp_path)
    given = {"--base": "base", "--adapter": "adapter", "--out": "new"} | options
    arguments = [
        part
        for name, value in given.items()
        if value is not None
        for part in ([name, tmp_path / value] if value else [name])
    ]
    before = listing(tmp_path)
    code, out, err = run(capsys, "merge", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("lora-jax merge: ")
    assert err.count("\n") == 1
    assert re.search(message, err), err
    assert listing(tmp_path) == before


@pytest.mark.parametrize("option", ["--base", "--adapter", "--out"])
def test_the_home_of_nobody(capsys, shelf, option):
    where = shelf.base("bert")
    given = {"--base": where, "--adapter": shelf.adapter(where), "--out": where}
    given |= {option: "~nobody-of-this-name/x"}
    code, _, err = run(capsys, "merge", *(part for pair in given.items() for part in pair))
    assert (code, err.count("\n")) == (2, 1)


def test_a_head_that_neither_has_is_not_drawn(tmp_path, capsys, shelf):
    trained_on = shelf.base("bert")
    what = copy_of(shelf.adapter(trained_on, train=()), tmp_path / "adapter")
    set_fields(what, task_type="SEQ_CLS")
    bare = shelf.base("bert", None)
    code, _, err = run(
        capsys, "merge", "--base", bare, "--adapter", what, "--out", tmp_path / "new"
    )
    assert code == 2
    assert "Neither" in err
    assert "classifier/kernel" in err


def test_factors_that_diverged_are_named(tmp_path, capsys, shelf):
    where = shelf.base("bert")
    what = copy_of(shelf.adapter(where), tmp_path / "adapter")
    file = what / WEIGHTS
    save_file({k: v * np.float32("nan") for k, v in load_file(file).items()}, file)
    before = listing(tmp_path)
    code, _, err = run(
        capsys, "merge", "--base", where, "--adapter", what, "--out", tmp_path / "new"
    )
    assert (code, "is not finite after merging" in err) == (2, True)
    assert listing(tmp_path) == before


FULL_DISK = """
import resource, sys
from lora_jax import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_full_disk_leaves_nothing(tmp_path, shelf):
    """A limit on the size of a file, 20 kB, stands for the disk."""
    where = shelf.base("bert")
    arguments = ["--base", where, "--adapter", shelf.adapter(where)]
    before = listing(tmp_path)
    command = [sys.executable, "-c", FULL_DISK, "merge", *arguments, "--out", tmp_path / "a" / "b"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "model.safetensors could not be written" in done.stderr
    assert done.stderr.count("\n") == 1
    assert listing(tmp_path) == before


def test_merging_twice_is_merging_a_merged_base(tmp_path, capsys, shelf):
    """The merged directory is a base like any other."""
    where = shelf.base("llama")
    what = shelf.adapter(where, "causal-lm")
    once, twice = tmp_path / "once", tmp_path / "twice"
    run(capsys, "merge", "--base", where, "--adapter", what, "--out", once)
    run(capsys, "merge", "--base", once, "--adapter", what, "--out", twice)
    model = from_pretrained(where, "causal-lm")
    frozen, trainable, config = load_adapter(what, model)
    frozen, _ = split(merge(frozen, trainable), config, jax.random.key(0))
    expected, _ = flatten(merge(frozen, trainable))
    actual, _ = flatten(from_pretrained(twice, "causal-lm").params)
    assert_trees_equal(actual, expected)


def test_help_has_examples_that_parse(capsys):
    code, out, _ = run(capsys, "merge", "--help")
    assert code == 0
    examples = [line.split() for line in out.splitlines() if line.startswith("  lora-jax merge")]
    assert len(examples) > 1
    for _, *arguments in examples:
        code, _, err = run(capsys, *arguments)
        assert code == 2  # the paths are not here, and nothing else is wrong
        assert "does not exist" in err
