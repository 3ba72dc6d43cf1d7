"""Last words and perplexities: by hand on a table of bigrams, and laws on a small Llama."""

import json
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

import lora_jax
from lora_jax.models import from_pretrained
from train import lm_evaluation
from train.lm_evaluation import Passage, lambada, text_perplexity

WORDS = ("a", "b", "c", "d")
LONG = "the cat saw the dog and the dog saw the cat and the cat sat on the warm mat by the dog"
# log p of the next word; each row sums to one.
NEXT = np.log(
    [
        [0.1, 0.6, 0.2, 0.1],  # after a
        [0.1, 0.1, 0.7, 0.1],  # after b
        [0.25, 0.25, 0.3, 0.2],  # after c
        [0.4, 0.3, 0.2, 0.1],  # after d
    ]
)


class Config(NamedTuple):
    """What the evaluation reads of a model's config."""

    max_length: int


class Bigrams(NamedTuple):
    """A language model that looks at the last token alone."""

    config: Config = Config(200)

    def apply(self, params: Any, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """The table's row of each token, shifted, which changes no probability."""
        shift = jnp.where(attention_mask, 3.0, jnp.nan)
        return params["table"][jnp.asarray(input_ids)] + shift[..., None]


def tokenizer_of(words, split):
    """Splits with ``split``; the vocabulary holds the words and their forms after a space."""
    vocabulary = {word: index for index, word in enumerate(words)}
    core = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    core.pre_tokenizer = split
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.fixture(scope="module")
def letters():
    """One token for each letter; spaces are dropped."""
    each = pre_tokenizers.Split("", "isolated")
    return tokenizer_of(WORDS, pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), each]))


@pytest.fixture(scope="module")
def words():
    """One token for each word of LONG."""
    return tokenizer_of(tuple(dict.fromkeys(LONG.split())), pre_tokenizers.Whitespace())


@pytest.fixture(scope="module")
def params():
    return {"table": jnp.asarray(NEXT, jnp.float32)}


@pytest.fixture(scope="module")
def llama(tmp_path_factory, words):
    """A Llama of two layers, weights drawn."""
    directory = tmp_path_factory.mktemp("llama")
    fields = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 48,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(fields))
    return from_pretrained(directory, task="causal-lm", abstract=True)


