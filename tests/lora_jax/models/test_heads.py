"""A decoder is its hidden states and its head, which sums in float32; layers go several a step."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax
from lora_jax.models import from_pretrained, init_cache
from tests.references import checkpoints, decoders

HEADS = {
    ("llama", False): "lm_head",
    ("qwen3", True): "embed_tokens",
    ("gpt2", False): "lm_head",
    ("gpt2", True): "wte",
}
CASES = pytest.mark.parametrize(
    ("family", "tied"), HEADS, ids=["llama-untied", "qwen3-tied", "gpt2-untied", "gpt2-tied"]
)
IDS = np.arange(12, dtype=np.int32).reshape(2, 6)
MASK = np.array([[1] * 6, [1] * 4 + [0] * 2])


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    @functools.cache
    def load_from(family, tied, **options):
        at = tmp_path_factory.mktemp(family)
        if family != "gpt2":
            decoders.checkpoint(at, family)
        else:
            fields = json.loads((checkpoints.HERE / family / "config.json").read_text())
            stored = load_file(checkpoints.HERE / family / "model.safetensors")
            if tied:
                stored.pop("lm_head.weight")
            checkpoints.write(at, fields | {"tie_word_embeddings": tied}, stored)
        return from_pretrained(at, "causal-lm", **options)

    return load_from


@CASES
def test_hidden_states_and_head_make_the_logits(load, family, tied):
    model = load(family, tied)
    assert model.head(model.params).keys() == {HEADS[family, tied]}

    def parts(params):
        hidden = model.hidden(params, IDS, MASK)
        return hidden, model.logits(model.head(params), hidden)

    hidden, logits = jax.jit(parts)(model.params)
    expected = jax.jit(model.apply)(model.params, IDS, MASK)
    assert hidden.shape == (2, 6, 32)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("gpt2", True)])
def test_hidden_states_come_with_a_cache(load, family, tied):
    model = load(family, tied)
    run = jax.jit(lambda params, ids, cache: model.hidden(params, ids, cache=cache))
    cache, parts = init_cache(model.config, 2, 6), []
    for start in (0, 3):
        hidden, cache = run(model.params, IDS[:, start : start + 3], cache)
        parts.append(hidden)
    assert int(cache.length) == 6
    expected = jax.jit(model.hidden)(model.params, IDS)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, rtol=0, atol=1e-5 * largest)


def wide(x):
    return np.asarray(x).astype(np.float64)


@CASES
def test_bfloat16_products_of_the_head_are_summed_in_float32(load, family, tied):
    model = load(family, tied, compute_dtype=jnp.bfloat16)
    hidden = model.hidden(model.params, IDS)
    assert hidden.dtype == jnp.bfloat16
    logits = model.logits(model.params, hidden)
    (weight,) = jax.tree.leaves(model.head(model.params))
    matrix = wide(weight.astype(jnp.bfloat16))
    expected = wide(hidden) @ (matrix.T if tied else matrix)
    # 32 products of 16 bits are exact in float32, and each sum of two rounds at 2**-24.
    largest = np.abs(expected).max()
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=32 * 2**-24 * largest)
    narrow = model.logits(model.params, hidden, dtype=hidden.dtype)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(wide(narrow), expected, rtol=0, atol=2**-8 * largest)


@CASES
def test_an_adapted_head_is_summed_in_float32_too(load, family, tied):
    model = load(family, tied, compute_dtype=jnp.bfloat16)
    name = HEADS[family, tied]
    config = lora_jax.LoraConfig(rank=2, alpha=4.0, targets=(name,))
    frozen, trainable = lora_jax.split(
        model.params, config, jax.random.key(0), layouts=model.layouts
    )
    trainable = jax.tree.map(lambda leaf: leaf + 0.1, trainable)
    params = lora_jax.combine(frozen, trainable)
    lifted = lora_jax.adapt(model.logits, on_materialize="error")
    hidden = model.hidden(model.params, IDS)
    logits = lifted(model.head(params), hidden)
    base = wide(model.logits(model.params, hidden))
    (factors,) = trainable.values()
    first, second = (factors.b.T, factors.a.T) if tied else (factors.a, factors.b)
    first = wide((first * (factors.scale if tied else 1)).astype(jnp.bfloat16))
    second = wide((second * (1 if tied else factors.scale)).astype(jnp.bfloat16))
    between = wide(jnp.asarray(wide(hidden) @ first, jnp.float32).astype(jnp.bfloat16))
    expected = base + between @ second
    assert logits.dtype == jnp.float32
    assert np.abs(expected - base).max() > 0.1
    # What is between may round to its neighbour, 2**-8 of it away; bfloat16 logits would be
    # as far off in every entry.
    largest = np.abs(expected).max()
    assert np.mean(np.abs(logits - expected) < 2**-16 * largest) > 0.9
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2**-8 * largest)


def test_an_encoder_has_none(tmp_path):
    checkpoints.checkpoint(tmp_path, "bert", None)
    model = from_pretrained(tmp_path, "feature-extraction")
    with pytest.raises(ValueError, match="feature-extraction has no hidden states apart from"):
        model.hidden(model.params, IDS)


@pytest.mark.parametrize(("family", "tied", "step"), [("llama", False, 2), ("gpt2", True, 3)])
def test_layers_may_go_several_a_step(load, family, tied, step):
    one = load(family, tied, scan_layers=True)
    several = load(family, tied, scan_layers=True, layers_per_step=step)
    text = str(jax.make_jaxpr(several.hidden)(several.params, IDS))
    assert f"unroll={step}" in text
    expected = jax.jit(one.hidden)(one.params, IDS)
    found = jax.jit(several.hidden)(several.params, IDS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("options", [{"layers_per_step": 2}, {"layers_per_step": 0}])
def test_layers_per_step_needs_a_scan(load, options):
    with pytest.raises(ValueError, match="`layers_per_step` must be at least 1, and 1 without"):
        load("llama", False, **options)
