"""A run on a quantised base: what is held, what is left, and where the adapter can go."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import cli as command
from lora_jax.io.peft._card import read_facts
from lora_jax.models import from_pretrained
from lora_jax.testing import assert_trees_equal
from tests.train import conftest
from tests.train.test_causal_lm import CONFIG, rows
from train import cli, evaluate, finetune

NF4 = "model.quantize=nf4"


@pytest.fixture
def folder(tmp_path, decoder_directory):
    """A folder with lines of E2E and a config for them, ``run.yaml``."""
    return fill(tmp_path, decoder_directory)


def fill(folder, model):
    (folder / "rows.txt").write_text("\n".join(conftest.meanings(200)) + "\n")
    (folder / "run.yaml").write_text(CONFIG.format(model=model))
    return folder


def train(folder, *arguments):
    return cli.main([str(folder / "run.yaml"), *arguments])


@pytest.fixture(scope="module")
def whole(tmp_path_factory, decoder_directory):
    """A run on an nf4 base, never interrupted."""
    folder = fill(tmp_path_factory.mktemp("whole"), decoder_directory)
    assert train(folder, NF4, "lora.targets=[all-linear]") == 0
    return folder / "out"


def result_of(directory):
    return json.loads((directory / "result.json").read_text())


def test_it_learns_and_says_what_it_held(whole, decoder_directory):
    result = result_of(whole)
    losses = [row["evaluation"]["loss"] for row in rows(whole) if "evaluation" in row]
    assert result["metrics"]["loss"] < 0.8 * losses[0]
    model = from_pretrained(decoder_directory, "causal-lm", quantize="nf4")
    assert result["weight_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    plain = from_pretrained(decoder_directory, "causal-lm")
    assert result["total_parameters"] == sum(leaf.size for leaf in jax.tree.leaves(plain.params))
    assert 0 < result["self_check"]["merge_error"] <= result["self_check"]["tolerance"]
    assert "model&#x27;s weights" in (whole / "report.html").read_text()


def test_its_losses_are_those_of_the_dequantised_base(whole, folder, decoder_directory):
    """To rounding: the same steps on plain weights that have the codes' values."""
    model = from_pretrained(decoder_directory, "causal-lm", quantize="nf4")
    same = folder / "dequantised"
    lora_jax.save_pretrained(same, model, lora_jax.dequantize(model.params))
    assert train(folder, f"model.path={same}", "lora.targets=[all-linear]") == 0
    wanted, found = (
        [row["loss"] for row in rows(directory) if "loss" in row]
        for directory in (folder / "out", whole)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_stopped_and_resumed_equals_never_interrupted(whole, folder, monkeypatch):
    log = finetune.log

    def log_and_stop(run, figures, *more):
        log(run, figures, *more)
        if figures[-1]["step"] == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "log", log_and_stop)
        train(folder, NF4, "lora.targets=[all-linear]")
    assert not (folder / "out" / "adapter").exists()
    assert train(folder, NF4, "lora.targets=[all-linear]", "--resume") == 0
    assert rows(folder / "out") == rows(whole)
    name = "adapter/adapter_model.safetensors"
    assert (folder / "out" / name).read_bytes() == (whole / name).read_bytes()


def test_another_precision_is_another_run(whole, capsys):
    arguments = [str(whole / "config.yaml"), "model.quantize=int8", "--resume"]
    assert cli.main(arguments) == 2
    assert "model.quantize: 'nf4' -> 'int8'" in capsys.readouterr().err


