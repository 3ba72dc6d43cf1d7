"""Decoding against the PyTorch implementation, live: the same tokens, and the same scores."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (make test-oracle)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from lora_jax.generation import GenerationOptions, generate, read_options  # noqa: E402
from lora_jax.generation._sampling import keep_top  # noqa: E402
from lora_jax.models import from_pretrained  # noqa: E402

VOCAB = 60
COMMON = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **COMMON,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, **COMMON
    ),
}
PAD = 1  # a 0 would be taken for none given
# Of different lengths, with a repeated run for the n-gram block to find.
PROMPTS = ([7, 8, 9, 7, 8, 9, 7, 8], [11], [23, 5, 41], [3, 3, 3, 3, 50])


@functools.cache
def models(family):
    """The same random model twice, of weights so large that tokens vary and near-ties are rare."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.add_(0.4 * torch.randn(weight.shape))
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        return theirs, from_pretrained(directory, task="causal-lm")


def padded():
    width = max(map(len, PROMPTS))
    ids = np.array([[PAD] * (width - len(row)) + row for row in PROMPTS])
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in PROMPTS])
    return ids, mask


def torch_tokens(theirs, ids, mask, **settings):
    """New tokens of each row, filled up with padding, and the scores of a beam search."""
    new = settings["max_new_tokens"]
    with torch.no_grad():
        result = theirs.generate(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            return_dict_in_generate=True,
            output_scores=True,
            pad_token_id=PAD,
            do_sample=False,
            **settings,
        )
    tokens = result.sequences[:, ids.shape[1] :].numpy()
    tokens = np.pad(tokens, ((0, 0), (0, new - tokens.shape[1])), constant_values=PAD)
    return tokens, getattr(result, "sequences_scores", None)


