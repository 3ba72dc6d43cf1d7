"""LoRA on the Llama family takes the low-rank path and computes what merged weights compute."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax.models import from_pretrained, init_cache
from lora_jax.testing import assert_trees_close
from tests.references.decoders import checkpoint, outputs

CASES = [
    pytest.param("llama", ("all-linear", "lm_head"), False, "dots", id="untied-head-unrolled-dots"),
    pytest.param("gemma3", ("all-linear", "embed_tokens"), True, False, id="tied-table-scanned"),
]


def adapters(directory, family, targets, scan_layers, remat):
    model = from_pretrained(
        checkpoint(directory, family), "causal-lm", scan_layers=scan_layers, remat=remat
    )
    ids = jnp.asarray(outputs(family)["input_ids"])
    config = lora_jax.LoraConfig(rank=2, alpha=4.0, targets=targets)
    layouts = lora_jax.layouts(model.apply, model.params, ids)
    frozen, trainable = lora_jax.split(model.params, config, jax.random.key(0), layouts=layouts)
    return model, frozen, jax.tree.map(lambda x: x + 0.05, trainable)


@pytest.mark.parametrize(("family", "targets", "scan_layers", "remat"), CASES)
def test_adapted_equals_merged(tmp_path, family, targets, scan_layers, remat):
    model, frozen, trainable = adapters(tmp_path, family, targets, scan_layers, remat)
    stored = outputs(family)
    ids, mask = jnp.asarray(stored["input_ids"]), jnp.asarray(stored["attention_mask"])
    adapted = lora_jax.adapt(model.apply, on_materialize="error")

    def through_adapt(trainable):
        return adapted(lora_jax.combine(frozen, trainable), ids, mask)

    def through_merge(trainable):
        return model.apply(lora_jax.merge(frozen, trainable), ids, mask)

    def gradient(apply):
        return jax.jit(jax.value_and_grad(lambda t: jnp.mean(apply(t) ** 2)))(trainable)

    # Both are float32 and associate products differently.
    assert_trees_close(gradient(through_adapt), gradient(through_merge), relative=1e-3)


def test_an_adapted_model_decodes_with_a_cache(tmp_path):
    model, frozen, trainable = adapters(tmp_path, "mistral", ("all-linear",), False, False)
    ids = jnp.asarray(outputs("mistral")["input_ids"])
    adapted = jax.jit(lora_jax.adapt(model.apply, on_materialize="error"))
    params = lora_jax.combine(frozen, trainable)
    whole = adapted(params, ids)
    cache, parts = init_cache(model.config, len(ids), 12), []
    for start in range(0, 12, 4):
        logits, cache = adapted(params, ids[:, start : start + 4], cache=cache)
        parts.append(logits)
    # logits of about 10, after some hundred roundings of 2**-24 each
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=3e-5)
