"""The causal-LM task: its loss by hand, its counts, and a run end to end."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import conftest
from train import cli, evaluate, exit_codes, finetune, losses, text_rows
from train.batches import collate
from train.config import Config, DataSection
from train.records import Pair
from train.tasks import Model, causal_lm

CONFIG = """\
model:
  path: {model}
  task: causal-lm
lora:
  rank: 4
  alpha: 8
  dropout: 0.1
data:
  train: rows.txt
  format: e2e
  holdout: 16
  max_length: 24
training:
  steps: 8
  batch_size: 16
  learning_rate: 2e-2
  evaluate_every: 4
  log_every: 2
output:
  directory: out
"""


@pytest.fixture
def lm_folder(tmp_path, decoder_directory):
    """A folder with lines of E2E and a config for them, ``run.yaml``."""
    (tmp_path / "rows.txt").write_text("\n".join(conftest.meanings(200)) + "\n")
    (tmp_path / "run.yaml").write_text(CONFIG.format(model=decoder_directory))
    return tmp_path


def train(folder, *arguments):
    return cli.main([str(folder / "run.yaml"), *arguments])


def rows(directory):
    """The metrics without wall-clock times."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def given(logits, batch, chunk=4096):
    """A model that has learned these logits by heart, its one weight, and the batch."""
    fields = {"attention_mask": jnp.ones_like(batch["input_ids"]), **batch}
    model = Model(
        apply=lambda params, *_, **__: params["logits"],
        hidden=lambda params, *_, **__: params["logits"],
        logits=lambda _, hidden, dtype=jnp.float32: hidden.astype(dtype),
        head=lambda _: {},
        chunk=chunk,
    )
    return model, {"logits": jnp.asarray(logits)}, fields


@pytest.mark.parametrize("chunk", [4096, 4, 6])  # tokens: 4, 2 and 3 positions of two rows
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_a_mean_over_the_learned_tokens_of_the_batch(smoothing, chunk):
    logits = np.random.default_rng(0).normal(size=(2, 4, 5)).astype(np.float32)
    batch = {
        "input_ids": jnp.array([[0, 1, 2, 3], [4, 0, 1, 1]]),
        "loss_mask": jnp.array([[0, 1, 1, 1], [0, 0, 1, 0]]),
    }
    log_p = np.asarray(jax.nn.log_softmax(logits))
    by_hand = [
        -(1 - smoothing) * log_p[row, place - 1, token] - smoothing * log_p[row, place - 1].mean()
        for row, place, token in [(0, 1, 1), (0, 2, 2), (0, 3, 3), (1, 2, 1)]
    ]
    found = losses.mean(*causal_lm.loss(*given(logits, batch, chunk), smoothing))
    np.testing.assert_allclose(found, np.mean(by_hand), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_is_that_of_the_softmax(smoothing):
    """share - (1 - e) * one at the target - e / classes, which finite logits cannot overflow."""
    with jax.enable_x64(True):
        logits = np.random.default_rng(0).normal(size=(3, 7), scale=300.0)
        targets = jnp.array([0, 3, 6])
        found = jax.grad(lambda x: losses.cross_entropy(x, targets, smoothing).sum())(logits)
        exact = np.exp(logits - logits.max(axis=1, keepdims=True))
        exact /= exact.sum(axis=1, keepdims=True)
        exact -= (1 - smoothing) * np.eye(7)[np.asarray(targets)] + smoothing / 7
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-12)


def test_smoothing_of_equal_probabilities_changes_nothing():
    logits, targets = jnp.zeros((3, 7)), jnp.array([0, 3, 6])
    found = losses.cross_entropy(logits, targets, 0.3)
    np.testing.assert_allclose(found, np.full(3, math.log(7)), rtol=1e-6)


def test_a_batch_without_anything_to_learn_has_no_loss():
    batch = {"input_ids": jnp.zeros((1, 3), int), "loss_mask": jnp.zeros((1, 3), int)}
    assert losses.mean(*causal_lm.loss(*given(jnp.ones((1, 3, 4)), batch), 0.0)) == 0


