"""LoRA on BERT takes the low-rank path everywhere and computes what merged weights compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.models import from_pretrained
from tests.references.checkpoints import checkpoint, outputs


@pytest.mark.parametrize(
    ("scan_layers", "remat"),
    [
        pytest.param(False, False, id="unrolled"),
        pytest.param(False, True, id="unrolled-remat"),
        pytest.param(True, False, id="scanned"),
        pytest.param(True, True, id="scanned-remat"),
    ],
)
@pytest.mark.parametrize(
    ("family", "task", "targets"),
    [
        pytest.param("bert", "sequence-classification", ("all-linear",), id="bert"),
        pytest.param("roberta", "masked-lm", ("query", "word_embeddings"), id="tied-embedding"),
    ],
)
def test_adapted_equals_merged(tmp_path, family, task, targets, scan_layers, remat):
    directory = checkpoint(tmp_path, family, task)
    model = from_pretrained(directory, task, scan_layers=scan_layers, remat=remat)
    stored = outputs(family)
    ids, mask = jnp.asarray(stored["input_ids"]), jnp.asarray(stored["attention_mask"])
    config = lora_jax.LoraConfig(rank=2, alpha=4.0, targets=targets)
    layouts = lora_jax.layouts(model.apply, model.params, ids, mask)
    frozen, trainable = lora_jax.split(model.params, config, jax.random.key(0), layouts=layouts)
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    adapted = lora_jax.adapt(model.apply, on_materialize="error")

    def through_adapt(trainable):
        return adapted(lora_jax.combine(frozen, trainable), ids, mask)

    def through_merge(trainable):
        return model.apply(lora_jax.merge(frozen, trainable), ids, mask)

    def gradient(apply):
        return jax.jit(jax.value_and_grad(lambda t: jnp.mean(apply(t) ** 2)))(trainable)

    one, two = gradient(through_adapt), gradient(through_merge)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), one, two)


def test_trained_parameters_are_those_counted_by_hand(tmp_path):
    model = from_pretrained(checkpoint(tmp_path, "bert", "sequence-classification"), abstract=True)
    config = lora_jax.LoraConfig(
        rank=4, alpha=8.0, targets=("query", "value"), train=("classifier/.*",)
    )
    _, trainable = lora_jax.split(
        jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), model.params), config, jax.random.key(0)
    )
    # 2 layers * 2 matrices * (a: 32 * 4, b: 4 * 32), and a head of 32 * 3 + 3
    assert sum(leaf.size for leaf in jax.tree.leaves(trainable)) == 2 * 2 * 256 + 99
