"""What every way of decoding shares: a model step on the cache, and what came out.

The prompt but for its last token fills the cache once; then each step feeds one token a row:

    prompt   . . a b c      prefill a b   ->   feed c, choose d   ->   feed d, choose e  ...
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from .._interpret import adapt
from ..models._cache import Cache, init_cache


class Decoder(Protocol):
    """What `generate` asks of a model; a `lora_jax.models.Pretrained` decoder has it.

    Attributes:
        module: Hashable; ``apply({"params": params}, input_ids, attention_mask, cache=cache)``
            gives ``(logits, cache)``, and ``dtype`` is that of the cache.
        config: What `init_cache` reads, ``vocab_size`` and ``max_length``.
    """

    @property
    def module(self) -> Any: ...

    @property
    def config(self) -> Any: ...


class Generated(NamedTuple):
    """What was generated.

    Attributes:
        tokens: ``(B, max_new_tokens)`` int32, the new tokens; padding after a row's eos.
        lengths: ``(B,)`` int32, new tokens of each row, its eos included.
        scores: ``(B,)`` float32. Greedy or sampled: the sum of the new tokens' log-probabilities
            under the model. Beam search: that of the processed scores, divided by
            ``length ** length_penalty``.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What is compiled in: a change makes a new program.

    Attributes:
        module: The model.
        config: Its architecture.
        max_new_tokens: As in `GenerationOptions`.
        num_beams: Likewise.
        sampled: Whether tokens are sampled.
        filtered: Whether ``top_k`` or ``top_p`` is on; they sort the vocabulary.
        ngram: ``no_repeat_ngram_size``.
        ngram_in_prompt: ``no_repeat_ngram_in_prompt``.
        penalised: Whether ``repetition_penalty`` is on.
    """

    module: Any
    config: Any
    max_new_tokens: int
    num_beams: int
    sampled: bool
    filtered: bool
    ngram: int
    ngram_in_prompt: bool
    penalised: bool


class Numbers(NamedTuple):
    """What may change without a new compilation: scalars of `GenerationOptions`.

    Attributes:
        temperature: Float32, as the others where nothing is said.
        top_k: Int32, at most the vocabulary.
        top_p: In ``(0, 1]``.
        length_penalty: Exponent of the length.
        repetition_penalty: Above 0.
        min_new_tokens: Int32.
        eos: ``(count,)`` int32.
        pad: Int32.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    length_penalty: Any
    repetition_penalty: Any
    min_new_tokens: Any
    eos: Any
    pad: Any


class Prompts(NamedTuple):
    """Prompts that all end in the last column.

    Attributes:
        ids: ``(B, T)`` int32.
        starts: ``(B,)`` int32, the column of each row's first token.
    """

    ids: jax.Array
    starts: jax.Array

    @property
    def mask(self) -> jax.Array:
        """``(B, T)`` bool, False under the padding."""
        return jnp.arange(self.ids.shape[1])[None, :] >= self.starts[:, None]


def align(input_ids: jax.Array, attention_mask: jax.Array, longest: int) -> Prompts:
    """Moves each row's kept tokens to its end, in their order.

    It changes no logit: a decoder's positions count kept tokens, whichever side is padded.

        ids  a b c 0     mask  1 1 1 0     ->     0 a b c
             0 0 d e           0 0 1 1            0 0 d e

    Args:
        input_ids: Ints ``(B, T)``.
        attention_mask: ``(B, T)``, zero where padded.
        longest: No row has more tokens, so columns beyond are padding and are cut off.
    """
    kept = attention_mask.astype(bool)
    order = jnp.argsort(kept, axis=1, stable=True)[:, -longest:]
    # What stands under padding may be no token at all, and its embedding would be NaN.
    ids = jnp.take_along_axis(jnp.where(kept, input_ids, 0).astype(jnp.int32), order, axis=1)
    return Prompts(ids, ids.shape[1] - kept.sum(1, dtype=jnp.int32))


def prefill(program: Program, params: Any, prompts: Prompts) -> Cache:
    """The cache of all prompt tokens but the last, with room for what is to come."""
    rows, width = prompts.ids.shape
    # The last new token is never fed.
    slots = width + program.max_new_tokens - 1
    cache = init_cache(program.config, rows, slots, program.module.dtype)
    if width == 1:
        return cache
    # Nobody reads these logits, so XLA leaves the output head out.
    _, cache = _apply(program, params, prompts.ids[:, :-1], prompts.mask[:, :-1], cache)
    return cache


def next_logits(
    program: Program, params: Any, cache: Cache, last: jax.Array
) -> tuple[jax.Array, Cache]:
    """Feeds one token a row.

    Args:
        program: What is compiled.
        params: The weights.
        cache: Of everything before the token.
        last: ``(rows, 1)``, the token.

    Returns:
        Float32 logits ``(rows, vocab)`` of the token after it, and the cache with it.
    """
    logits, cache = _apply(program, params, last, jnp.ones_like(last, bool), cache)
    return logits[:, -1], cache


def _apply(program: Program, params: Any, ids: jax.Array, mask: jax.Array, cache: Cache) -> Any:
    return adapt(program.module.apply)({"params": params}, ids, mask, cache=cache)


def take_rows(cache: Cache, rows: jax.Array) -> Cache:
    """The cache of chosen rows, in that order: ``rows`` are ``(count,)`` ints."""
    return cache._replace(
        key=jnp.take(cache.key, rows, axis=1),
        value=jnp.take(cache.value, rows, axis=1),
        valid=cache.valid[rows],
        positions=cache.positions[rows],
    )


def is_eos(tokens: jax.Array, numbers: Numbers) -> jax.Array:
    """Whether each token, of any shape, ends its row."""
    return jnp.any(tokens[..., None] == jnp.reshape(numbers.eos, (1,) * tokens.ndim + (-1,)), -1)


def generated(ids: jax.Array, width: int, scores: jax.Array, numbers: Numbers) -> Generated:
    """Cuts the prompts' ``width`` columns off ``ids (B, T + new)`` and measures what is left."""
    tokens = ids[:, width:]
    ends = is_eos(tokens, numbers)
    lengths = jnp.where(ends.any(1), jnp.argmax(ends, axis=1) + 1, tokens.shape[1])
    return Generated(tokens, lengths.astype(jnp.int32), scores)