@pytest.fixture(scope="module")
def llama_params(llama):
    leaves, structure = jax.tree.flatten(llama.params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [
        0.5 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
    ]
    return structure.unflatten(drawn)


def test_last_words_by_hand(letters, params):
    """Three passages: right; wrong; two tokens of which the second is not the likeliest."""
    texts = ["a a b", "c a", "d c ab a cd"]
    found = lambada(Bigrams(), params, letters, texts)
    log_p = [math.log(0.6), math.log(0.25), math.log(0.2) + math.log(0.2)]
    assert found.count == 3
    assert found.accuracy == pytest.approx(1 / 3)
    assert found.perplexity == pytest.approx(math.exp(-sum(log_p) / 3), rel=1e-6)


@pytest.mark.parametrize(
    ("text", "accuracy"), [("a bccc", 1), ("a abcc", 0), ("a bacc", 0), ("a bcca", 0)]
)
def test_a_word_is_right_if_all_its_tokens_are(letters, params, text, accuracy):
    assert lambada(Bigrams(), params, letters, [text]).accuracy == accuracy


@pytest.mark.parametrize(
    ("window", "stride", "limit", "predicted"),
    [
        # The text is a b c d a b: each case lists the pairs that are predicted.
        pytest.param(6, None, None, ["ab", "bc", "cd", "da", "ab"], id="one-window"),
        pytest.param(3, None, None, ["ab", "bc", "da", "ab"], id="no-overlap"),
        pytest.param(3, 2, None, ["ab", "bc", "cd", "da", "ab"], id="one-token-shared"),
        pytest.param(4, 1, None, ["ab", "bc", "cd", "da", "ab"], id="one-new-token-each"),
        pytest.param(5, None, None, ["ab", "bc", "cd", "da"], id="a-rest-of-one-token"),
        pytest.param(6, None, 3, ["ab", "bc"], id="limited"),
    ],
)
def test_text_perplexity_by_hand(letters, params, window, stride, limit, predicted):
    found = text_perplexity(
        Bigrams(), params, letters, "abcdab", window=window, stride=stride, limit=limit
    )
    log_p = [NEXT[WORDS.index(before), WORDS.index(after)] for before, after in predicted]
    assert found.tokens == len(predicted)
    assert found.loss == pytest.approx(-np.mean(log_p), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(-np.mean(log_p)), rel=1e-6)


@pytest.mark.parametrize(
    ("stride", "expected"),
    [
        (3, [([0, 1, 2], 1), ([3, 4, 5], 1)]),
        (2, [([0, 1, 2], 1), ([2, 3, 4], 1), ([4, 5, 6], 1)]),
        (1, [([0, 1, 2], 1), ([1, 2, 3], 2), ([2, 3, 4], 2), ([3, 4, 5], 2), ([4, 5, 6], 2)]),
    ],
)
def test_windows(stride, expected):
    found = list(lm_evaluation._windows(range(7), 3, stride))
    assert [(list(window.ids), window.start) for window in found] == expected


def passages(length):
    ends = [place for place, letter in enumerate(LONG) if letter == " "][3:]
    return [LONG[:end] for end in ends[:length]]


def test_batches_change_nothing(llama, llama_params, words):
    """Each alone, or padded together; float32 sums of 20 terms differ by their rounding."""
    texts = passages(9)
    single = [lambada(llama, llama_params, words, [text]) for text in texts]
    log_p = -np.mean([math.log(found.perplexity) for found in single])
    for batch_tokens in (1, 100, 4096):
        found = lambada(llama, llama_params, words, texts, batch_tokens=batch_tokens)
        assert math.log(found.perplexity) == pytest.approx(-log_p, rel=1e-5)
        assert found.accuracy == pytest.approx(np.mean([one.accuracy for one in single]))


def test_passages_come_back_in_their_order(llama, llama_params, words):
    given = [Passage(words(text)["input_ids"], 1) for text in passages(9)]
    found = lm_evaluation._score_all(llama, llama_params, given, 100, None)
    turned = lm_evaluation._score_all(llama, llama_params, given[::-1], 100, None)
    np.testing.assert_allclose(found.log_p, turned.log_p[::-1], rtol=1e-5)


def test_adapted_weights_score_as_merged_ones(llama, llama_params, words):
    config = lora_jax.LoraConfig(rank=2, alpha=4.0, targets=("query", "value"))
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    layouts = lora_jax.layouts(llama.apply, llama_params, tokens, tokens)
    frozen, trainable = lora_jax.split(llama_params, config, jax.random.key(1), layouts=layouts)
    trainable = jax.tree.map(lambda leaf: leaf + 0.3, trainable)
    merged = lora_jax.merge(frozen, trainable)
    combined = lora_jax.combine(frozen, trainable)
    texts = passages(9)
    plain = lambada(llama, llama_params, words, texts)
    expected = lambada(llama, merged, words, texts)
    assert math.log(expected.perplexity) != pytest.approx(math.log(plain.perplexity), rel=1e-2)
    found = lambada(llama, combined, words, texts)
    assert math.log(found.perplexity) == pytest.approx(math.log(expected.perplexity), rel=1e-4)
    text = [text_perplexity(llama, tree, words, LONG, window=8) for tree in (combined, merged)]
    assert text[0].loss == pytest.approx(text[1].loss, rel=1e-4)


def test_progress_reaches_the_end(letters, params):
    told = []
    lambada(
        Bigrams(),
        params,
        letters,
        ["a b"] * 5,
        batch_tokens=2 * lm_evaluation.WIDTHS,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    ("run", "message"),
    [
        pytest.param(lambda *of: lambada(*of, []), "nothing to predict", id="no-passages"),
        pytest.param(lambda *of: lambada(*of, ["a b", "a"]), "'a' has no last word", id="one-word"),
        pytest.param(lambda *of: lambada(*of, ["a b "]), "has no last word", id="ends-in-a-space"),
        pytest.param(
            lambda *of: lambada(*of, ["a b", "a " * 200 + "b"]),
            "1 of 2 passages are longer than the 200 tokens .* the longest 201",
            id="too-long",
        ),
        pytest.param(
            lambda *of: text_perplexity(*of, "a"), "no passage has two tokens", id="one-token"
        ),
        pytest.param(
            lambda *of: text_perplexity(*of, "abc" * 200, window=201),
            "longer than the 200 tokens",
            id="window-too-long",
        ),
        pytest.param(
            lambda *of: text_perplexity(*of, "abc", window=1), "at least 2", id="window-of-one"
        ),
        pytest.param(
            lambda *of: text_perplexity(*of, "abc", window=2, stride=3), "a stride of 3", id="gaps"
        ),
    ],
)
def test_refused(letters, params, run, message):
    with pytest.raises(ValueError, match=message):
        run(Bigrams(), params, letters)


def test_a_token_across_the_last_space_is_refused(params):
    together = tokenizer_of(("a", "b c", "b", "c"), pre_tokenizers.Split(" b c", "isolated"))
    assert together("b c")["input_ids"] != together("b")["input_ids"] + together("c")["input_ids"]
    with pytest.raises(ValueError, match="reach into the last word"):
        lambada(Bigrams(), params, together, ["b c"])


@pytest.mark.parametrize("separator", ["", "\n", "\n\n"])
def test_wikitext_is_joined(tmp_path, separator):
    rows = ["a \n", "b\n", "\n", " = c = \n"]
    (tmp_path / "test.txt").write_text("".join(rows))
    found = lm_evaluation.read_wikitext(tmp_path / "test.txt", separator=separator)
    assert found == separator.join(rows)


def test_lambada_file(data_dir):
    texts = lm_evaluation.read_lambada(data_dir / "lambada" / "lambada_test.jsonl")
    assert len(texts) == 5153
    assert texts[1].endswith(" Shane")


@pytest.mark.parametrize("read", [lm_evaluation.read_lambada, lm_evaluation.read_wikitext])
def test_absent_file(tmp_path, read):
    with pytest.raises(ValueError, match=r"There is no file .*absent"):
        read(tmp_path / "absent")
