"""The Llama family computes what PyTorch computes, in every form that the module takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.models import from_pretrained, init_cache, llama
from lora_jax.testing import assert_trees_close
from tests.references.decoders import FAMILIES, checkpoint, config_json, outputs

TOLERANCE = 1e-5  # logits are below 10 and come of some hundred roundings of 2**-24
FORMS = [pytest.param(False, id="unrolled"), pytest.param(True, id="scanned")]
# Every member scanned; unrolled, one whose layers are alike and the two that have both kinds.
CASES = [
    *(pytest.param(family, True, id=f"{family}-scanned") for family in FAMILIES),
    *(pytest.param(f, False, id=f"{f}-unrolled") for f in ("llama", "qwen2", "gemma3")),
]
# Every member once; of layers of both kinds one in each form.
ONCE = [case for case in CASES if case.values in {(f, f != "qwen2") for f in FAMILIES}]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    def load_from(family, **options):
        directory = checkpoint(tmp_path_factory.mktemp(family), family)
        return from_pretrained(directory, "causal-lm", **options)

    return functools.cache(load_from)


@pytest.fixture(scope="module")
def applied(load):
    """Model to compiled function, so that tests that call it alike compile it once."""
    return functools.cache(lambda family, scan: jax.jit(load(family, scan_layers=scan).apply))


@pytest.mark.parametrize(("family", "scan_layers"), CASES)
def test_logits_equal_pytorch(load, applied, family, scan_layers):
    expected = outputs(family)
    model, apply = load(family, scan_layers=scan_layers), applied(family, scan_layers)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    plain, padded = apply(model.params, ids), apply(model.params, ids, mask)
    assert plain.dtype == jnp.float32
    np.testing.assert_allclose(plain, expected["plain"], rtol=0, atol=TOLERANCE)
    kept = mask == 1
    np.testing.assert_allclose(padded[kept], expected["padded"][kept], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("family", "scan_layers"), ONCE)
def test_cache_equals_no_cache(load, applied, family, scan_layers):
    expected = outputs(family)
    model, apply = load(family, scan_layers=scan_layers), applied(family, scan_layers)
    ids, mask = expected["input_ids"], expected["attention_mask"]
    cache, logits = init_cache(model.config, len(ids), 15), []
    # Several tokens a call where layers are of both kinds; every other family one by one.
    first = 6 if family in ("qwen2", "gemma3") else 0
    steps = [(i, i + 3) for i in range(0, first, 3)] + [(i, i + 1) for i in range(first, 12)]
    for start, stop in steps:
        now, cache = apply(model.params, ids[:, start:stop], mask[:, start:stop], cache=cache)
        logits.append(now)
    kept = mask == 1
    found = np.concatenate(logits, axis=1)
    np.testing.assert_allclose(found[kept], expected["padded"][kept], rtol=0, atol=TOLERANCE)
    assert int(cache.length) == 12
    np.testing.assert_array_equal(cache.valid[:, :12], kept)


def test_rows_of_a_cache_are_reordered_as_a_tree(load, applied):
    model, apply = load("gemma3", scan_layers=True), applied("gemma3", True)
    ids, mask = outputs("gemma3")["input_ids"], np.ones((3, 3), np.int64)
    order = np.array([2, 0, 0])
    _, cache = apply(model.params, ids[:, :3], mask, cache=init_cache(model.config, 3, 15))
    moved = cache._replace(
        key=cache.key[:, order],
        value=cache.value[:, order],
        valid=cache.valid[order],
        positions=cache.positions[order],
    )
    one, _ = apply(model.params, ids[:, 3:6], mask, cache=cache)
    two, _ = apply(model.params, ids[order, 3:6], mask, cache=moved)
    np.testing.assert_allclose(two, one[order], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("family", "scan_layers"), ONCE)
def test_packed_sequences_are_as_each_alone(load, applied, family, scan_layers):
    model, apply = load(family, scan_layers=scan_layers), applied(family, scan_layers)
    ids = outputs(family)["input_ids"]
    segments = np.array([[3, 3, 3, 1, 1, 1, 1, 1, 1, 1, 0, 0]])
    packed = apply(model.params, ids[:1], segment_ids=segments)
    alone, mask = ids.copy(), np.zeros_like(outputs(family)["attention_mask"])
    for row, (start, stop) in enumerate(((0, 3), (3, 10))):
        alone[row, : stop - start], mask[row, : stop - start] = ids[0, start:stop], 1
    logits = apply(model.params, alone, mask)
    np.testing.assert_allclose(packed[0, :3], logits[0, :3], rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(packed[0, 3:10], logits[1, :7], rtol=0, atol=TOLERANCE)


def test_positions_may_be_given(load, applied):
    model, apply, expected = (
        load("llama", scan_layers=True),
        applied("llama", True),
        outputs("llama"),
    )
    ids, mask, positions = (
        expected[name] for name in ("input_ids", "attention_mask", "position_ids")
    )
    kept = mask == 1
    given = apply(model.params, ids, mask, positions=positions)[kept]
    np.testing.assert_allclose(given, expected["padded"][kept], rtol=0, atol=TOLERANCE)
    farther = apply(model.params, ids, mask, positions=positions * 3)[kept]
    assert not np.allclose(farther, given, atol=1e-2)


def test_remat_changes_memory_only(load):
    # GPT-2 and BERT unroll the same layers; here a policy has a name and a scan both kinds.
    ids = outputs("qwen2")["input_ids"][:1]
    plain, remat = (load("qwen2", scan_layers=True, remat=name) for name in (False, "dots"))

    def loss(table, model):
        params = {**model.params, "embed_tokens": table}  # every layer is on its gradient's way
        return jnp.mean(model.apply(params, ids) ** 2)

    table = plain.params["embed_tokens"]
    gradients = [jax.grad(functools.partial(loss, model=model)) for model in (plain, remat)]
    jaxprs = [str(jax.make_jaxpr(gradient)(table)) for gradient in gradients]
    assert ["checkpoint" in text or "remat" in text for text in jaxprs] == [False, True]
    one, two = (jax.jit(gradient)(table) for gradient in gradients)
    # The same operations, fused differently: rounding of sums of some hundred terms.
    assert_trees_close(two, one, relative=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_bfloat16_is_close_and_logits_are_float32(load, family):
    expected = outputs(family)
    model = load(family, scan_layers=True, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    logits = jax.jit(model.apply)(model.params, expected["input_ids"])
    assert logits.dtype == jnp.float32
    # A layer rounds about ten times, each time by 2**-9 at most, and errors add like a walk:
    # 2**-9 * sqrt(10 * layers) is 1 % of a typical activation; five times that for the largest.
    largest = np.abs(expected["plain"]).max()
    np.testing.assert_allclose(logits, expected["plain"], rtol=0, atol=0.05 * largest)


def test_bfloat16_keeps_softmax_norms_and_rotations_in_float32(load):
    model = load("gemma3", scan_layers=True, dtype=jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(model.apply)(model.params, outputs("gemma3")["input_ids"]))
    for operation in ("exp", "rsqrt", "cos", "sin", "reduce_max"):
        lines = [line for line in jaxpr.splitlines() if f"= {operation}" in line]
        assert lines
        assert not any("bf16" in line for line in lines)


def test_weights_may_be_float32_and_arithmetic_bfloat16(load):
    model = load("qwen3", compute_dtype=jnp.bfloat16, scan_layers=True)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.float32)}
    hidden = jax.jit(model.hidden)(model.params, outputs("qwen3")["input_ids"])
    assert hidden.dtype == jnp.bfloat16


@pytest.mark.parametrize("scan_layers", FORMS)
def test_dropout_key_is_accepted_and_nothing_is_drawn_from_it(load, scan_layers):
    model, ids = load("mistral", scan_layers=scan_layers), outputs("mistral")["input_ids"]
    key = jax.random.key(0)
    jaxpr = jax.make_jaxpr(lambda params: model.apply(params, ids, dropout_key=key))(model.params)
    assert "random_bits" not in str(jaxpr)


def test_a_token_outside_the_vocabulary_is_not_silent(load, applied):
    ids = outputs("llama")["input_ids"].copy()
    ids[1, 5] = 99
    logits = applied("llama", True)(load("llama", scan_layers=True).params, ids)
    np.testing.assert_array_equal(np.isnan(logits).any(axis=(1, 2)), [False, True, False])


def test_old_buffers_and_a_copy_of_the_tied_table_are_read_past(tmp_path):
    file = checkpoint(tmp_path, "qwen3") / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_file(tensors, file)
    assert "lm_head" not in from_pretrained(tmp_path, "causal-lm").params
    save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1}, file)
    with pytest.raises(ValueError, match=r"tied: lm_head.weight differs"):
        from_pretrained(tmp_path, "causal-lm")


def test_a_base_without_its_head_is_refused(tmp_path):
    file = checkpoint(tmp_path, "llama") / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "lm_head.weight"}, file)
    with pytest.raises(ValueError, match=r"missing: lm_head.weight"):
        from_pretrained(tmp_path, "causal-lm")


@pytest.mark.parametrize("scan_layers", FORMS)
def test_paths_and_published_names(scan_layers):
    config = llama.read_config(config_json("gemma3"))
    table = llama.name_table(config, "causal-lm", scan_layers=scan_layers)
    layer = "layers" if scan_layers else "layers/2"
    names = {
        "attention/query/kernel": "self_attn.q_proj.weight",
        "attention/key_norm/scale": "self_attn.k_norm.weight",
        "attention_norm/scale": "input_layernorm.weight",
        "attention_out_norm/scale": "post_attention_layernorm.weight",
        "mlp_norm/scale": "pre_feedforward_layernorm.weight",
        "mlp_out_norm/scale": "post_feedforward_layernorm.weight",
        "mlp/down/kernel": "mlp.down_proj.weight",
    }
    for ours, theirs in names.items():
        entry = table.entries[f"{layer}/{ours}"]
        assert entry.tensors[-1] == f"model.layers.2.{theirs}"
        assert (len(entry.tensors), entry.stacked) == ((3, True) if scan_layers else (1, False))
        assert entry.transposed == ours.endswith("kernel")
    assert table.entries["embed_tokens/embedding"].kind == "embedding"
