"""generate: prompts in, new tokens out, compiled once for a shape.

tokens, lengths, scores = generate(model, params, input_ids, attention_mask, options, key=key)
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ._beams import search
from ._loop import decode
from ._options import GenerationOptions, listed
from ._program import Decoder, Generated, Numbers, Program, align

GREEDY = GenerationOptions()


def generate(
    model: Decoder,
    params: Any,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    options: GenerationOptions = GREEDY,
    *,
    key: jax.Array | None = None,
) -> Generated:
    """Continues prompts with new tokens.

    The first call for a model, a batch shape and what `GenerationOptions` compiles in takes as
    long as a compilation does; later ones run at once. It stops early where every row has ended.
    Prompts that are sharded by rows over a mesh with ``AxisType.Auto`` axes stay so.

    Args:
        model: A decoder, from `lora_jax.models.from_pretrained` with ``task="causal-lm"``.
        params: Its weights, plain or as `lora_jax.combine` makes them. Adapted ones stay
            factored: nothing is merged.
        input_ids: Prompts, integers ``(B, T)``.
        attention_mask: ``(B, T)``, zero or False where padded, on either side; rows are aligned
            to the right inside. None keeps every token: padding is not guessed from ids.
        options: How to decode; greedy by default.
        key: Seeds sampling, and is needed for it. The draws of a row depend on its place in the
            batch.

    Raises:
        ValueError: The prompts are not of the model or do not fit it with the new tokens, an eos
            or padding id is none of its tokens, or sampling lacks a key (all listed).
    """
    if attention_mask is None:
        attention_mask = jnp.ones(np.shape(input_ids), bool)
    problems = list(_problems(model.config, input_ids, attention_mask, options))
    if options.temperature and key is None:
        problems.append("`temperature` asks for sampling, which needs a `key`.")
    if problems:
        raise ValueError(listed("Nothing can be generated", problems))
    return _run(
        _program(model, options),
        params,
        _numbers(options, model.config.vocab_size),
        jnp.asarray(input_ids),
        jnp.asarray(attention_mask),
        key if options.temperature else None,
    )


@functools.partial(jax.jit, static_argnums=0)
def _run(
    program: Program,
    params: Any,
    numbers: Numbers,
    input_ids: jax.Array,
    attention_mask: jax.Array,
    key: jax.Array | None,
) -> Generated:
    longest = program.config.max_length - program.max_new_tokens
    prompts = align(input_ids, attention_mask, longest)
    if program.num_beams > 1:
        return search(program, params, numbers, prompts)
    return decode(program, params, numbers, prompts, key)


def _program(model: Decoder, options: GenerationOptions) -> Program:
    return Program(
        module=model.module,
        config=model.config,
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
        sampled=options.temperature > 0,
        filtered=options.top_k > 0 or options.top_p < 1,
        ngram=options.no_repeat_ngram_size,
        ngram_in_prompt=options.no_repeat_ngram_in_prompt,
        penalised=options.repetition_penalty != 1,
    )


def _numbers(options: GenerationOptions, vocab: int) -> Numbers:
    return Numbers(
        temperature=np.float32(options.temperature),
        top_k=np.int32(min(options.top_k or vocab, vocab)),
        top_p=np.float32(options.top_p),
        length_penalty=np.float32(options.length_penalty),
        repetition_penalty=np.float32(options.repetition_penalty),
        min_new_tokens=np.int32(options.min_new_tokens),
        eos=np.asarray(options.eos_ids, np.int32),
        pad=np.int32(options.pad_id),
    )


def _problems(
    config: Any, input_ids: ArrayLike, attention_mask: ArrayLike, options: GenerationOptions
) -> Iterable[str]:
    ids, mask = np.asarray(input_ids), np.asarray(attention_mask).astype(bool)
    vocab = config.vocab_size
    for token in {*options.eos_ids, options.pad_id}:
        if token >= vocab:
            yield f"Token {token} of `options` is none of the model's {vocab}."
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        yield f"`input_ids` must be integers (B, T), got {ids.dtype} {ids.shape}."
    elif mask.shape != ids.shape:
        yield f"`attention_mask` must be {ids.shape} as `input_ids` are, got {mask.shape}."
    else:
        yield from _bad_rows(ids, mask, vocab)
        longest, new = int(mask.sum(1).max()), options.max_new_tokens
        if longest + new > config.max_length:
            yield (
                f"The longest prompt has {longest} tokens, which with {new} new ones is more than "
                f"the model's {config.max_length} positions."
            )


def _bad_rows(ids: np.ndarray, mask: np.ndarray, vocab: int) -> Iterable[str]:
    if empty := np.flatnonzero(~mask.any(1)).tolist():
        yield f"These rows hold no token: {empty}. A prompt needs one, such as the bos."
    if len(strange := np.unique(ids[mask & ((ids < 0) | (ids >= vocab))])):
        yield f"`input_ids` has {strange[:5].tolist()}; the model's tokens are 0 to {vocab - 1}."
