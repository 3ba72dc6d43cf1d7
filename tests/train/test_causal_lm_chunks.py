"""The loss of causal LM in chunks of tokens is the loss of all at once, on one device or eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import models, training
from lora_jax.testing import assert_trees_close
from tests.train import conftest
from train import losses, text_rows
from train.batches import collate
from train.config import DataSection
from train.model import adapt, make_train_step
from train.records import Pair
from train.tasks import causal_lm

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
        return losses.mean(*causal_lm.loss(of_chunks, params, batch, 0.1)), right

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
        params = lora_jax.combine(frozen, trainable)
        return losses.mean(*causal_lm.loss(of_chunks, params, batch, 0.0))

    def outputs(trainable):
        return causal_lm.outputs(of_chunks, lora_jax.combine(frozen, trainable), batch)

    for fn in (jax.grad(loss), outputs):
        jax.eval_shape(fn, trainable)
        assert set(seen) == {(rows, 5), (rows, length % 5)}
        seen.clear()


def test_a_step_on_eight_devices_is_that_of_one_and_gathers_nothing(
    tokenizer, decoder_directory, monkeypatch
):
    monkeypatch.setattr("train.model.CHUNK", 5)  # tokens of a device: the loss is a loop
    model = models.from_pretrained(decoder_directory, task="causal-lm", remat="named")
    batch, (frozen, trainable) = batch_of(tokenizer), halves(model)
    found = []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh, tx = training.make_mesh(devices=devices), optax.sgd(1e-3)
        step = make_train_step(causal_lm, model, tx, mesh, 0.1)
        begin = training.init_state(trainable, tx, jax.random.key(0))
        state, frozen = training.replicate((begin, frozen), mesh)
        arguments = (state, frozen, training.shard_batch(batch, mesh))
        program = step.lower(*arguments).compile()
        metrics = jax.device_get(program(*arguments)[1])
        found.append({name: float(value) for name, value in metrics.items()})
    text = program.as_text()
    assert f"[1,5,{len(tokenizer)}]" in text
    for moved in ("all-gather", "all-to-all", "collective-permute"):
        assert moved not in text
    # Float32 sums of some hundred terms in another order.
    assert found[1] == pytest.approx(found[0], rel=1e-5)


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
        marked = {**batch, "loss_mask": learned}
        return float(losses.mean(*causal_lm.loss(of_chunks, params, marked, 0.0)))

    assert each(0) != each(4)
    of_chunks = of_chunks._replace(chunk=4096)
    plain = {**params, "embed_tokens": model.params["embed_tokens"]}
    assert float(losses.mean(*causal_lm.loss(of_chunks, plain, batch, 0.0))) != each(0)
