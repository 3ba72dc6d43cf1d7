"""The Flax classes of transformers 4.57 take our weights, and compute what we compute."""

import json

import jax
import numpy as np
import pytest

from lora_jax.models import from_flax_params, from_pretrained, to_flax_params

transformers = pytest.importorskip(
    "transformers", reason="needs the environment of `make test-compat`"
)
if not hasattr(transformers, "FlaxBertForSequenceClassification"):
    pytest.skip("needs transformers 4.57, the last with Flax classes", allow_module_level=True)

LENGTH = 12
ENCODER = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 24,
    "num_labels": 3,
}
LLAMA = {**ENCODER, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
TASKS = {
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "masked-lm": "ForMaskedLM",
}
CASES = [
    pytest.param(family, family + end, task, ENCODER, id=f"{family}-{task}")
    for family in ("Bert", "Roberta")
    for task, end in TASKS.items()
] + [
    pytest.param("GPT2", "GPT2LMHeadModel", "causal-lm", GPT2, id="gpt2"),
    pytest.param(
        "GPT2", "GPT2LMHeadModel", "causal-lm", {**GPT2, "tie_word_embeddings": False}, id="untied"
    ),
    pytest.param("Llama", "LlamaForCausalLM", "causal-lm", LLAMA, id="llama"),
    pytest.param(
        "Llama", "LlamaForCausalLM", "causal-lm", {**LLAMA, "tie_word_embeddings": True}, id="tied"
    ),
    pytest.param(
        "Llama", "LlamaForCausalLM", "causal-lm", {**LLAMA, "attention_bias": True}, id="biases"
    ),
]


@pytest.fixture(autouse=True)
def their_own_rank_promotion():
    """Ranks promote in code that is not ours; our own tests forbid it."""
    with jax.numpy_rank_promotion("allow"):
        yield


def both(directory, family, cls, task, sizes):
    """Our model, of drawn weights, and theirs, of one config."""
    sizes = sizes | ({"num_labels": 2} if task == "question-answering" else {})
    config = getattr(transformers, f"{family}Config")(**sizes)
    fields = {**json.loads(config.to_json_string()), "architectures": [cls]}
    (directory / "config.json").write_text(json.dumps(fields))
    ours = from_pretrained(directory, task, abstract=True)
    leaves, treedef = jax.tree.flatten(ours.params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    theirs = getattr(transformers, f"Flax{cls}")(config, input_shape=(1, LENGTH), _do_init=False)
    return ours, treedef.unflatten(drawn), theirs


def their_logits(theirs, ids, mask, tree):
    given = {"attention_mask": mask}
    if theirs.config.model_type in ("gpt2", "llama"):  # they would count padding too
        given["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    output = jax.jit(lambda tree: theirs(ids, params=tree, **given))(tree)
    if "start_logits" in output:
        return np.stack([output.start_logits, output.end_logits], -1)
    return np.asarray(output.logits)


@pytest.mark.parametrize(("family", "cls", "task", "sizes"), CASES)
def test_their_logits_with_our_weights_are_ours(tmp_path, family, cls, task, sizes):
    ours, params, theirs = both(tmp_path, family, cls, task, sizes)
    tree = to_flax_params(ours, params)
    shapes = jax.tree.map(lambda x: x.shape, tree)
    assert shapes == jax.tree.map(lambda x: x.shape, dict(theirs.params_shape_tree))
    ids = np.random.default_rng(0).integers(5, 99, (3, LENGTH))
    mask = np.ones_like(ids)
    mask[1, 7:], mask[2, :4] = 0, 0
    if family == "Roberta":  # it counts positions over what is not padding
        ids[mask == 0] = ours.config.pad_token_id
    expected = np.asarray(jax.jit(ours.apply)(params, ids, mask))
    actual = their_logits(theirs, ids, mask, tree)
    kept = mask.astype(bool) if expected.ndim == 3 else slice(None)
    difference, largest = np.abs(actual - expected)[kept].max(), np.abs(expected[kept]).max()
    print(f"largest difference {difference:.1e} of logits up to {largest:.1f}")
    # Float32 sums of at most 99 terms in another order, through about 30 products and norms.
    assert difference <= 30 * 99**0.5 * np.finfo(np.float32).eps * max(largest, 1)
    assert largest > 0.1


def test_their_trained_weights_are_taken_back(tmp_path):
    ours, params, _ = both(tmp_path, "GPT2", "GPT2LMHeadModel", "causal-lm", GPT2)
    config = transformers.GPT2Config.from_pretrained(tmp_path)
    theirs = transformers.FlaxGPT2LMHeadModel(config, input_shape=(1, LENGTH), seed=1)
    ids = np.random.default_rng(0).integers(5, 99, (3, LENGTH))
    logits = ours.apply(from_flax_params(ours, theirs.params), ids)
    np.testing.assert_allclose(logits, theirs(ids).logits, rtol=0, atol=1e-5)
    assert not np.allclose(logits, ours.apply(params, ids), atol=1e-2)
