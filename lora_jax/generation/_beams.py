"""Beam search: the best few hypotheses of each row, as the transformers library searches.

    score of a hypothesis   log p = sum of its tokens' log-probabilities, processed
    score of a finished one   log p / length ** length_penalty

Each step takes the ``max(2, 1 + eos ids) * beams`` best continuations, so that ``beams`` of them
do not end. Those that do end count only among the best ``beams``. A row is closed once ``beams``
have finished and the best running one, scored at its present length, beats none of them.
An impossible hypothesis scores ``-inf``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..models._cache import Cache
from ._processors import process
from ._program import (
    Generated,
    Numbers,
    Program,
    Prompts,
    generated,
    is_eos,
    next_logits,
    prefill,
    take_rows,
)


class Hypotheses(NamedTuple):
    """Hypotheses of each row, the best first.

    Attributes:
        ids: ``(B, count, T + new)`` int32, prompt and new tokens.
        scores: ``(B, count)`` float32.
    """

    ids: jax.Array
    scores: jax.Array

    def best(self, count: int) -> tuple["Hypotheses", jax.Array]:
        """The best ``count``, and where they stood, ``(B, count)``."""
        scores, places = jax.lax.top_k(self.scores, count)
        return Hypotheses(_gather(self.ids, places), scores), places


class Beams(NamedTuple):
    """Between two steps.

    Attributes:
        step: How many new tokens there are.
        cache: Of all tokens but the last, a row for each hypothesis: ``(B * beams, ...)``.
        running: Hypotheses that have not ended, scored by their log-probability.
        finished: Those that have, scored with the length penalty.
        open: ``(B,)`` bool, rows that a running hypothesis may still improve.
    """

    step: jax.Array
    cache: Cache
    running: Hypotheses
    finished: Hypotheses
    open: jax.Array


class Candidates(NamedTuple):
    """Continuations of the running hypotheses, the best first.

    Attributes:
        hypotheses: The running ones with a token more.
        parents: ``(B, count)`` int32, which beam each continues.
        ended: ``(B, count)`` bool, whether the token ends it.
    """

    hypotheses: Hypotheses
    parents: jax.Array
    ended: jax.Array


def search(program: Program, params: Any, numbers: Numbers, prompts: Prompts) -> Generated:
    """Searches every row for its best hypothesis; see `generate`."""
    width = prompts.ids.shape[1]

    def unfinished(beams: Beams) -> jax.Array:
        return (beams.step < program.max_new_tokens) & beams.open.any()

    def advance(beams: Beams) -> Beams:
        scores, cache = _score(program, params, numbers, beams, prompts.starts)
        candidates = _candidates(program, numbers, beams, scores, width + beams.step)
        running, places = _running(candidates).best(program.num_beams)
        parents = jnp.take_along_axis(candidates.parents, places, axis=1)
        finished = _finished(program, numbers, beams, candidates)
        return Beams(
            step=beams.step + 1,
            cache=take_rows(cache, _flat_rows(parents)),
            running=running,
            finished=finished,
            open=beams.open & _improvable(running, finished, beams.step + 1, numbers),
        )

    start = _start(program, params, numbers, prompts)
    best = jax.lax.while_loop(unfinished, advance, start).finished
    return generated(best.ids[:, 0], width, best.scores[:, 0], numbers)


def _start(program: Program, params: Any, numbers: Numbers, prompts: Prompts) -> Beams:
    """All beams at the prompt, all but the first impossible: they would find the same tokens."""
    (rows, width), beams = prompts.ids.shape, program.num_beams
    room = jnp.full((rows, beams, program.max_new_tokens), numbers.pad, jnp.int32)
    repeated = jnp.broadcast_to(prompts.ids[:, None], (rows, beams, width))
    ids = jnp.concatenate([repeated, room], axis=2)
    nothing = jnp.full((rows, beams), -jnp.inf, jnp.float32)
    return Beams(
        step=jnp.int32(0),
        cache=take_rows(prefill(program, params, prompts), jnp.repeat(jnp.arange(rows), beams)),
        running=Hypotheses(ids, nothing.at[:, 0].set(0.0)),
        finished=Hypotheses(ids, nothing),
        open=jnp.ones(rows, bool),
    )


def _score(
    program: Program, params: Any, numbers: Numbers, beams: Beams, starts: jax.Array
) -> tuple[jax.Array, Cache]:
    """Scores of every continuation, ``(B, beams, vocab)``, and the cache with the last token."""
    rows, count, columns = beams.running.ids.shape
    ids = beams.running.ids.reshape(rows * count, columns)
    column = columns - program.max_new_tokens + beams.step
    last = jax.lax.dynamic_slice_in_dim(ids, column - 1, 1, axis=1)
    logits, cache = next_logits(program, params, beams.cache, last)
    starts = jnp.repeat(starts, count)
    log_p = process(program, numbers, jax.nn.log_softmax(logits), ids, starts, beams.step)
    return beams.running.scores[:, :, None] + log_p.reshape(rows, count, -1), cache


def _candidates(
    program: Program, numbers: Numbers, beams: Beams, scores: jax.Array, column: jax.Array
) -> Candidates:
    rows, count, vocab = scores.shape
    wanted = min(max(2, 1 + numbers.eos.shape[0]), vocab) * count
    best, places = jax.lax.top_k(scores.reshape(rows, count * vocab), wanted)
    parents, tokens = places // vocab, (places % vocab).astype(jnp.int32)
    ids = _gather(beams.running.ids, parents).at[:, :, column].set(tokens)
    last_step = beams.step + 1 == program.max_new_tokens
    return Candidates(Hypotheses(ids, best), parents, is_eos(tokens, numbers) | last_step)


def _running(candidates: Candidates) -> Hypotheses:
    """The candidates, with those that ended made impossible."""
    ids, scores = candidates.hypotheses
    return Hypotheses(ids, jnp.where(candidates.ended, -jnp.inf, scores))


def _finished(
    program: Program, numbers: Numbers, beams: Beams, candidates: Candidates
) -> Hypotheses:
    """The best of what had finished and what has now, where the row is still open."""
    ids, scores = candidates.hypotheses
    among_best = jnp.arange(scores.shape[1])[None, :] < program.num_beams
    counts = candidates.ended & among_best & beams.open[:, None]
    scores = jnp.where(counts, _penalised(scores, beams.step + 1, numbers), -jnp.inf)
    pool = Hypotheses(
        jnp.concatenate([beams.finished.ids, ids], axis=1),
        jnp.concatenate([beams.finished.scores, scores], axis=1),
    )
    return pool.best(program.num_beams)[0]


def _improvable(
    running: Hypotheses, finished: Hypotheses, length: jax.Array, numbers: Numbers
) -> jax.Array:
    """Whether the best running hypothesis beats the worst finished one, ``(B,)``.

    While fewer than ``beams`` have finished, the worst is ``-inf``.
    """
    return _penalised(running.scores[:, 0], length, numbers) > finished.scores.min(axis=1)


def _penalised(scores: jax.Array, length: jax.Array, numbers: Numbers) -> jax.Array:
    return scores / length.astype(jnp.float32) ** numbers.length_penalty


def _gather(ids: jax.Array, places: jax.Array) -> jax.Array:
    """``ids (B, count, columns)`` at ``places (B, new count)``."""
    return jnp.take_along_axis(ids, places[:, :, None], axis=1)


def _flat_rows(parents: jax.Array) -> jax.Array:
    """Rows of the cache: ``parents (B, beams)`` within each row of the batch, flattened."""
    rows, count = parents.shape
    return (jnp.arange(rows)[:, None] * count + parents).reshape(rows * count)
