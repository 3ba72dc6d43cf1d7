"""One token a row from scores: the best, or a draw from what temperature, top-k and top-p leave.

top_k = 3, top_p = 0.6    p   .5  .2  .1  .1  .1    ->    .5  .2  .1  .1  .1    ->    .5  .2
                                                          tied with the third         sum >= .6
"""

import jax
import jax.numpy as jnp

from ._program import Numbers, Program


def choose(
    program: Program, numbers: Numbers, scores: jax.Array, key: jax.Array | None
) -> jax.Array:
    """The next token of each row, ``(rows,)`` int32, from scores ``(rows, vocab)``."""
    if not program.sampled:
        return jnp.argmax(scores, axis=-1).astype(jnp.int32)
    assert key is not None
    scores = scores / numbers.temperature
    if not program.filtered:
        return jax.random.categorical(key, scores).astype(jnp.int32)
    # Drawn among ranks, so that a rank and not a probability decides what top-p keeps of a tie.
    tokens = jnp.argsort(scores, axis=-1, descending=True, stable=True)
    ranked = keep_top(jnp.take_along_axis(scores, tokens, axis=-1), numbers.top_k, numbers.top_p)
    rank = jax.random.categorical(key, ranked)
    return jnp.take_along_axis(tokens, rank[:, None], axis=-1)[:, 0].astype(jnp.int32)


def keep_top(ranked: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Makes impossible what top-k, then top-p leave out; the first always stays.

    Args:
        ranked: ``(rows, vocab)``, falling.
        top_k: How many to keep, and whatever is tied with the last of them.
        top_p: Of what is left, the fewest that sum to at least this.

    Returns:
        ``ranked`` with ``-inf`` in place of what is left out.
    """
    least = jnp.take(ranked, top_k - 1, axis=-1)[:, None]
    ranked = jnp.where(ranked >= least, ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # Sums of 1 round either way, so a top_p of 1 is off and not compared.
    return jnp.where((before < top_p) | (top_p >= 1), ranked, -jnp.inf)
