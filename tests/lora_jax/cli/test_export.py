"""``lora-jax export``: the same adapter for another reader, or an error and nothing."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import load_adapter, merge, save_adapter
from lora_jax._paths import flatten
from lora_jax.io.peft._card import read_facts
from lora_jax.models import from_pretrained
from tests.lora_jax.cli.adapted import SEQUENCE, listing, run, run_of
from tests.references.checkpoints import HERE, checkpoint, hub_cache

WEIGHTS = "adapter_model.safetensors"
PATTERNS = {"rank_pattern": {"layers/0/.*": 3}, "alpha_pattern": {"layers/1/.*": 5.0}}


def fields_of(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())


def merged(base, adapter, task):
    model = from_pretrained(base, task)
    return flatten(merge(*load_adapter(adapter, model)[:2]))[0]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("llama", {}, id="llama"),
        pytest.param("llama", PATTERNS, id="patterns"),
        pytest.param("llama", PATTERNS | {"use_rslora": True}, id="rslora"),
        pytest.param("gpt2", {}, id="gpt2"),
    ],
)
def test_vllm_gets_one_rank_and_one_scale_and_the_same_update(
    tmp_path, capsys, shelf, family, changes
):
    where = shelf.base(family, "causal-lm")
    what = shelf.adapter(where, "causal-lm", **changes)
    arguments = ("--base", where, "--adapter", what, "--out", tmp_path / "new")
    code, _, err = run(capsys, "export", *arguments, "--profile", "vllm")
    assert (code, err) == (0, "")
    fields = fields_of(tmp_path / "new")
    assert (fields["rank_pattern"], fields["alpha_pattern"]) == ({}, {})
    assert (fields["use_rslora"], fields["modules_to_save"]) == (False, None)
    ranks = {t.shape[0] for n, t in load_file(tmp_path / "new" / WEIGHTS).items() if ".lora_A" in n}
    assert ranks == {fields["r"]}
    before, after = (merged(where, adapter, "causal-lm") for adapter in (what, tmp_path / "new"))
    for path, weight in before.items():
        # `b` takes up the scale: each of its products is rounded once more, and summed.
        bound = 4 * np.finfo(np.float32).eps * np.abs(weight).max()
        np.testing.assert_allclose(after[path], weight, rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["peft", "peft-rslora-patterns"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_what_peft_wrote_comes_back_tensor_for_tensor(tmp_path, capsys, family, name):
    where, what = checkpoint(tmp_path / "base", family, SEQUENCE), HERE / family / name
    code, _, err = run(
        capsys, "export", "--base", where, "--adapter", what, "--out", tmp_path / "new"
    )
    assert (code, err) == (0, "")
    before, after = load_file(what / WEIGHTS), load_file(tmp_path / "new" / WEIGHTS)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key], tensor)
    one, two = (merged(where, adapter, SEQUENCE) for adapter in (what, tmp_path / "new"))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_it_says_what_it_did(tmp_path, capsys, shelf):
    where = shelf.base("llama", "causal-lm")
    what = shelf.adapter(where, "causal-lm")
    arguments = ("export", "--base", where, "--adapter", what)
    _, out, _ = run(capsys, *arguments, "--out", tmp_path / "one", "--profile", "vllm")
    size = (tmp_path / "one" / WEIGHTS).stat().st_size
    assert out == (
        "Wrote 4 adapted weights and 0 trained in full for vllm, "
        f"{size:,} bytes, to {tmp_path / 'one'}\n"
    )
    _, out, _ = run(capsys, *arguments, "--out", tmp_path / "two", "--json")
    assert json.loads(out) == {
        "base": str(where),
        "adapter": str(what),
        "out": str(tmp_path / "two"),
        "task": "causal-lm",
        "profile": "peft",
        "adapted": 4,
        "trained_in_full": 0,
        "bytes": (tmp_path / "two" / WEIGHTS).stat().st_size,
        "files": 1,
    }


def test_the_base_keeps_the_name_that_the_adapter_gave_it(tmp_path, capsys, shelf):
    where = shelf.base("llama", "causal-lm")
    model = from_pretrained(where, "causal-lm")
    what = shelf.adapter(where, "causal-lm")
    assert model.hub_id is None
    for number, (name, kept) in enumerate((("meta/tiny", "meta/tiny"), ("./here", None))):
        named = run_of(tmp_path / f"run{number}", what, str(where)) / "adapter"
        file = named / "adapter_config.json"
        file.write_text(json.dumps(fields_of(named) | {"base_model_name_or_path": name}))
        out = tmp_path / f"new{number}"
        assert run(capsys, "export", "--base", where, "--adapter", named, "--out", out)[0] == 0
        assert fields_of(out)["base_model_name_or_path"] == kept


@pytest.mark.parametrize("profile", ["peft", "vllm"])
def test_the_facts_of_the_card_are_kept(tmp_path, capsys, shelf, profile):
    where = shelf.base("llama", "causal-lm")
    model = from_pretrained(where, "causal-lm")
    _, trainable, config = load_adapter(shelf.adapter(where, "causal-lm"), model)
    facts = {"evaluation": {"loss": 1 / 3, "BLEU": 66.0}, "data_hash": "sha256:12ab"}
    facts["quantize"] = "nf4"
    what = save_adapter(tmp_path / "old", trainable, config, model, **facts)
    arguments = ("--base", where, "--adapter", what, "--out", tmp_path / "new")
    assert run(capsys, "export", *arguments, "--profile", profile)[0] == 0
    assert read_facts(tmp_path / "new")._asdict() == facts
    card = (tmp_path / "new" / "README.md").read_text()
    assert "| loss | 0.333333 |\n| BLEU | 66 |" in card
    assert "Data: `sha256:12ab`" in card


def test_the_base_keeps_its_revision(tmp_path, capsys, monkeypatch, shelf):
    constants = pytest.importorskip("huggingface_hub.constants")
    where = shelf.base("llama", "causal-lm")
    cache = hub_cache(tmp_path / "hub", where, "meta/tiny", "v1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    what = run_of(tmp_path / "run", shelf.adapter(where, "causal-lm"), "unused") / "adapter"
    named = {"base_model_name_or_path": "meta/tiny", "revision": "v1"}
    fields = fields_of(what) | named
    (what / "adapter_config.json").write_text(json.dumps(fields))
    for number, base in enumerate(((), ("--base", "meta/tiny"), ("--base", where))):
        out = tmp_path / f"new{number}"
        code, _, err = run(capsys, "export", "--adapter", what, *base, "--out", out)
        assert (code, err) == (0, "")
        assert fields_of(out).items() >= named.items()
    code, _, err = run(capsys, "merge", "--adapter", what, "--out", tmp_path / "merged")
    assert (code, err) == (0, "")
    (what / "adapter_config.json").write_text(json.dumps(fields | {"revision": "v2"}))
    code, _, err = run(capsys, "export", "--adapter", what, "--out", tmp_path / "more")
    assert (code, "the hub did not give it" in err) == (2, True)
    (what / "adapter_config.json").write_text(json.dumps(fields | {"revision": 2}))
    code, _, err = run(capsys, "export", "--adapter", what, "--out", tmp_path / "more")
    assert (code, "`revision` must be names" in err) == (2, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"--profile": "vllm"}, "classifier/kernel: vLLM reads no weights", id="head"),
        pytest.param({"--profile": "tgi"}, "invalid choice: 'tgi'", id="unknown-profile"),
        pytest.param({"--base": "NOWHERE"}, "does not exist", id="no-base"),
        pytest.param({"--adapter": "NOWHERE"}, "does not exist", id="no-adapter"),
        pytest.param({"--out": "ADAPTER"}, "holds what is read", id="in-place"),
    ],
)
def test_bad_input_leaves_nothing(tmp_path, capsys, shelf, options, message):
    where = shelf.base("bert")
    what = shelf.adapter(where)
    names = {"NOWHERE": tmp_path / "nowhere", "ADAPTER": what}
    given = {"--base": where, "--adapter": what, "--out": tmp_path / "new"} | options
    before = listing(what), listing(tmp_path)
    arguments = [names.get(part, part) for option in given.items() for part in option]
    code, out, err = run(capsys, "export", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert (listing(what), listing(tmp_path)) == before


FULL_DISK = """
import resource, sys
from lora_jax import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_full_disk_leaves_nothing(tmp_path, shelf):
    """A limit on the size of a file, 500 bytes, stands for the disk."""
    where = shelf.base("bert")
    arguments = ["--base", where, "--adapter", shelf.adapter(where), "--out", tmp_path / "new"]
    command = [sys.executable, "-c", FULL_DISK, "export", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "adapter_model.safetensors could not be written" in done.stderr
    assert done.stderr.count("\n") == 1
    assert listing(tmp_path) == []


def test_help_has_examples_that_parse(capsys):
    code, out, _ = run(capsys, "export", "--help")
    assert code == 0
    examples = [line.split() for line in out.splitlines() if line.startswith("  lora-jax export")]
    assert len(examples) > 1
    for _, *arguments in examples:
        code, _, err = run(capsys, *arguments)
        assert code == 2  # the paths are not here, and nothing else is wrong
        assert "does not exist" in err
