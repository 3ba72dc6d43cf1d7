"""The causal-LM task: its loss by hand, its counts, and a run end to end."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import models
from lora_jax.testing import assert_trees_close
from tests.train import conftest
from train import cli, evaluate, finetune, losses, text_rows
from train.batches import collate
from train.config import Config, DataSection
from train.model import adapt
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
    found = causal_lm.loss(*given(logits, batch, chunk), smoothing)
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
    assert causal_lm.loss(*given(jnp.ones((1, 3, 4)), batch), 0.0) == 0


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


ADAPTERS = lora_jax.LoraConfig(rank=2, alpha=4.0, targets=("all-linear", "embed_tokens"))


def halves(model, config=ADAPTERS):
    frozen, trainable = lora_jax.split(
        model.params, config, jax.random.key(0), layouts=model.layouts
    )
    source = np.random.default_rng(0)
    return frozen, jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.1 * source.normal(size=leaf.shape), leaf.dtype), trainable
    )


def batch_of(tokenizer):
    """Eight rows of different lengths, packed and not."""
    section = DataSection(train="rows.txt", holdout=1)
    pairs = [Pair(*line.split("||")) for line in conftest.meanings(8)]
    encoded = text_rows.encode(tokenizer, pairs, section)
    return collate(encoded, range(8), encoded.lengths)


@pytest.mark.parametrize("compute_dtype", [jnp.float32, jnp.bfloat16])
def test_chunks_change_nothing_of_loss_gradient_and_outputs(
    tokenizer, decoder_directory, compute_dtype
):
    """The table is adapted where it is looked up and where it is the head."""
    model = models.from_pretrained(decoder_directory, task="causal-lm", compute_dtype=compute_dtype)
    batch, (frozen, trainable) = batch_of(tokenizer), halves(model)
    apply = lora_jax.adapt(model.apply, on_materialize="error")

    def plain(trainable):
        logits = causal_lm.apply(apply, lora_jax.combine(frozen, trainable), batch)
        targets, weights = losses.next_tokens(batch)
        each = losses.cross_entropy(logits, targets, 0.1) * weights
        right = ((logits.argmax(axis=-1) == targets) * weights).sum(axis=1)
        return each.sum() / weights.sum(), right

    def chunked(trainable):
        of_chunks = adapt(model)._replace(chunk=8 * 5)
        params = lora_jax.combine(frozen, trainable)
        right = causal_lm.outputs(of_chunks, params, batch)[:, 1]
        return causal_lm.loss(of_chunks, params, batch, 0.1), right

    one, two = (jax.jit(jax.value_and_grad(fn, has_aux=True))(trainable) for fn in (plain, chunked))
    np.testing.assert_array_equal(one[0][1], two[0][1])
    np.testing.assert_allclose(one[0][0], two[0][0], rtol=1e-5)
    # What each chunk hands on, downwards and to the table, is rounded once more.
    assert_trees_close(two[1], one[1], relative=8 * float(jnp.finfo(compute_dtype).eps))


def test_the_logits_of_the_whole_batch_never_exist(tokenizer, decoder_directory):
    model = models.from_pretrained(decoder_directory, task="causal-lm")
    batch, (frozen, trainable) = batch_of(tokenizer), halves(model)
    rows, length = batch["input_ids"].shape
    seen = []

    def logits(head, hidden, dtype=jnp.float32):
        seen.append(hidden.shape[:2])
        return adapt(model).logits(head, hidden, dtype)

    of_chunks = adapt(model)._replace(logits=logits, chunk=rows * 5)

    def loss(trainable):
        return causal_lm.loss(of_chunks, lora_jax.combine(frozen, trainable), batch, 0.0)

    def outputs(trainable):
        return causal_lm.outputs(of_chunks, lora_jax.combine(frozen, trainable), batch)

    for fn in (jax.grad(loss), outputs):
        jax.eval_shape(fn, trainable)
        assert set(seen) == {(rows, 5), (rows, length % 5)}
        seen.clear()


def test_every_chunk_draws_its_own_dropout_of_the_head(tokenizer, decoder_directory):
    """With all tokens alike, equal masks would give equal chunks."""
    model = models.from_pretrained(decoder_directory, task="causal-lm")
    config = dataclasses.replace(ADAPTERS, targets=("embed_tokens",), dropout=0.5)
    frozen, trainable = halves(model, config)
    params = lora_jax.combine(frozen, trainable, dropout_key=jax.random.key(1))
    batch = {"input_ids": jnp.full((1, 8), 5), "loss_mask": jnp.ones((1, 8), int)}
    alike = jnp.broadcast_to(model.hidden(model.params, batch["input_ids"])[:, :1], (1, 8, 32))
    of_chunks = adapt(model)._replace(hidden=lambda *_, **__: alike, chunk=4)
    batch |= {"attention_mask": jnp.ones((1, 8), int)}

    def each(place):  # the loss of the tokens of one chunk: the last position predicts nothing
        learned = jnp.zeros((1, 8), int).at[0, place + 1 : place + 4].set(1)
        return float(causal_lm.loss(of_chunks, params, {**batch, "loss_mask": learned}, 0.0))

    assert each(0) != each(4)
    of_chunks = of_chunks._replace(chunk=4096)
    plain = {**params, "embed_tokens": model.params["embed_tokens"]}
    assert float(causal_lm.loss(of_chunks, plain, batch, 0.0)) != each(0)


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

    def log_and_stop(run, figures, seconds):
        log(run, figures, seconds)
        if figures[-1]["step"] == 6:
            raise KeyboardInterrupt

    packed = ("data.packing=true", "data.max_length=40")
    assert train(lm_folder, *packed, f"output.directory={lm_folder / 'whole'}") == 0
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "log", log_and_stop)
        assert train(lm_folder, *packed) == cli.INTERRUPTED
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
        pytest.param(["model.remat=some"], "`remat` must be", id="remat"),
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
