"""generate on decoders whose answers can be worked out by hand, and the laws that hold for any."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lora_jax import LoraConfig, combine, merge, split
from lora_jax.generation import GenerationOptions, generate
from lora_jax.generation._generate import _run
from lora_jax.models import from_pretrained
from tests.lora_jax.generation import toys
from tests.references.decoders import checkpoint

# Log-probabilities of a few tokens, summed in float32, and the chances of what NEVER comes.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
EOS = 3


def ids_of(*rows):
    """Rows padded at the left with 0, and their mask."""
    width = max(map(len, rows))
    mask = np.array([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return np.array([[0] * (width - len(row)) + list(row) for row in rows]), mask


def tokens_of(result):
    """The new tokens of each row, eos included, as lists."""
    pairs = zip(np.asarray(result.tokens), np.asarray(result.lengths), strict=True)
    return [row[:length].tolist() for row, length in pairs]


CHAIN = {0: {1: 0.9, 2: 0.1}, 1: {2: 0.8, 0: 0.2}, 2: {EOS: 0.7, 0: 0.3}, EOS: {0: 1.0}}
# The likelier first token leads to unlikely ones: .6 * .3 against .4 * .9.
TRAP = {0: {1: 0.6, 2: 0.4}, 1: {0: 0.3, 1: 0.3, 2: 0.2, EOS: 0.2}, 2: {EOS: 0.9, 0: 0.1}}
# Short: .4. Long: .6 * .5 = .3.
SHORT_OR_LONG = {0: {EOS: 0.4, 1: 0.6}, 1: {EOS: 0.5, 1: 0.25, 2: 0.25}, 2: {2: 1.0}}
# A cycle with one way out.
CYCLE = {0: {1: 0.9, 2: 0.1}, 1: {0: 0.9, 2: 0.1}, 2: {EOS: 1.0}, EOS: {0: 1.0}}


@pytest.mark.parametrize(
    ("table", "prompt", "choices", "expected", "score"),
    [
        pytest.param(CHAIN, [0], {}, [1, 2, EOS], np.log(0.9 * 0.8 * 0.7), id="greedy-to-eos"),
        pytest.param(
            CHAIN, [1, 0], {"max_new_tokens": 2}, [1, 2], np.log(0.9 * 0.8), id="greedy-to-limit"
        ),
        pytest.param(CHAIN, [0], {"eos_token_id": (1, EOS)}, [1], np.log(0.9), id="two-eos-first"),
        pytest.param(
            CHAIN, [1], {"eos_token_id": (1, EOS)}, [2, EOS], np.log(0.56), id="two-eos-second"
        ),
        pytest.param(
            CHAIN,
            [0],
            {"eos_token_id": None, "max_new_tokens": 5},
            [1, 2, EOS, 0, 1],
            np.log(0.9 * 0.8 * 0.7 * 0.9),
            id="no-eos",
        ),
        pytest.param(
            CHAIN,
            [0],
            {"min_new_tokens": 4, "max_new_tokens": 6},
            [1, 2, 0, 1, 2, EOS],
            np.log(0.9 * 0.8 * 0.3 * 0.9 * 0.8 * 0.7),
            id="least-length-puts-eos-off",
        ),
        pytest.param(TRAP, [0], {"max_new_tokens": 2}, [1, 0], np.log(0.18), id="greedy-trapped"),
        pytest.param(
            TRAP,
            [0],
            {"max_new_tokens": 2, "num_beams": 2},
            [2, EOS],
            np.log(0.36) / 2,
            id="two-beams-are-not",
        ),
        pytest.param(
            SHORT_OR_LONG,
            [0],
            {"num_beams": 2, "length_penalty": 0.0},
            [EOS],
            np.log(0.4),
            id="no-length-penalty-short",
        ),
        pytest.param(
            SHORT_OR_LONG,
            [0],
            {"num_beams": 2, "length_penalty": 1.0},
            [1, EOS],
            np.log(0.3) / 2,
            id="length-penalty-long",
        ),
        pytest.param(
            CYCLE,
            [0, 1],
            {"max_new_tokens": 5},
            [0, 1, 0, 1, 0],
            5 * np.log(0.9),
            id="repeats-itself",
        ),
        pytest.param(
            CYCLE,
            [0, 1],
            {"max_new_tokens": 5, "no_repeat_ngram_size": 2},
            [0, 2, EOS],
            np.log(0.9 * 0.1),
            id="no-bigram-twice-nor-the-prompts",
        ),
        pytest.param(
            CYCLE,
            [0, 1],
            {
                "max_new_tokens": 5,
                "no_repeat_ngram_size": 2,
                "no_repeat_ngram_in_prompt": False,
            },
            [0, 1, 0, 2, EOS],
            np.log(0.9**3 * 0.1),
            id="no-bigram-twice-but-for-the-prompts",
        ),
        pytest.param(
            CYCLE,
            [0, 1],
            {"max_new_tokens": 5, "no_repeat_ngram_size": 3},
            [0, 1, 2, EOS],
            np.log(0.9 * 0.9 * 0.1),
            id="no-trigram-twice",
        ),
        pytest.param(
            CYCLE,
            [0, 1],
            {"no_repeat_ngram_size": 2, "num_beams": 2, "length_penalty": 0.0},
            [2, EOS],
            np.log(0.1),
            id="no-bigram-twice-in-beams",
        ),
    ],
)
def test_answers_by_hand(table, prompt, choices, expected, score):
    model, params = toys.decoder(toys.chances(table))
    options = GenerationOptions(**({"max_new_tokens": 8, "eos_token_id": EOS} | choices))
    result = generate(model, params, [prompt], None, options)
    assert tokens_of(result) == [expected]
    np.testing.assert_allclose(result.scores, [score], **CLOSE)


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        pytest.param(1.0, [1, 1, 1], id="off"),
        pytest.param(1.5, [1, 1, 1], id="3-over-1.5-is-still-the-most"),
        pytest.param(4.0, [2, 1, 1], id="3-over-4-is-less-than-1.6-but-more-than-0.4"),
    ],
)
def test_repetition_penalty(penalty, expected):
    model, params = toys.decoder(np.tile([-1.0, 3.0, 1.6], (3, 1)))
    options = GenerationOptions(max_new_tokens=3, repetition_penalty=penalty)
    assert tokens_of(generate(model, params, [[1]], None, options)) == [expected]


def test_a_negative_score_is_multiplied():
    model, params = toys.decoder(np.tile([-1.0, -1.5], (2, 1)))
    options = GenerationOptions(max_new_tokens=1, repetition_penalty=2.0)
    assert tokens_of(generate(model, params, [[0]], None, options)) == [[1]]  # -2 against -1.5


def test_rows_are_padded_after_their_eos():
    model, params = toys.decoder(toys.chances(CHAIN))
    options = GenerationOptions(max_new_tokens=4, eos_token_id=EOS, pad_token_id=1)
    result = generate(model, params, *ids_of([0], [1, 2], [0, 1]), options)
    np.testing.assert_array_equal(result.tokens, [[1, 2, EOS, 1], [EOS, 1, 1, 1], [2, EOS, 1, 1]])
    np.testing.assert_array_equal(result.lengths, [3, 1, 2])
    assert result.tokens.dtype == result.lengths.dtype == jnp.int32
    assert result.scores.dtype == jnp.float32


@pytest.mark.parametrize(
    ("pad", "expected"),
    [pytest.param(None, EOS, id="the-first-eos"), pytest.param(2, 2, id="as-asked")],
)
@pytest.mark.parametrize("beams", [1, 2])
def test_padding(beams, pad, expected):
    options = GenerationOptions(
        max_new_tokens=6, eos_token_id=(EOS, 4), pad_token_id=pad, num_beams=beams
    )
    model, params = toys.decoder(np.pad(toys.chances(CHAIN), (0, 1), constant_values=toys.NEVER))
    result = generate(model, params, [[2]], None, options)
    assert result.tokens.tolist() == [[EOS, *[expected] * 5]]


# The last two compile everything that may be on.
KINDS = {
    "greedy": {},
    "greedy-and-all": {
        "no_repeat_ngram_size": 3,
        "repetition_penalty": 1.3,
        "min_new_tokens": 3,
        "eos_token_id": (2, 5),
    },
    "beams-and-all": {
        "num_beams": 3,
        "no_repeat_ngram_size": 2,
        "length_penalty": 0.8,
        "repetition_penalty": 1.1,
        "eos_token_id": (2, 5),
    },
}
PROMPTS = ([1, 2, 3, 1, 2], [4], [9])


def options_of(kind, **changes):
    return GenerationOptions(**({"max_new_tokens": 10, "eos_token_id": 2} | KINDS[kind] | changes))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_its_rows_give_alone(kind):
    model, params = toys.random_decoder()
    options = options_of(kind)
    batch = generate(model, params, *ids_of(*PROMPTS), options)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, params, [prompt], None, options)
        assert tokens_of(alone) == tokens_of(batch)[row : row + 1]
        np.testing.assert_allclose(alone.scores, batch.scores[row : row + 1], **CLOSE)
    assert len({len(row) for row in tokens_of(batch)}) > 1, "all rows are of one length"


@pytest.mark.parametrize(
    "places",
    [
        pytest.param([0, 1, 2], id="right-padded"),
        pytest.param([1, 2, 3], id="both-sides"),
        pytest.param([0, 2, 4], id="holes"),
    ],
)
@pytest.mark.parametrize("kind", ["greedy", "beams-and-all"])
def test_padding_may_be_anywhere(kind, places):
    model, params = toys.random_decoder()
    ids, mask = np.full((1, 5), 9), np.zeros((1, 5), bool)
    ids[0, places], mask[0, places] = [1, 5, 3], True
    padded = generate(model, params, ids, mask, options_of(kind))
    plain = generate(model, params, [[1, 5, 3]], None, options_of(kind))
    assert tokens_of(padded) == tokens_of(plain)


def test_the_cache_changes_nothing():
    model, params = toys.random_decoder()
    prompt = [3, 1, 4]
    result = generate(model, params, [prompt], None, GenerationOptions(max_new_tokens=12))
    tokens = tokens_of(result)[0]
    whole = model.module.apply({"params": params}, jnp.array([[*prompt, *tokens]]))
    assert whole[0, len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
    assert len(set(tokens)) > 3, "too dull to show anything"


@pytest.mark.parametrize("length_penalty", [0.0, 0.7, -1.0])
def test_beams_enough_for_every_sequence_find_the_best(length_penalty):
    model, params = toys.random_decoder(vocab=4, seed=2)
    steps, eos, prompt = 3, 2, [1, 3]
    sequences = [
        tokens
        for length in range(1, steps + 1)
        for tokens in itertools.product(range(4), repeat=length)
        if eos not in tokens[:-1] and (length == steps or tokens[-1] == eos)
    ]
    filled = np.array([[*tokens, *[0] * (steps - len(tokens))] for tokens in sequences])
    lengths = np.array([len(tokens) for tokens in sequences])
    rows = np.concatenate([np.tile(prompt, (len(sequences), 1)), filled], axis=1)
    logits = model.module.apply({"params": params}, jnp.asarray(rows))[:, len(prompt) - 1 : -1]
    log_p = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), filled[:, :, None], 2)
    total = np.where(np.arange(steps) < lengths[:, None], log_p[:, :, 0], 0).sum(1)
    scores = total / lengths**length_penalty

    options = GenerationOptions(
        max_new_tokens=steps,
        num_beams=len(sequences),
        length_penalty=length_penalty,
        eos_token_id=eos,
    )
    result = generate(model, params, [prompt], None, options)
    assert tokens_of(result) == [list(sequences[scores.argmax()])]
    np.testing.assert_allclose(result.scores, [scores.max()], **CLOSE)


@dataclasses.dataclass(frozen=True)
class Watched:
    """A module that reports every call of it while it runs."""

    inner: toys.Table
    report: Callable

    @property
    def dtype(self):
        return self.inner.dtype

    def apply(self, *args, **kwargs):
        jax.debug.callback(self.report)
        return self.inner.apply(*args, **kwargs)


@pytest.mark.parametrize(
    ("choices", "calls"),
    [
        pytest.param({}, 4, id="greedy"),
        pytest.param({"eos_token_id": None}, 31, id="without-eos"),
    ],
)
def test_it_stops_when_every_row_has(choices, calls):
    seen = []
    model, params = toys.decoder(toys.chances(CHAIN))
    model.module = Watched(model.module, lambda: seen.append(1))
    options = GenerationOptions(**({"max_new_tokens": 30, "eos_token_id": EOS} | choices))
    generate(model, params, *ids_of([1, 0], [2]), options).tokens.block_until_ready()
    jax.effects_barrier()
    assert len(seen) == calls  # the prompt's and one for each step


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param(
            {"repetition_penalty": 1.5},
            {
                "repetition_penalty": 1.2,
                "min_new_tokens": 2,
                "eos_token_id": 4,
                "pad_token_id": 1,
            },
            id="greedy",
        ),
        pytest.param(
            {"temperature": 0.5, "top_k": 3},
            {"temperature": 0.9, "top_k": 5, "top_p": 0.5},
            id="sampled",
        ),
        pytest.param({"num_beams": 2}, {"length_penalty": 0.3}, id="beams"),
    ],
)
def test_numbers_do_not_compile_anew(kind, changes):
    model, params = toys.random_decoder(max_length=63)  # no other test has compiled for this one
    first = GenerationOptions(max_new_tokens=3, eos_token_id=2, **kind)
    second = dataclasses.replace(first, **changes)
    before = _run._cache_size()
    for seed, options in enumerate((first, second, first)):
        generate(model, params, *ids_of([1, 2], [seed]), options, key=jax.random.key(seed))
    assert _run._cache_size() == before + 1


def test_a_shape_compiles_once_and_equal_models_share():
    (model, params), (other, _) = toys.random_decoder(vocab=6), toys.random_decoder(vocab=6)
    options = GenerationOptions(max_new_tokens=2)
    before = _run._cache_size()
    for prompts in ([[1, 2]], [[3, 4]], [[1, 2, 3]], [[5, 4, 3]]):
        generate(model, params, prompts, None, options)
        generate(other, params, np.array(prompts), None, options)
    assert _run._cache_size() == before + 2


def test_adapted_weights_give_what_merged_ones_give():
    model, params = toys.random_decoder()
    config = LoraConfig(rank=2, alpha=4.0, targets=("kernel",))
    frozen, trainable = split(params, config, jax.random.key(0))
    moved = jax.tree.map(
        lambda x: 2 * jax.random.normal(jax.random.key(x.size), x.shape), trainable
    )
    prompts = ids_of(*PROMPTS)
    base, adapted, merged = (
        tokens_of(generate(model, weights, *prompts, options_of("greedy")))
        for weights in (params, combine(frozen, moved), merge(frozen, moved))
    )
    assert adapted == merged != base


def test_a_batch_may_be_sharded():
    model, params = toys.random_decoder()
    options = options_of("beams-and-all")
    rows = [[token, 3, 1] if token % 2 else [token] for token in range(jax.device_count())]
    ids, mask = ids_of(*rows)
    mesh = jax.make_mesh((len(rows),), ("data",), axis_types=(AxisType.Auto,))
    by_row = NamedSharding(mesh, PartitionSpec("data"))
    whole = generate(model, params, ids, mask, options)
    sharded = generate(model, params, *jax.device_put((ids, mask), by_row), options)
    assert tokens_of(sharded) == tokens_of(whole)
    assert sharded.tokens.sharding.is_equivalent_to(by_row, 2)


def test_prompt_and_new_tokens_may_fill_the_model():
    # The padded batch is wider than what fits, and its rows are not.
    model, params = toys.random_decoder(max_length=8)
    options = GenerationOptions(max_new_tokens=5)
    ids, mask = ids_of([1, 2, 3], [4])
    wider = (np.pad(array, ((0, 0), (6, 0))) for array in (ids, mask))
    wide = generate(model, params, *wider, options)
    narrow = generate(*toys.random_decoder(), ids, mask, options)
    assert tokens_of(wide) == tokens_of(narrow)


@pytest.mark.parametrize(
    ("ids", "mask", "choices", "message"),
    [
        pytest.param([1, 2], None, {}, r"must be integers \(B, T\), got int64 \(2,\)", id="1-d"),
        pytest.param([[0.5]], None, {}, "must be integers", id="floats"),
        pytest.param(np.zeros((2, 0), int), None, {}, r"got int64 \(2, 0\)", id="empty"),
        pytest.param([[1, 2]], [[1]], {}, r"must be \(1, 2\) .*got \(1, 1\)", id="mask-shape"),
        pytest.param([[1], [2]], [[1], [0]], {}, r"hold no token: \[1\]", id="a-row-of-padding"),
        pytest.param([[1, 13]], None, {}, r"has \[13\]; .* 0 to 12", id="id-too-large"),
        pytest.param([[-1]], None, {}, r"has \[-1\]", id="negative-id"),
        pytest.param([[1]], None, {"eos_token_id": 13}, "Token 13 .* none of .* 13", id="eos"),
        pytest.param([[1]], None, {"pad_token_id": 99}, "Token 99", id="pad"),
        pytest.param([[1] * 60], None, {}, "60 tokens, .* 5 new .* 64 positions", id="too-long"),
        pytest.param([[1]], None, {"temperature": 1.0}, "needs a `key`", id="no-key"),
    ],
)
def test_what_cannot_be_generated(ids, mask, choices, message):
    model, params = toys.random_decoder()
    options = GenerationOptions(**({"max_new_tokens": 5} | choices))
    with pytest.raises(ValueError, match=message):
        generate(model, params, ids, mask, options)


def test_all_problems_are_listed():
    model, params = toys.random_decoder()
    options = GenerationOptions(max_new_tokens=5, eos_token_id=77, temperature=1.0)
    with pytest.raises(ValueError, match=r"(?s)Token 77.*hold no token.*0 to 12.*`key`"):
        generate(model, params, [[1], [20]], [[0], [1]], options)


@pytest.mark.parametrize("odd", [-100, 1000])
def test_ids_under_padding_are_not_checked(tmp_path, odd):
    # A real model: the embedding of what is no token is NaN, and 0 * NaN reaches every row.
    model = from_pretrained(checkpoint(tmp_path / "llama", "llama"), "causal-lm")
    assert odd not in range(model.config.vocab_size)
    options = GenerationOptions(max_new_tokens=2)
    padded = generate(model, model.params, [[odd, 3, 5]], [[0, 1, 1]], options)
    alone = generate(model, model.params, [[3, 5]], None, options)
    assert tokens_of(padded) == tokens_of(alone)
    np.testing.assert_allclose(padded.scores, alone.scores, **CLOSE)