def test_figures_weigh_tokens_and_not_rows(tokenizer):
    section = DataSection(train="rows.txt", holdout=1)
    pairs = [Pair("Hi", " there"), Pair("Hi", " Aroma is in the north.")]
    encoded = text_rows.encode(tokenizer, pairs, section)
    assert encoded.learned == 2 + 7
    found = causal_lm.metrics(np.array([[4.0, 1], [5.0, 5]]), encoded)
    assert found == pytest.approx(
        {"loss": 1.0, "perplexity": math.e, "token_accuracy": 6 / 9}, rel=1e-12
    )
    assert causal_lm.metrics(np.array([[1e6, 0], [0, 0]]), encoded)["perplexity"] == math.inf


@pytest.mark.parametrize("chunk", [4096, 2])
def test_outputs_are_sums_over_each_row(tokenizer, chunk):
    section = DataSection(train="rows.txt", holdout=1)
    encoded = text_rows.encode(tokenizer, [Pair("Hi", " there"), Pair("Hi", ".")], section)
    batch = collate(encoded, [0, 1], encoded.lengths)
    # Sure of the right token everywhere, but for the first answer's end.
    targets = np.asarray(losses.next_tokens(batch)[0])
    logits = 50.0 * np.asarray(jax.nn.one_hot(targets, len(tokenizer)))
    logits[0, 1] = 0
    found = np.asarray(causal_lm.outputs(*given(logits, batch, chunk)))
    np.testing.assert_allclose(found, [[math.log(len(tokenizer)), 1], [0, 2]], atol=1e-6)


