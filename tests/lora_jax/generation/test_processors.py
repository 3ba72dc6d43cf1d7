"""The n-gram block against a count in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.generation._processors import penalise_repetition, repeated_ngrams

VOCAB = 4


def completed(row, size):
    """Tokens that would complete an n-gram of the row's."""
    grams = {tuple(row[i : i + size]) for i in range(len(row) - size + 1)}
    return {t for t in range(VOCAB) if tuple([*row, t][-size:]) in grams and len(row) >= size}


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("end", [1, 2, 3, 5, 9, 12])
def test_the_block_is_what_would_repeat(size, end):
    ids = np.random.default_rng(end).integers(0, 3, (20, 12))  # token 3 never occurs
    starts = np.minimum(np.arange(20) % 6, end - 1)
    banned = jax.jit(repeated_ngrams, static_argnums=(3, 4))(ids, starts, end, size, VOCAB)
    for row, start, found in zip(ids, starts, np.asarray(banned), strict=True):
        assert set(np.flatnonzero(found)) == completed(row[start:end].tolist(), size)


def test_a_row_shorter_than_an_ngram_blocks_nothing():
    banned = repeated_ngrams(jnp.zeros((2, 3), int), jnp.zeros(2, int), 3, 4, VOCAB)
    assert banned.shape == (2, VOCAB)
    assert not banned.any()


def test_only_a_rows_own_tokens_are_penalised():
    scores = jnp.array([[2.0, 2.0, -2.0, -2.0]])
    ids = jnp.array([[1, 0, 2, 0, 3]])  # 1 is padding, 3 is not filled yet
    result = penalise_repetition(scores, ids, jnp.array([1]), 4, 2.0)
    np.testing.assert_array_equal(result, [[1.0, 2.0, -4.0, -2.0]])
