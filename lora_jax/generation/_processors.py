"""Scores made lower or impossible by what a row already holds: ``scores[row, token] = -inf``.

Order and arithmetic are those of the transformers library, so that tokens agree. One thing is
deliberately not: padding never counts as part of a row, so a batch gives what its rows give alone.
"""

import jax
import jax.numpy as jnp

from ._program import Numbers, Program, is_eos


def process(
    program: Program,
    numbers: Numbers,
    scores: jax.Array,
    ids: jax.Array,
    starts: jax.Array,
    step: jax.Array,
) -> jax.Array:
    """Applies the repetition penalty, the n-gram block and the least length, in that order.

    Args:
        program: Which of them are on.
        numbers: Their strengths.
        scores: ``(rows, vocab)``: logits where decoding is greedy or sampled, log-probabilities
            in a beam search.
        ids: ``(rows, T + new)``, prompt and new tokens; not all columns are filled yet.
        starts: ``(rows,)``, the column of each row's first token.
        step: How many new tokens there are.
    """
    width = ids.shape[1] - program.max_new_tokens
    end = width + step
    if program.penalised:
        scores = penalise_repetition(scores, ids, starts, end, numbers.repetition_penalty)
    if program.ngram:
        begin = starts if program.ngram_in_prompt else jnp.full_like(starts, width)
        banned = repeated_ngrams(ids, begin, end, program.ngram, scores.shape[1])
        scores = jnp.where(banned, -jnp.inf, scores)
    too_early = is_eos(jnp.arange(scores.shape[1])[None, :], numbers)
    return jnp.where(too_early & (step < numbers.min_new_tokens), -jnp.inf, scores)


def penalise_repetition(
    scores: jax.Array, ids: jax.Array, starts: jax.Array, end: jax.Array, penalty: jax.Array
) -> jax.Array:
    """Divides the positive scores of tokens in ``ids[:, starts:end]``, multiplies the negative."""
    columns = jnp.arange(ids.shape[1])[None, :]
    held = (columns >= starts[:, None]) & (columns < end)
    seen = _mark(ids, held, scores.shape[1])
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def repeated_ngrams(
    ids: jax.Array, starts: jax.Array, end: jax.Array, size: int, vocab: int
) -> jax.Array:
    """Which next tokens would complete an n-gram that the row already has.

        row  a b c a b   size 3:   the last two, a b, were followed by c   ->   c

    Args:
        ids: ``(rows, columns)``; a row's tokens are ``ids[:, starts:end]``.
        starts: ``(rows,)``.
        end: Scalar.
        size: Tokens of an n-gram.
        vocab: Tokens that there are.

    Returns:
        ``(rows, vocab)`` bool.
    """
    count = ids.shape[1] - size + 1  # windows
    if count < 1:
        return jnp.zeros((ids.shape[0], vocab), bool)
    first = jnp.arange(count)[None, :]
    # A window needs as many tokens as an n-gram, so a row with fewer has no match at all, and
    # the clipped columns below are never read in earnest.
    matches = (first >= starts[:, None]) & (first + size <= end)
    for offset in range(size - 1):
        suffix = jnp.take(ids, end - (size - 1) + offset, axis=1, mode="clip")
        matches &= ids[:, offset : offset + count] == suffix[:, None]
    return _mark(ids[:, size - 1 :], matches, vocab)


def _mark(tokens: jax.Array, where: jax.Array, vocab: int) -> jax.Array:
    """``(rows, vocab)``: the tokens that a row has at a place ``where`` it counts."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros((tokens.shape[0], vocab), bool).at[rows, tokens].max(where)
