"""Greedy and sampled decoding: one token a row and step, until every row has met its eos."""

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
)
from ._sampling import choose


class State(NamedTuple):
    """Between two steps.

    Attributes:
        step: How many new tokens there are.
        cache: Of all tokens but the last.
        ids: ``(B, T + new)`` int32, prompt and new tokens, padding where nothing is yet.
        done: ``(B,)`` bool, rows that have met their eos.
        scores: ``(B,)`` float32, log-probabilities of the new tokens, summed.
    """

    step: jax.Array
    cache: Cache
    ids: jax.Array
    done: jax.Array
    scores: jax.Array


def decode(
    program: Program, params: Any, numbers: Numbers, prompts: Prompts, key: jax.Array | None
) -> Generated:
    """Decodes every row to its eos or to ``max_new_tokens``; see `generate`."""
    rows, width = prompts.ids.shape
    room = jnp.full((rows, program.max_new_tokens), numbers.pad, jnp.int32)
    start = State(
        step=jnp.int32(0),
        cache=prefill(program, params, prompts),
        ids=jnp.concatenate([prompts.ids, room], axis=1),
        done=jnp.zeros(rows, bool),
        scores=jnp.zeros(rows, jnp.float32),
    )

    def unfinished(state: State) -> jax.Array:
        return (state.step < program.max_new_tokens) & ~state.done.all()

    def advance(state: State) -> State:
        column = width + state.step
        last = jax.lax.dynamic_slice_in_dim(state.ids, column - 1, 1, axis=1)
        logits, cache = next_logits(program, params, state.cache, last)
        scores = process(program, numbers, logits, state.ids, prompts.starts, state.step)
        step_key = None if key is None else jax.random.fold_in(key, state.step)
        token = choose(program, numbers, scores, step_key)
        token = jnp.where(state.done, numbers.pad, token)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
        return State(
            step=state.step + 1,
            cache=cache,
            ids=state.ids.at[:, column].set(token),
            done=state.done | is_eos(token, numbers),
            scores=state.scores + jnp.where(state.done, 0.0, log_p),
        )

    end = jax.lax.while_loop(unfinished, advance, start)
    return generated(end.ids, width, end.scores, numbers)
