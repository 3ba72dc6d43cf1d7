"""GPT-2 computes what PyTorch computes, in every form that the module takes, adapted or not."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax
from lora_jax._paths import flatten
from lora_jax.models import Gpt2Config, from_pretrained, init_cache, save_pretrained
from lora_jax.models.gpt2 import name_table, read_config
from lora_jax.testing import assert_trees_equal
from tests.references.checkpoints import HERE, outputs, write

TOLERANCE = 1e-5
FORMS = pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])


def fields(**changes):
    return json.loads((HERE / "gpt2" / "config.json").read_text()) | changes


def tensors(*, tied=True):
    stored = load_file(HERE / "gpt2" / "model.safetensors")
    return {k: v for k, v in stored.items() if not (tied and k == "lm_head.weight")}


def checkpoint(directory, **changes):
    tied = changes.get("tie_word_embeddings", True)
    return write(directory, fields(**changes), tensors(tied=tied))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def load(directory):
    return functools.cache(functools.partial(from_pretrained, directory, "causal-lm"))


@pytest.fixture(scope="module")
def given():
    return outputs("gpt2")


def assert_kept_equal(actual, expected, mask, atol=TOLERANCE):
    kept = np.asarray(mask, bool)
    np.testing.assert_allclose(np.asarray(actual)[kept], expected[kept], rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("form", "scan_layers"),
    [
        pytest.param("tied", False, id="tied-unrolled"),
        pytest.param("tied", True, id="tied-scanned"),
        pytest.param("untied", True, id="untied-scanned"),
    ],
)
def test_logits_equal_pytorch_under_either_padding(tmp_path, given, form, scan_layers):
    checkpoint(tmp_path, tie_word_embeddings=form == "tied")
    model = from_pretrained(tmp_path, "causal-lm", scan_layers=scan_layers)
    mask = given["attention_mask"]
    logits = jax.jit(model.apply)(model.params, given["input_ids"], mask)
    assert (logits.dtype, logits.shape) == (jnp.float32, (3, 12, 99))
    assert_kept_equal(logits, given[form], mask)


@FORMS
def test_a_cache_gives_the_same_logits_token_by_token(load, given, scan_layers):
    model = load(scan_layers=scan_layers)
    ids, mask = given["input_ids"], given["attention_mask"]
    step = jax.jit(lambda p, i, m, c: model.apply(p, i, m, cache=c))
    cache, pieces = init_cache(model.config, 3, 16), []
    for start, stop in ((0, 5), *((t, t + 1) for t in range(5, 12))):
        logits, cache = step(model.params, ids[:, start:stop], mask[:, start:stop], cache)
        pieces.append(logits)
    assert int(cache.length) == 12
    assert_kept_equal(np.concatenate(pieces, axis=1), given["tied"], mask)


def test_rows_of_a_cache_can_be_reordered(load, given):
    model, ids = load(), given["input_ids"][:, :6]
    step = jax.jit(lambda p, i, c: model.apply(p, i, cache=c))
    order = jnp.array([1, 1, 0])
    logits, cache = step(model.params, ids, init_cache(model.config, 3, 12))
    cache = cache._replace(
        key=cache.key[:, order],
        value=cache.value[:, order],
        valid=cache.valid[order],
        positions=cache.positions[order],
    )
    reordered, _ = step(model.params, ids[order], cache)
    _, cache = step(model.params, ids[order], init_cache(model.config, 3, 12))
    expected, _ = step(model.params, ids[order], cache)
    np.testing.assert_allclose(reordered, expected, rtol=0, atol=TOLERANCE)
    assert not np.allclose(reordered, logits[order], atol=1e-2)


def test_positions_may_be_given(load, given):
    model, kept = load(), given["attention_mask"]
    apply = jax.jit(lambda p, ids, positions: model.apply(p, ids, kept, positions=positions))
    told = apply(model.params, given["input_ids"], given["position_ids"])
    assert_kept_equal(told, given["tied"], kept)
    shifted = apply(model.params, given["input_ids"], given["position_ids"] + 3)
    assert not np.allclose(shifted, told, atol=1e-2)


def test_packed_segments_equal_their_own_rows(load, given):
    model, ids = load(), given["input_ids"]
    packed = np.concatenate([ids[0, :5], ids[1, :5], [0, 0]])[None]
    segments = np.array([[1] * 5 + [2] * 5 + [0] * 2])
    logits = jax.jit(lambda p: model.apply(p, packed, segment_ids=segments))(model.params)
    alone = jax.jit(model.apply)(model.params, ids[:2, :5])
    np.testing.assert_allclose(logits[0, :10].reshape(alone.shape), alone, rtol=0, atol=TOLERANCE)


def test_remat_changes_memory_only(load, given):
    ids = given["input_ids"][:1]
    plain, remat = (load(remat=remat) for remat in (False, True))

    def loss(table, model):
        params = {**model.params, "wpe": table}  # its gradient passes through every layer
        return jnp.mean(model.apply(params, ids, dropout_key=jax.random.key(1)) ** 2)

    table = plain.params["wpe"]
    grads = [jax.grad(lambda t, m=m: loss(t, m)) for m in (plain, remat)]
    jaxprs = [str(jax.make_jaxpr(grad)(table)) for grad in grads]
    assert ["checkpoint[" in text or "remat" in text for text in jaxprs] == [False, True]
    one, two = (jax.jit(grad)(table)["embedding"] for grad in grads)
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)


RATES = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


@pytest.mark.parametrize("field", RATES)
def test_each_dropout_is_its_own_and_follows_its_key(tmp_path, given, field):
    checkpoint(tmp_path, **dict.fromkeys(RATES, 0.0) | {field: 0.5})
    model = from_pretrained(tmp_path, "causal-lm")
    apply = jax.jit(model.apply)
    one, same, two = (
        apply(
            model.params,
            given["input_ids"],
            given["attention_mask"],
            dropout_key=jax.random.key(seed),
        )
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, two, atol=1e-3)
    kept = given["attention_mask"] == 1
    assert not np.allclose(one[kept], given["tied"][kept], atol=1e-3)


def test_attention_written_out_for_dropout_is_the_same_attention(tmp_path, given):
    checkpoint(tmp_path, **dict.fromkeys(RATES, 0.0) | {"attn_pdrop": 1e-9})
    model = from_pretrained(tmp_path, "causal-lm")
    mask = given["attention_mask"]
    apply = jax.jit(model.apply)
    logits = apply(model.params, given["input_ids"], mask, dropout_key=jax.random.key(0))
    assert_kept_equal(logits, given["tied"], mask)


@FORMS
def test_each_layer_draws_its_own_dropout(tmp_path, scan_layers):
    # Layers that only add a constant to half of the units: two equal draws leave two values
    # in a token's stream, two different ones leave three.
    checkpoint(tmp_path, **dict.fromkeys(RATES, 0.0) | {"resid_pdrop": 0.5})
    model = from_pretrained(tmp_path, "causal-lm", scan_layers=scan_layers)
    flat, treedef = flatten(model.params)
    flat = {
        path: (jnp.ones_like if path.endswith("mlp/down/bias") else jnp.zeros_like)(weight)
        for path, weight in flat.items()
    }
    flat["norm/scale"] = jnp.ones_like(flat["norm/scale"])
    flat["wte/embedding"] = jnp.eye(99, 32)  # logits are then the normed stream itself
    params, ids = treedef.unflatten(flat.values()), np.array([[98]], np.int32)
    logits = jax.jit(model.apply)(params, ids, dropout_key=jax.random.key(0))
    assert len(np.unique(np.round(logits[0, 0, :32], 3))) == 3


def test_bfloat16_is_close_and_logits_are_float32(load, given):
    model = load(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    mask = given["attention_mask"]
    logits = jax.jit(model.apply)(model.params, given["input_ids"], mask)
    assert logits.dtype == jnp.float32
    # About ten roundings of 2^-9 on the way to logits of up to 6.
    assert_kept_equal(logits, given["tied"], mask, atol=10 * 2**-9 * 6)


def test_weights_may_be_float32_and_arithmetic_bfloat16(load, given):
    model = load(compute_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.float32)}
    jaxpr = str(jax.make_jaxpr(model.apply)(model.params, given["input_ids"]))
    for line in jaxpr.splitlines():
        if "= exp " in line or "= rsqrt " in line or "= reduce_max" in line:
            assert "bf16" not in line
        if "99]" in line and "dot_general" in line:
            assert ":f32[" in line.partition("=")[0]
    assert "rsqrt" in jaxpr
    assert "bf16" in jaxpr


# --- names ---------------------------------------------------------------------------------------


def old_file():
    """A file as first published: no prefix, and the causal masks beside the weights."""
    stored = {name.removeprefix("transformer."): t for name, t in tensors().items()}
    for layer in range(2):
        stored[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 24, 24), np.float32))
        stored[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    return stored


def tied_copy():
    stored = tensors()
    return {**stored, "lm_head.weight": stored["transformer.wte.weight"]}


@pytest.mark.parametrize("stored", [old_file, tied_copy])
def test_files_of_either_spelling_are_read(tmp_path, load, stored):
    model = from_pretrained(write(tmp_path, fields(), stored()), "causal-lm")
    assert_trees_equal(model.params, load().params)
    assert model.new == ()


def test_a_head_that_differs_from_the_table_it_is_tied_to_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tied: lm_head.weight differs from transformer.wte"):
        from_pretrained(write(tmp_path, fields(), tensors(tied=False)), "causal-lm")


@FORMS
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_is_saved_is_what_was_read(tmp_path, tied, scan_layers):
    checkpoint(tmp_path / "theirs", tie_word_embeddings=tied)
    model = from_pretrained(tmp_path / "theirs", "causal-lm", scan_layers=scan_layers)
    save_pretrained(tmp_path / "ours", model, model.params)
    saved, original = load_file(tmp_path / "ours" / "model.safetensors"), tensors(tied=tied)
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(saved[name], tensor)
    again = from_pretrained(tmp_path / "ours", "causal-lm")
    assert again.config == model.config


@pytest.mark.parametrize(
    ("scan_layers", "path"),
    [
        pytest.param(False, "layers/1/attention/qkv/kernel", id="unrolled"),
        pytest.param(True, "layers/attention/qkv/kernel", id="scanned"),
    ],
)
def test_names_give_the_published_modules(scan_layers, path):
    entry = name_table(read_config(fields()), "causal-lm", scan_layers=scan_layers).entries[path]
    expected = [f"transformer.h.{layer}.attn.c_attn" for layer in (0, 1)]
    assert list(entry.modules) == (expected if scan_layers else expected[1:])
    assert (entry.kind, entry.transposed, entry.stacked) == ("conv1d", False, scan_layers)


# --- the config ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        pytest.param({"activation_function": "mish"}, "`activation_function` 'mish'", id="act"),
        pytest.param({"scale_attn_weights": False}, "`scale_attn_weights` is False", id="scale"),
        pytest.param(
            {"scale_attn_by_inverse_layer_idx": True},
            "`scale_attn_by_inverse_layer_idx` is True; only False",
            id="scale-by-layer",
        ),
        pytest.param({"reorder_and_upcast_attn": True}, "`reorder_and_upcast_attn`", id="upcast"),
        pytest.param({"add_cross_attention": True}, "`add_cross_attention`", id="cross"),
        pytest.param({"n_ctx": 23}, "`n_ctx` is 23; only 24 is supported", id="n-ctx"),
        pytest.param({"n_embed": 8}, "`n_embed` is unknown. Did you mean `n_embd`", id="misspelt"),
        pytest.param({"n_inner": "48"}, "`n_inner` must be int or null, got '48'", id="type"),
        pytest.param({"n_inner": 0}, "`n_inner` must be at least 1, got 0", id="size"),
        pytest.param({"n_head": 5}, "`n_embd` 32 must be a multiple of `n_head` 5", id="heads"),
        pytest.param({"attn_pdrop": 1.0}, r"`attn_pdrop` must be in \[0, 1\)", id="dropout"),
    ],
)
def test_config_refuses(changes, match):
    with pytest.raises(ValueError, match=match):
        read_config(fields(**changes))


def test_config_refuses_labels():
    with pytest.raises(ValueError, match="has no labels, got num_labels=2"):
        read_config(fields(), num_labels=2)


def test_config_of_the_first_release_is_read():
    published = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 1024,
        "n_head": 16,
        "n_layer": 24,
        "n_positions": 1024,
        "n_special": 0,
        "predict_special_tokens": True,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    }
    config = read_config(published)
    assert config == Gpt2Config(
        vocab_size=50257, n_positions=1024, n_embd=1024, n_layer=24, n_head=16
    )
    assert (config.head_dim, config.num_hidden_layers, config.num_key_value_heads) == (64, 24, 16)
    assert config.max_length == 1024


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param((np.zeros((2, 25), np.int32),), "25 tokens long.*for 24", id="too-long"),
        pytest.param((np.zeros((2, 4), np.float32),), "must be integers", id="floats"),
        pytest.param(
            (np.zeros((2, 4), np.int32), np.ones((2, 5), np.int32)),
            "`attention_mask` must have the shape",
            id="mask-shape",
        ),
    ],
)
def test_apply_refuses(load, arguments, match):
    with pytest.raises(ValueError, match=match):
        load().apply(load().params, *arguments)


def test_a_position_outside_the_table_is_not_silent(load):
    model, ids = load(), np.zeros((2, 2), np.int32)
    positions = np.array([[0, 1], [0, 24]])
    logits = jax.jit(lambda p: model.apply(p, ids, positions=positions))(model.params)
    assert np.isfinite(logits[0]).all()
    assert np.isnan(logits[1, 1]).all()


# --- adapted -------------------------------------------------------------------------------------

ADAPTERS = {
    "all-linear": {"targets": ("all-linear",)},
    "query-and-value": {
        "targets": ("attention/qkv",),
        "parts": {"attention/qkv": (True, False, True)},
    },
    "tied-table-and-positions": {"targets": ("wte", "wpe", "mlp/up")},
}


@pytest.mark.parametrize(
    ("adapter", "scan_layers", "remat"),
    [
        pytest.param("all-linear", False, True, id="all-linear-unrolled-remat"),
        pytest.param("query-and-value", True, False, id="query-and-value-scanned"),
        pytest.param("tied-table-and-positions", True, False, id="tied-table-and-positions"),
    ],
)
def test_adapted_equals_merged(load, given, adapter, scan_layers, remat):
    model = load(scan_layers=scan_layers, remat=remat)
    ids, mask = jnp.asarray(given["input_ids"]), jnp.asarray(given["attention_mask"])
    config = lora_jax.LoraConfig(rank=2, alpha=4.0, **ADAPTERS[adapter])
    layouts = lora_jax.layouts(model.apply, model.params, ids, mask)
    frozen, trainable = lora_jax.split(model.params, config, jax.random.key(0), layouts=layouts)
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    adapted = lora_jax.adapt(model.apply, on_materialize="error")

    def gradient(forward):
        def loss(trainable):
            logits = forward(trainable)
            return jnp.mean(jnp.where(mask[:, :, None] == 1, logits, 0.0) ** 2)

        return jax.jit(jax.value_and_grad(loss))(trainable)

    one = gradient(lambda t: adapted(lora_jax.combine(frozen, t), ids, mask))
    two = gradient(lambda t: model.apply(lora_jax.merge(frozen, t), ids, mask))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-4), one, two)
    assert one[0] != jnp.mean(jnp.where(mask[:, :, None] == 1, given["tied"], 0.0) ** 2)


def test_adapted_with_a_cache_equals_merged(load, given):
    model, ids = load(scan_layers=True), given["input_ids"]
    config = lora_jax.LoraConfig(rank=2, alpha=4.0, **ADAPTERS["query-and-value"])
    layouts = lora_jax.layouts(model.apply, model.params, ids)
    frozen, trainable = lora_jax.split(model.params, config, jax.random.key(0), layouts=layouts)
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    adapted = lora_jax.adapt(model.apply, on_materialize="error")
    cache = init_cache(model.config, 3, 12)
    logits, _ = jax.jit(adapted)(lora_jax.combine(frozen, trainable), ids, cache=cache)
    expected = jax.jit(model.apply)(lora_jax.merge(frozen, trainable), ids)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=10 * TOLERANCE)


def test_trained_parameters_are_those_counted_by_hand(directory):
    model = from_pretrained(directory, "causal-lm", abstract=True)
    config = lora_jax.LoraConfig(rank=4, alpha=32.0, **ADAPTERS["query-and-value"])
    # 2 layers * 2 parts * (a: 32 * 4, b: 4 * 32)
    assert lora_jax.summary(model.params, config).trained == 2 * 2 * 256
