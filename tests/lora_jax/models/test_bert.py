"""BERT and RoBERTa compute what PyTorch computes, in every form that the module takes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax._paths import flatten
from lora_jax.models import BertConfig, from_pretrained
from lora_jax.models.bert import Bert, name_table, read_config
from tests.references.checkpoints import FAMILIES, HEADS, checkpoint, config_json, outputs, sharded

TOLERANCE = 1e-5
CASES = [
    pytest.param(family, task, scan_layers, id=f"{family}-{task}-{form}")
    for family in FAMILIES
    for task in HEADS
    for scan_layers, form in ((False, "unrolled"), (True, "scanned"))
]


def inputs(expected: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    return tuple(expected[n] for n in ("input_ids", "attention_mask", "token_type_ids"))


@pytest.mark.parametrize(("family", "task", "scan_layers"), CASES)
def test_logits_equal_pytorch(tmp_path, family, task, scan_layers):
    expected = outputs(family)
    model = from_pretrained(sharded(tmp_path, family, task), task, scan_layers=scan_layers)
    logits = jax.jit(model.apply)(model.params, *inputs(expected))
    np.testing.assert_allclose(logits, expected[task], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", [task for task in HEADS if task != "masked-lm"])
def test_ids_alone_mean_no_padding_and_type_0(tmp_path, family, task):
    expected = outputs(family)
    model = from_pretrained(checkpoint(tmp_path, family, task), task)
    logits = model.apply(model.params, expected["input_ids"])
    np.testing.assert_allclose(logits, expected[f"{task}, ids alone"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_under_the_mask_changes_nothing(tmp_path, family):
    expected = outputs(family)
    model = from_pretrained(checkpoint(tmp_path, family, None), "feature-extraction")
    ids, mask, types = inputs(expected)
    if family == "roberta":  # positions are counted over the tokens that are not padding
        ids, mask, types = ids[:2], mask[:2], types[:2]
    other = np.where(mask == 1, ids, 7)
    one, two = (model.apply(model.params, each, mask, types) for each in (ids, other))
    kept = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(one)[kept], np.asarray(two)[kept], rtol=0, atol=1e-6)
    assert not np.allclose(one, two, atol=1e-2)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_remat_changes_memory_only(tmp_path, scan_layers):
    ids = outputs("bert")["input_ids"]
    directory = checkpoint(tmp_path, "bert", None)
    plain, remat = (
        from_pretrained(directory, "feature-extraction", scan_layers=scan_layers, remat=remat)
        for remat in (False, True)
    )

    weights, treedef = flatten(plain.params)

    def loss(query, model):
        params = treedef.unflatten((weights | query).values())
        state = model.apply(params, ids, dropout_key=jax.random.key(1))
        return jnp.sum(state**2)

    query = {path: weight for path, weight in weights.items() if path.endswith("query/kernel")}
    jaxprs = [str(jax.make_jaxpr(lambda q, m=m: loss(q, m))(query)) for m in (plain, remat)]
    assert ["checkpoint[" in text or "remat" in text for text in jaxprs] == [False, True]
    one, two = (jax.jit(jax.grad(lambda q, m=m: loss(q, m)))(query) for m in (plain, remat))
    for path in query:
        np.testing.assert_allclose(one[path], two[path], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_dropout_needs_a_key_and_follows_it(tmp_path, scan_layers):
    expected = outputs("bert")
    model = from_pretrained(
        checkpoint(tmp_path, "bert", "sequence-classification"), scan_layers=scan_layers
    )
    apply = jax.jit(model.apply)
    off, again = (apply(model.params, *inputs(expected)) for _ in range(2))
    one, same, two = (
        apply(model.params, *inputs(expected), dropout_key=jax.random.key(seed))
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(off, again)
    np.testing.assert_array_equal(one, same)
    assert not np.allclose(one, two, atol=1e-3)
    assert not np.allclose(one, off, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "field", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"]
)
def test_each_dropout_is_its_own(tmp_path, family, field):
    rates = dict.fromkeys(
        ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), 0.0
    )
    directory = checkpoint(tmp_path, family, "sequence-classification", **(rates | {field: 0.5}))
    model = from_pretrained(directory)
    given = inputs(outputs(family))
    off = jax.jit(model.apply)(model.params, *given)
    on = jax.jit(model.apply)(model.params, *given, dropout_key=jax.random.key(0))
    assert not np.allclose(on, off, atol=1e-3)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_each_layer_draws_its_own_dropout(tmp_path, scan_layers):
    # Layers that only add a constant to half of the units: two equal draws leave two values
    # in a token's state, two different ones leave four.
    directory = checkpoint(tmp_path, "bert", None, hidden_dropout_prob=0.5)
    model = from_pretrained(directory, "feature-extraction", scan_layers=scan_layers)
    flat, treedef = flatten(model.params)
    ones = ("norm/scale", "mlp/down/bias")
    flat = {k: (jnp.ones_like if k.endswith(ones) else jnp.zeros_like)(v) for k, v in flat.items()}
    params, ids = treedef.unflatten(flat.values()), np.array([[5, 6]], np.int32)
    state = jax.jit(model.apply)(params, ids, dropout_key=jax.random.key(0))
    assert len(np.unique(np.round(state[0, 0], 3))) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close_and_logits_are_float32(tmp_path, family):
    expected = outputs(family)
    model = from_pretrained(
        checkpoint(tmp_path, family, "token-classification"),
        "token-classification",
        dtype=jnp.bfloat16,
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    logits = model.apply(model.params, *inputs(expected))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected["token-classification"], rtol=0, atol=0.1)


def test_bfloat16_keeps_softmax_and_norms_in_float32(tmp_path):
    model = from_pretrained(
        checkpoint(tmp_path, "bert", "sequence-classification"), dtype=jnp.bfloat16
    )
    jaxpr = str(jax.make_jaxpr(model.apply)(model.params, *inputs(outputs("bert"))))
    for line in jaxpr.splitlines():
        if "= exp " in line or "= rsqrt " in line or "= reduce_max" in line:
            assert "bf16" not in line
    assert "rsqrt" in jaxpr
    assert "= exp " in jaxpr


def test_weights_may_be_float32_and_arithmetic_bfloat16(tmp_path):
    model = from_pretrained(
        checkpoint(tmp_path, "bert", None), "feature-extraction", compute_dtype=jnp.bfloat16
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.float32)}
    assert model.apply(model.params, outputs("bert")["input_ids"]).dtype == jnp.bfloat16


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", [*HEADS, "feature-extraction"])
def test_table_of_names_covers_the_module_one_to_one(family, task, scan_layers):
    config = read_config(config_json(family, None))
    module = Bert(config, task=task, scan_layers=scan_layers)
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    shapes, _ = flatten(jax.eval_shape(module.init, jax.random.key(0), ids)["params"])
    table = name_table(config, task, scan_layers=scan_layers)
    assert table.entries.keys() == shapes.keys()
    tensors = [name for entry in table.entries.values() for name in entry.tensors]
    assert len(set(tensors)) == len(tensors)


@pytest.mark.parametrize(
    ("scan_layers", "path"),
    [
        pytest.param(False, "encoder/layers/1/attention/query/kernel", id="unrolled"),
        pytest.param(True, "encoder/layers/attention/query/kernel", id="scanned"),
    ],
)
def test_names_give_the_published_modules(scan_layers, path):
    config = read_config(config_json("roberta", None))
    table = name_table(config, "sequence-classification", scan_layers=scan_layers)
    entry = table.entries[path]
    expected = [f"roberta.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
    assert list(entry.modules) == (expected if scan_layers else expected[1:])
    assert (entry.transposed, entry.stacked) == (True, scan_layers)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        pytest.param({"hidden_act": "mish"}, "`hidden_act` 'mish'", id="activation"),
        pytest.param(
            {"position_embedding_type": "relative_key"},
            "`position_embedding_type` is 'relative_key'",
            id="positions",
        ),
        pytest.param({"is_decoder": True}, "`is_decoder` is True", id="decoder"),
        pytest.param({"add_cross_attention": True}, "`add_cross_attention`", id="cross-attention"),
        pytest.param({"pruned_heads": {"0": [1]}}, "`pruned_heads`", id="pruned"),
        pytest.param({"embedding_size": 8}, "`embedding_size` is unknown", id="unknown"),
        pytest.param({"hidden_dropuot_prob": 0.0}, "mean `hidden_dropout_prob`", id="misspelt"),
        pytest.param({"hidden_size": "32"}, "`hidden_size` must be int, got '32'", id="type"),
        pytest.param({"hidden_size": True}, "`hidden_size` must be int", id="bool-is-no-int"),
        pytest.param({"num_attention_heads": 5}, "multiple of `num_attention_heads` 5", id="heads"),
        pytest.param({"num_hidden_layers": 0}, "`num_hidden_layers` must be at least 1", id="size"),
        pytest.param({"hidden_dropout_prob": 1.0}, "must be in \\[0, 1\\)", id="dropout"),
        pytest.param({"model_type": "deberta"}, "`model_type` must be one of", id="family"),
        pytest.param(
            {"model_type": "roberta", "pad_token_id": None}, "`pad_token_id` is null", id="pad"
        ),
    ],
)
def test_config_refuses(changes, match):
    with pytest.raises(ValueError, match=match):
        read_config(config_json("bert", None) | changes)


def test_config_lists_every_problem_at_once():
    fields = config_json("bert", None) | {"is_decoder": True, "spam": 1, "vocab_size": 1.5}
    del fields["hidden_size"]
    with pytest.raises(ValueError, match=r"config.json") as caught:
        read_config(fields)
    for word in ("`is_decoder`", "`spam`", "`vocab_size`", "`hidden_size` is missing"):
        assert word in str(caught.value)


def test_config_ignores_bookkeeping_and_takes_published_defaults():
    fields = config_json("roberta", None) | {"transformers_version": "9", "use_cache": False}
    del fields["pad_token_id"]
    config = read_config(fields)
    assert (config.pad_token_id, config.max_length) == (1, 22)
    assert dataclasses.replace(config, model_type="bert").max_length == 24


@pytest.mark.parametrize(
    ("fields", "num_labels", "expected"),
    [
        pytest.param({"id2label": {"0": "no", "1": "yes", "2": "maybe"}}, None, 3, id="id2label"),
        pytest.param({"num_labels": 4}, None, 4, id="num-labels"),
        pytest.param({}, None, 2, id="default"),
        pytest.param({"num_labels": 4}, 5, 5, id="argument-wins"),
    ],
)
def test_config_counts_labels(fields, num_labels, expected):
    assert read_config(config_json("bert", None) | fields, num_labels).num_labels == expected


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param((np.zeros((2, 25), np.int32),), "25 tokens long.*for 24", id="too-long"),
        pytest.param((np.zeros((2, 4), np.float32),), "must be integers", id="floats"),
        pytest.param((np.zeros(4, np.int32),), "shape \\(batch, length\\)", id="one-axis"),
        pytest.param(
            (np.zeros((2, 4), np.int32), np.ones((2, 5), np.int32)),
            "`attention_mask` must have the shape",
            id="mask-shape",
        ),
    ],
)
def test_apply_refuses(tmp_path, arguments, match):
    model = from_pretrained(checkpoint(tmp_path, "bert", None), "feature-extraction")
    with pytest.raises(ValueError, match=match):
        model.apply(model.params, *arguments)


def test_a_token_outside_the_vocabulary_is_not_silent(tmp_path):
    model = from_pretrained(checkpoint(tmp_path, "bert", None), "feature-extraction")
    assert np.isnan(model.apply(model.params, np.array([[5, 99]], np.int32))).any()


def test_masked_lm_refuses_an_untied_decoder():
    config = read_config(config_json("bert", "masked-lm", tie_word_embeddings=False))
    assert isinstance(config, BertConfig)
    with pytest.raises(ValueError, match="`tie_word_embeddings` is false"):
        name_table(config, "masked-lm", scan_layers=False)