def test_eval_measures_it_on_the_base_that_it_trained_on(whole, capsys):
    assert evaluate.main([str(whole), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == pytest.approx(result_of(whole)["metrics"], rel=1e-5)
    assert evaluate.main([str(whole), "--json", "--base"]) == 0
    first = next(row["evaluation"] for row in rows(whole) if "evaluation" in row)
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(first["loss"], rel=1e-5)


def test_merge_goes_into_the_base_as_published_and_says_so(
    whole, tmp_path, capsys, decoder_directory
):
    arguments = ["merge", "--adapter", str(whole), "--out", str(tmp_path / "new")]
    assert command.main(arguments) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "It was trained on the base in nf4, and merged into the base as published."
    model = from_pretrained(decoder_directory, "causal-lm")
    frozen, trainable, _ = lora_jax.load_adapter(whole / "adapter", model)
    merged = from_pretrained(tmp_path / "new", "causal-lm")
    assert_trees_equal(merged.params, lora_jax.merge(frozen, trainable))
    assert command.main([*arguments, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trained_on"] == "nf4"


def test_the_adapter_is_one_like_any_other_and_its_card_says_what_of(whole, tmp_path, capsys):
    facts = read_facts(whole / "adapter")
    assert facts.quantize == "nf4"
    assert facts.evaluation == pytest.approx(result_of(whole)["metrics"])
    assert "quantised to nf4" in (whole / "adapter" / "README.md").read_text()
    arguments = ["export", "--adapter", str(whole), "--out", str(tmp_path / "vllm")]
    assert command.main([*arguments, "--profile", "vllm"]) == 0
    assert read_facts(tmp_path / "vllm") == facts
    fields = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert not [key for key in fields if "quant" in key]


@pytest.mark.parametrize(
    ("asked", "held"),
    [((), "nf4"), (("--quantize", "none"), None), (("--quantize", "int8"), "int8")],
)
def test_generate_holds_the_base_as_it_trained_unless_told(whole, capsys, asked, held):
    prompt = "name : Aroma | area : north||"
    arguments = ["generate", "--adapter", str(whole), "--prompt", prompt, *asked]
    assert command.main([*arguments, "--max-new-tokens", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["quantize"] == held
    assert found["completions"][0]["completion"]


@pytest.mark.parametrize(
    ("scheme", "more"),
    [
        pytest.param("nf4", "model.scan_layers=true", id="nf4-scanned"),
        pytest.param("int8", "model.scan_layers=true", id="int8-scanned"),
        pytest.param("fp8", "lora.train=[up]", id="fp8-but-what-trains-in-full"),
    ],
)
def test_every_scheme_trains_saves_and_loads(folder, capsys, scheme, more):
    settings = (f"model.quantize={scheme}", more)
    assert train(folder, "training.steps=2", "model.dtype=bfloat16", *settings, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert evaluate.main([str(folder / "out"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-5)
    where = ["generate", "--adapter", str(folder / "out"), "--prompt", "name : Aroma||"]
    assert command.main([*where, "--max-new-tokens", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantize"] == scheme


def test_a_classifier_of_a_quantised_encoder_trains_its_head(tmp_path, write_run, capsys):
    folder = write_run(tmp_path)
    assert train(folder, NF4, "training.steps=2", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["trained_parameters"] == 2 * (32 * 2 + 2 * 32) + 32 * 2 + 2
    assert read_facts(folder / "out" / "adapter").quantize == "nf4"


def test_a_dry_run_shows_what_would_be_held(folder, capsys, decoder_directory):
    assert train(folder, NF4, "--dry-run") == 0
    shown = capsys.readouterr().out
    model = from_pretrained(decoder_directory, "causal-lm", quantize="nf4", dtype=jnp.float32)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert f"the model's weights take {held / 1e3:.0f} kB" in shown
    assert "quantize: nf4" in shown
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(["model.quantize=nf5"], "did you mean 'nf4'?", id="unknown"),
        pytest.param([NF4, "lora.train=[typo]"], "`train` pattern 'typo'", id="no-such-weight"),
        pytest.param(
            [NF4, "lora.train=[.*]", "lora.targets=[]"],
            "leaves none of the",
            id="no-codes",
        ),
    ],
)
def test_wrong_input_ends_with_2_and_leaves_nothing(folder, capsys, settings, message):
    assert train(folder, *settings) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()