@pytest.mark.parametrize("packing", [False, True])
def test_what_is_cut_and_left_out_is_counted(lm_folder, decoder_directory, packing):
    rows = [
        {"prompt": "Hi", "completion": " there"},
        {"prompt": "Hi", "completion": " there" * 9},
        {"prompt": "Hi" + " there" * 9, "completion": "."},
        {"prompt": "Hi", "completion": "."},
    ]
    (lm_folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = Config.model_validate(
        {
            "model": {"path": str(decoder_directory), "task": "causal-lm"},
            "data": {
                "train": str(lm_folder / "rows.jsonl"),
                "validation": str(lm_folder / "rows.jsonl"),
                "validation_limit": 1,
                "max_length": 8,
                "packing": packing,
            },
            "output": {"directory": "out"},
        }
    )
    sets = causal_lm.load_sets(config)
    assert (len(sets.train.examples), sets.train.truncated, sets.train.dropped) == (3, 2, 1)
    lines = causal_lm.describe(sets, config)
    assert lines[0] == "3 examples to train on, 1 to evaluate on"
    assert lines[1] == "14 training tokens, 11 of them learned, in rows of up to 8"
    assert lines[-2:] == [
        "2 of 5 texts were cut to 8 tokens",
        "1 of 5 texts were left out: nothing of them is learned",
    ]
    assert packing == ("packed into 2 rows, 87.5% full" in lines)


def test_a_text_file_is_one_text_in_windows(lm_folder, decoder_directory):
    text = "Hi there.\n" * 40
    (lm_folder / "story.txt").write_text(text)
    config = Config.model_validate(
        {
            "model": {"path": str(decoder_directory), "task": "causal-lm"},
            "data": {"train": str(lm_folder / "story.txt"), "holdout": 2, "max_length": 9},
            "output": {"directory": "out"},
        }
    )
    sets = causal_lm.load_sets(config)
    # 40 times "Hi", " there", ".", "\n": 159 predictions, 8 to a window.
    assert len(sets.train.examples) + len(sets.evaluation.examples) == 20
    assert sets.train.learned + sets.evaluation.learned == 159


def test_a_run_learns_to_write_and_leaves_what_it_promises(lm_folder, capsys):
    settings = (
        *("training.steps=60", "training.evaluate_every=60", "lora.targets=[all-linear]"),
        *("data.packing=true", "data.max_length=40", "evaluation.generate=true"),
        *("evaluation.max_new_tokens=8", "evaluation.limit=4"),
        *("training.batch_size=8",),
    )
    assert train(lm_folder, *settings, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    out = lm_folder / "out"
    evaluations = [row["evaluation"] for row in rows(out) if "evaluation" in row]
    assert result["perplexity"] == result["metrics"]["perplexity"]
    assert result["perplexity"] == pytest.approx(math.exp(result["metrics"]["loss"]))
    assert evaluations[0]["perplexity"] > 10
    assert result["perplexity"] < 1.5
    assert result["metrics"]["token_accuracy"] > 0.8
    assert result["metrics"]["bleu"] > 50
    assert result["metrics"]["prompts"] == 4
    page = (out / "report.html").read_text()
    for words in ("<th>reference</th>", "perplexity on 16 evaluation", "layers/0/attention/query"):
        assert words in page
    card = (out / "adapter" / "README.md").read_text()
    assert "perplexity" in card
    # What the run says of itself is what a fresh load of its adapter gives.
    assert evaluate.main([str(out), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again == pytest.approx(result["metrics"], rel=1e-5)
    assert evaluate.main([str(out), "--json", "--base"]) == 0
    base = json.loads(capsys.readouterr().out)
    assert base["loss"] == pytest.approx(evaluations[0]["loss"], rel=1e-5)


def test_stopped_and_resumed_equals_never_interrupted(lm_folder, monkeypatch):
    log = finetune.log

    def log_and_stop(run, figures, *more):
        log(run, figures, *more)
        if figures[-1]["step"] == 6:
            raise KeyboardInterrupt

    packed = ("data.packing=true", "data.max_length=40")
    assert train(lm_folder, *packed, f"output.directory={lm_folder / 'whole'}") == 0
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "log", log_and_stop)
        assert train(lm_folder, *packed) == exit_codes.INTERRUPTED
    assert train(lm_folder, *packed, "--resume") == 0
    one, other = lm_folder / "whole", lm_folder / "out"
    assert rows(one) == rows(other)
    weights = "adapter/adapter_model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        pytest.param(["lora.targets=[]", "lora.train=['.*']"], None, id="full"),
        pytest.param(
            ["model.scan_layers=true", "model.compute_dtype=bfloat16", "model.remat=dots"],
            4 * (32 + 32) + 4 * (32 + 16),
            id="scanned-layers-in-bfloat16",
        ),
    ],
)
def test_every_choice_of_weights_trains_saves_and_loads(lm_folder, capsys, settings, trained):
    assert train(lm_folder, "training.steps=2", *settings, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["trained_parameters"] == (trained or result["total_parameters"])
    assert evaluate.main([str(lm_folder / "out"), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["loss"] == pytest.approx(result["metrics"]["loss"], rel=1e-5)


def test_a_dry_run_shows_what_is_learned(lm_folder, capsys):
    assert train(lm_folder, "--dry-run", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    example = result["example"]
    prompt, learned = example["text"].removesuffix("⟧").split("⟦")
    assert prompt.endswith("||")
    assert learned.endswith(".<|im_end|>")
    assert len(example["loss_mask"].split()) == len(example["input_ids"].split())
    assert example["loss_mask"].split().count("1") == 7
    assert result["memory"]["total"] > 0
    assert not (lm_folder / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param(["data.label=x"], "`data.label` means nothing to task causal-lm", id="label"),
        pytest.param(["training.best_metric=f1"], "is one of loss, perplexity", id="metric"),
        pytest.param(
            ["data.packing=true", "training.group_by_length=true"], "all of one length", id="both"
        ),
        pytest.param(["lora.targets=[]"], "Nothing would train", id="nothing-trains"),
        pytest.param(["data.max_length=128"], "positions for 64", id="positions"),
        pytest.param(["data.max_length=7"], "nothing is left to learn", id="too-short"),
        pytest.param(["model.remat=some"], "give one of none, full, dots, named", id="remat"),
        pytest.param(
            ["evaluation.generate=true", "evaluation.length_penalty=0.8"],
            "`length_penalty` is for beam search",
            id="options",
        ),
        pytest.param(
            ["evaluation.generate=true", "evaluation.max_new_tokens=60"],
            "positions for 64: make it smaller",
            id="new-tokens",
        ),
    ],
)
def test_wrong_input_ends_with_2_and_leaves_nothing(lm_folder, capsys, settings, message):
    assert train(lm_folder, *settings) == 2
    assert message in capsys.readouterr().err
    assert not (lm_folder / "out").exists()