def occurring(family, count):
    """Tokens that the model does produce, so that some rows end before others."""
    theirs, _ = models(family)
    tokens, _ = torch_tokens(theirs, *padded(), max_new_tokens=20)
    found, counts = np.unique(tokens, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [int(token) for token in found[order] if token != PAD][:count]


def compare(family, ids, mask, eos, **settings):
    theirs, ours = models(family)
    expected, scores = torch_tokens(theirs, ids, mask, eos_token_id=eos or None, **settings)
    options = GenerationOptions(eos_token_id=tuple(eos), pad_token_id=PAD, **settings)
    result = generate(ours, ours.params, ids, mask, options)
    np.testing.assert_array_equal(result.tokens, expected)
    if scores is not None:
        # A few dozen log-probabilities, whose logits agree to 1e-4 at most.
        np.testing.assert_allclose(result.scores, scores, rtol=0, atol=1e-3)
    return np.asarray(result.tokens), np.asarray(result.lengths)


FAMILIES = pytest.mark.parametrize("family", CONFIGS)


@FAMILIES
def test_greedy_tokens_are_pytorchs(family):
    tokens, lengths = compare(family, *padded(), occurring(family, 1), max_new_tokens=20)
    assert len(np.unique(tokens)) > 5, "too dull to show anything"
    assert len(set(lengths.tolist())) > 1, "all rows are of one length"


@pytest.mark.parametrize(
    ("eos", "settings"),
    [
        pytest.param(0, {}, id="no-eos"),
        pytest.param(3, {}, id="three-eos"),
        pytest.param(0, {"no_repeat_ngram_size": 2}, id="no-bigram"),
        pytest.param(1, {"no_repeat_ngram_size": 4}, id="no-4-gram"),
        pytest.param(1, {"repetition_penalty": 1.5}, id="penalised"),
        pytest.param(3, {"min_new_tokens": 9}, id="least-length"),
    ],
)
def test_what_greedy_decoding_may_be_told_is_pytorchs(eos, settings):
    eos = occurring("llama", eos)
    tokens, _ = compare("llama", *padded(), eos, max_new_tokens=20, **settings)
    assert len(np.unique(tokens)) > 5, "too dull to show anything"


@FAMILIES
@pytest.mark.parametrize("length_penalty", [0.8, 1.0, 2.0])
@pytest.mark.parametrize("num_beams", [4, 10])
def test_beam_search_is_pytorchs(family, num_beams, length_penalty):
    compare(
        family,
        *padded(),
        occurring(family, 2),
        max_new_tokens=16,
        num_beams=num_beams,
        length_penalty=length_penalty,
    )


@pytest.mark.parametrize(
    ("eos", "settings"),
    [
        pytest.param(0, {}, id="no-eos"),
        pytest.param(1, {}, id="one-eos"),
        pytest.param(3, {}, id="three-eos"),
        pytest.param(2, {"no_repeat_ngram_size": 2}, id="no-bigram"),
        pytest.param(2, {"no_repeat_ngram_size": 3, "num_beams": 10}, id="no-trigram"),
        pytest.param(2, {"no_repeat_ngram_size": 4, "length_penalty": 0.8}, id="no-4-gram"),
        pytest.param(2, {"repetition_penalty": 1.3}, id="penalised"),
        pytest.param(2, {"min_new_tokens": 9}, id="least-length"),
        pytest.param(2, {"length_penalty": 0.0}, id="no-length-penalty"),
        pytest.param(2, {"length_penalty": -1.0}, id="short-favoured"),
    ],
)
def test_what_beam_search_may_be_told_is_pytorchs(eos, settings):
    settings = {"max_new_tokens": 16, "num_beams": 4} | settings
    compare("llama", *padded(), occurring("llama", eos), **settings)


@FAMILIES
def test_many_random_prompts_end_where_pytorchs_do(family):
    ids = np.random.default_rng(1).integers(1, VOCAB, (24, 6))
    mask = np.ones_like(ids)
    mask[::3, :2] = 0
    ids = np.where(mask == 1, ids, PAD)
    eos = occurring(family, 2)
    settings = {"max_new_tokens": 20, "num_beams": 5, "length_penalty": 0.9}
    _, lengths = compare(family, ids, mask, eos, no_repeat_ngram_size=3, **settings)
    assert lengths.min() < lengths.max()


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(5, 1.0), (0, 0.7), (8, 0.7), (1, 0.1), (60, 0.999), (3, 0.05)]
)
def test_top_k_and_top_p_leave_what_pytorchs_leave(top_k, top_p):
    scores = np.random.default_rng(0).normal(0, 2, (50, VOCAB)).astype(np.float32)
    expected = torch.from_numpy(scores)
    if top_k:
        expected = transformers.TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = transformers.TopPLogitsWarper(top_p)(None, expected)
    ranked = jnp.sort(jnp.asarray(scores), axis=-1, descending=True)
    kept = keep_top(ranked, jnp.int32(top_k or VOCAB), jnp.float32(top_p))
    np.testing.assert_array_equal(
        np.asarray(jnp.isfinite(kept).sum(-1)), torch.isfinite(expected).sum(-1).numpy()
    )


def test_a_checkpoints_own_settings(tmp_path):
    theirs, ours = models("llama")
    eos = occurring("llama", 2)
    config = transformers.GenerationConfig(
        max_new_tokens=12,
        num_beams=4,
        length_penalty=1.5,
        no_repeat_ngram_size=2,
        eos_token_id=eos,
        pad_token_id=PAD,
    )
    config.save_pretrained(tmp_path)
    ids, mask = padded()
    with torch.no_grad():
        expected = theirs.generate(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            generation_config=config,
        )[:, ids.shape[1] :].numpy()
    result = jax.device_get(generate(ours, ours.params, ids, mask, read_options(tmp_path)))
    np.testing.assert_array_equal(result.tokens[:, : expected.shape[1]], expected)
    assert (result.tokens[:, expected.shape[1] :] == PAD).all()
