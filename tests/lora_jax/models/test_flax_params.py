"""Their names for our weights, there and back; what their classes would get wrong is refused.

That the classes compute what we compute is shown where they are installed: tests/compat.
"""

import json

import jax
import jax.numpy as jnp
import pytest

from lora_jax._paths import flatten
from lora_jax.models import from_flax_params, from_pretrained, to_flax_params
from lora_jax.testing import assert_trees_equal

BERT = {
    "model_type": "bert",
    "vocab_size": 19,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}
ROBERTA = {**BERT, "model_type": "roberta", "type_vocab_size": 1}
GPT2 = {"model_type": "gpt2", "vocab_size": 19, "n_embd": 8, "n_layer": 2, "n_head": 2}
GPT2 |= {"n_positions": 16}
LLAMA = {**BERT, "model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": False}
LLAMA |= {"rope_theta": 10000.0, "rms_norm_eps": 1e-5}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 4}
SEQUENCE, CAUSAL = "sequence-classification", "causal-lm"

# One of each kind: a linear kernel, a table, a norm, a bias, a Conv1D kernel.
PLACES = {
    "bert": {
        "bert/encoder/layer/1/attention/self/key/kernel": "encoder/layers/1/attention/key/kernel",
        "bert/embeddings/word_embeddings/embedding": "embeddings/word_embeddings/embedding",
        "bert/encoder/layer/0/output/LayerNorm/scale": "encoder/layers/0/mlp/norm/scale",
        "bert/pooler/dense/bias": "pooler/bias",
        "classifier/kernel": "classifier/kernel",
    },
    "roberta": {
        "roberta/encoder/layer/1/intermediate/dense/kernel": "encoder/layers/1/mlp/up/kernel",
        "classifier/out_proj/kernel": "classifier/out_proj/kernel",
    },
    "gpt2": {
        "transformer/h/1/attn/c_attn/kernel": "layers/1/attention/qkv/kernel",
        "transformer/h/1/attn/c_attn/bias": "layers/1/attention/qkv/bias",
        "transformer/wpe/embedding": "wpe/embedding",
        "transformer/ln_f/scale": "norm/scale",
    },
    "llama": {
        "model/layers/1/self_attn/q_proj/kernel": "layers/1/attention/query/kernel",
        "model/layers/0/input_layernorm/weight": "layers/0/attention_norm/scale",
        "model/norm/weight": "norm/scale",
        "model/embed_tokens/embedding": "embed_tokens/embedding",
        "lm_head/kernel": "lm_head/kernel",
    },
}
FAMILIES = [
    pytest.param(BERT, SEQUENCE, id="bert"),
    pytest.param(ROBERTA, SEQUENCE, id="roberta"),
    pytest.param(GPT2, CAUSAL, id="gpt2"),
    pytest.param(LLAMA, CAUSAL, id="llama"),
    pytest.param({**LLAMA, "tie_word_embeddings": True}, CAUSAL, id="llama-tied"),
]


def model_of(directory, fields, task, **options):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    return from_pretrained(directory, task, abstract=True, **options)


def drawn(model):
    """Weights that all differ, layer for layer."""
    weights, treedef = flatten(model.params)
    keys = jax.random.split(jax.random.key(0), len(weights))
    values = [jax.random.normal(k, w.shape) for k, w in zip(keys, weights.values(), strict=True)]
    return treedef.unflatten(values)


@pytest.mark.parametrize(("fields", "task"), FAMILIES)
def test_each_kind_of_weight_has_their_name_and_their_orientation(tmp_path, fields, task):
    model = model_of(tmp_path, fields, task)
    params = drawn(model)
    theirs, _ = flatten(to_flax_params(model, params))
    ours, _ = flatten(params)
    for place, path in PLACES[fields["model_type"]].items():
        if path == "lm_head/kernel" and path not in ours:  # tied: their head is a copy
            path, turn = "embed_tokens/embedding", True
        else:
            turn = fields["model_type"] == "gpt2" and path.endswith("kernel")
        assert_trees_equal(theirs[place], ours[path].T if turn else ours[path])


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(("fields", "task"), FAMILIES)
def test_there_and_back_is_the_identity(tmp_path, fields, task, scan_layers):
    model = model_of(tmp_path, fields, task, scan_layers=scan_layers)
    params = drawn(model)
    assert_trees_equal(from_flax_params(model, to_flax_params(model, params)), params)


@pytest.mark.parametrize(("fields", "task"), FAMILIES)
def test_scanned_layers_give_the_tree_of_unrolled_ones(tmp_path, fields, task):
    unrolled = model_of(tmp_path, fields, task)
    scanned = model_of(tmp_path, fields, task, scan_layers=True)
    tree = to_flax_params(unrolled, drawn(unrolled))
    stacked = from_flax_params(scanned, tree)
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, scanned.params)
    assert_trees_equal(to_flax_params(scanned, stacked), tree)


@pytest.mark.parametrize(
    ("fields", "task", "message"),
    [
        pytest.param(QWEN3, CAUSAL, "no FlaxQwen3ForCausalLM .*known: FlaxBert", id="qwen3"),
        pytest.param(BERT, "feature-extraction", "no FlaxBertModel", id="bare-encoder"),
        pytest.param(
            {**LLAMA, "rope_theta": 5e5}, CAUSAL, r"rope is .*500000.0.* not .*10000", id="theta"
        ),
        pytest.param({**LLAMA, "head_dim": 8}, CAUSAL, "head_dim is 8, not 4", id="head-dim"),
        pytest.param({**LLAMA, "mlp_bias": True}, CAUSAL, "mlp_bias is True", id="mlp-bias"),
    ],
)
def test_a_class_that_is_not_there_or_computes_something_else_is_refused(
    tmp_path, fields, task, message
):
    model = model_of(tmp_path, fields, task)
    with pytest.raises(ValueError, match=message):
        to_flax_params(model, model.params)
    with pytest.raises(ValueError, match=message):
        from_flax_params(model, {})


def test_problems_of_their_tree_are_listed(tmp_path):
    model = model_of(tmp_path, BERT, SEQUENCE)
    tree = to_flax_params(model, drawn(model))
    del tree["bert"]["pooler"]["dense"]["bias"]
    tree["poolre"] = {"bias": jnp.ones(8)}
    tree["classifier"]["kernel"] = jnp.ones((8, 5))
    with pytest.raises(ValueError, match="not plain weights") as caught:
        from_flax_params(model, tree)
    assert sorted(line.strip() for line in str(caught.value).splitlines()[1:]) == [
        "missing: pooler/bias",
        "shape: classifier/kernel is (8, 5), the model has (8, 2)",
        "unknown: poolre/bias; the nearest is pooler/bias",
    ]


def test_a_head_that_is_not_the_table_it_is_tied_to_is_refused(tmp_path):
    model = model_of(tmp_path, {**LLAMA, "tie_word_embeddings": True}, CAUSAL)
    tree = to_flax_params(model, drawn(model))
    tree["lm_head"]["kernel"] = tree["lm_head"]["kernel"] + 1
    with pytest.raises(ValueError, match="lm_head/kernel differs from model/embed_tokens"):
        from_flax_params(model, tree)


def test_weights_without_values_are_refused(tmp_path):
    model = model_of(tmp_path, GPT2, CAUSAL)
    with pytest.raises(ValueError, match="no values: layers/0/attention/qkv/kernel"):
        to_flax_params(model, model.params)
