"""Prompts of many lengths: batched, and back in their order."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from lora_jax.generation import (
    GenerationOptions,
    end_tokens,
    generate_text,
    generate_tokens,
    with_tokens_of,
)
from lora_jax.generation._generate import _run
from lora_jax.generation._text import padded_length
from tests.lora_jax.generation import toys

EOS = 3
COUNTING = {0: {1: 0.9, 2: 0.1}, 1: {2: 1.0}, 2: {EOS: 0.8, 0: 0.2}, EOS: {0: 1.0}}
PROMPTS = ["b", "a a a a", "c", "b a", "a"]
ANSWERS = ["c", "b c", "", "b c", "b c"]


def counting():
    model, params = toys.decoder(toys.chances(COUNTING))
    return model, params, toys.tokenizer("a", "b", "c")


@pytest.mark.parametrize("batch_size", [2, 32])
def test_texts_come_back_in_order(batch_size):
    seen = []
    texts = generate_text(
        *counting(),
        PROMPTS,
        GenerationOptions(max_new_tokens=4),
        batch_size=batch_size,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert texts == ANSWERS
    whole = range(batch_size, len(PROMPTS), batch_size)
    assert seen == [*((done, 5) for done in whole), (5, 5)]


@pytest.mark.parametrize(
    ("eos", "expected"),
    [
        pytest.param(None, ["b c"], id="the-tokenizers-if-none-is-stated"),
        pytest.param(2, ["b"], id="the-stated-one"),
        pytest.param((), ["b c a b"], id="stated-as-none"),
    ],
)
def test_where_a_text_ends(eos, expected):
    options = GenerationOptions(max_new_tokens=5, eos_token_id=eos)
    assert generate_text(*counting(), ["a"], options) == expected


def test_few_shapes_compile():
    model, params = toys.random_decoder(max_length=62)
    before = _run._cache_size()
    prompts = [[token % 13] * (1 + token) for token in range(30)]
    options = GenerationOptions(max_new_tokens=2)
    generate_tokens(model, params, prompts, options, batch_size=8)
    assert _run._cache_size() == before + 2  # lengths 16 and 32, the last batch filled up


def test_rows_are_those_of_batches_of_one():
    model, params = toys.random_decoder()
    options = GenerationOptions(max_new_tokens=6, eos_token_id=(2, 5))
    prompts = [[3, 1], [4], [7, 8, 9]]
    together = generate_tokens(model, params, prompts, options)
    assert together == generate_tokens(model, params, prompts, options, batch_size=1)
    assert all(token not in (2, 5) for row in together for token in row)


def test_batches_draw_from_keys_of_their_own():
    model, params = toys.decoder([[0.0] * 50] * 50)
    options = GenerationOptions(max_new_tokens=8, temperature=1.0)
    rows = [
        generate_tokens(model, params, [[1]] * 4, options, batch_size=2, key=jax.random.key(seed))
        for seed in (0, 0, 1)
    ]
    assert rows[0] == rows[1] != rows[2]
    assert len({tuple(row) for row in rows[0]}) == 4


def test_no_prompts_give_no_texts():
    assert generate_text(*counting(), []) == []
    assert generate_tokens(*counting()[:2], []) == []


@pytest.mark.parametrize(
    ("prompts", "choices", "message"),
    [
        pytest.param(["a", ""], {}, r"hold no token: \[1\]", id="empty-prompt"),
        pytest.param(["a"], {"batch_size": 0}, "`batch_size` must be at least 1", id="batch-size"),
        pytest.param(["a " * 70], {}, "70 tokens", id="too-long"),
    ],
)
def test_what_is_refused(prompts, choices, message):
    with pytest.raises(ValueError, match=message):
        generate_text(*counting(), prompts, **choices)


def test_padded_lengths_are_few_and_close():
    lengths = [padded_length(length) for length in range(1, 4097)]
    assert all(length <= padded < length + max(16, length / 4) for length, padded in
               enumerate(lengths, start=1))  # fmt: skip
    assert len(set(lengths)) == 8 + 4 * 5


class Checkpoint(NamedTuple):
    """What `end_tokens` reads of a model."""

    directory: Path
    config_json: dict


class Ends(NamedTuple):
    """What it reads of a tokenizer."""

    eos_token_id: int | None
    pad_token_id: int | None = None


@pytest.mark.parametrize(
    ("eos", "config", "generation", "expected"),
    [
        pytest.param(2, {}, None, (2,), id="the-tokenizers"),
        pytest.param(2, {"eos_token_id": [2, 5]}, None, (2, 5), id="and-those-of-the-config"),
        pytest.param(
            1, {"eos_token_id": 1}, {"eos_token_id": [1, 106]}, (1, 106), id="and-of-generation"
        ),
        pytest.param(None, {"eos_token_id": None}, {}, (), id="none"),
    ],
)
def test_the_ends_of_a_text(tmp_path, eos, config, generation, expected):
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    model, tokenizer = Checkpoint(tmp_path, config), Ends(eos)
    assert end_tokens(model, tokenizer) == expected
    stated = with_tokens_of(model, tokenizer, GenerationOptions(eos_token_id=7))
    assert stated.eos_ids == (7,)


def test_a_broken_generation_config_is_refused(tmp_path):
    (tmp_path / "generation_config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="must hold one JSON object, got list"):
        end_tokens(Checkpoint(tmp_path, {}), Ends(2))
