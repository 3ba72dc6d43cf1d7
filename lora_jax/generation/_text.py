"""From prompts to texts: tokenised, batched by length, generated, and put back in order.

    prompts   "a b c"  "a"  "a b"     batches of 2, the shortest first     ["a", "a b"]  ["a b c"]

A program compiles for each batch shape, so batches are all of one size and of few lengths.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ._ends import with_tokens_of
from ._generate import GREEDY, generate
from ._options import GenerationOptions
from ._program import Decoder, Generated

Progress = Callable[[int, int], None]
"""Called after each batch with how many prompts are done, and how many there are."""


def generate_text(
    model: Decoder,
    params: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    options: GenerationOptions = GREEDY,
    *,
    batch_size: int = 32,
    key: jax.Array | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Continues texts.

    Args:
        model: A decoder; see `generate`.
        params: Its weights, plain or adapted.
        tokenizer: Of the transformers library: called on prompts, so special tokens are added
            as it adds them. Prompts that have theirs, as a chat template writes them, go through
            `generate_tokens`.
        prompts: The texts.
        options: How to decode. Where it does not state ``eos_token_id``, those of the tokenizer
            and of the model's files end a text; and the tokenizer's padding is used.
        batch_size: Prompts that are decoded together.
        key: Seeds sampling.
        progress: Told of every batch that is done.

    Returns:
        What follows each prompt, in their order, without special tokens.

    Raises:
        ValueError: As in `generate`, or a prompt has no tokens.
    """
    if not prompts:
        return []
    ids = tokenizer(list(prompts), verbose=False)["input_ids"]
    rows = generate_tokens(
        model,
        params,
        ids,
        with_tokens_of(model, tokenizer, options),
        batch_size=batch_size,
        key=key,
        progress=progress,
    )
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def generate_tokens(
    model: Decoder,
    params: Any,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions = GREEDY,
    *,
    batch_size: int = 32,
    key: jax.Array | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """Continues rows of token ids of any lengths.

    Args:
        model: A decoder; see `generate`.
        params: Its weights, plain or adapted.
        prompts: Token ids of each prompt, at least one.
        options: How to decode.
        batch_size: Prompts that are decoded together; fewer if there are fewer.
        key: Seeds sampling; each batch gets a key of its own.
        progress: Told of every batch that is done.

    Returns:
        The new tokens of each prompt, in their order, without the eos that ended them.

    Raises:
        ValueError: As in `generate`.
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if empty := [index for index, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(
            f"These prompts hold no token: {empty[:10]}. Each needs one, such as the bos."
        )
    results: dict[int, list[int]] = {}
    for index, places in enumerate(_batches(prompts, batch_size)):
        batch_key = None if key is None else jax.random.fold_in(key, index)
        ids, mask = pad_left([prompts[place] for place in places], options.pad_id)
        rows = _rows(generate(model, params, ids, mask, options, key=batch_key), options)
        results |= zip(places, rows, strict=True)
        if progress is not None:
            progress(len(results), len(prompts))
    return [results[place] for place in range(len(prompts))]


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows padded at the left to one of few lengths: ids and mask, ``(B, T)`` int32.

    >>> ids, mask = pad_left([[5, 6, 7]], 0)
    >>> ids.shape, int(mask.sum())
    ((1, 16), 3)
    """
    width = padded_length(max(map(len, rows)))
    ids = np.full((len(rows), width), pad, np.int32)
    mask = np.zeros((len(rows), width), np.int32)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = row
        mask[index, width - len(row) :] = 1
    return ids, mask


def padded_length(length: int) -> int:
    """The next of few lengths: in steps of 16, above 128 of an eighth to a quarter of the length.

    >>> [padded_length(length) for length in (1, 16, 17, 128, 129, 300, 1000)]
    [16, 16, 32, 128, 160, 320, 1024]
    """
    step = max(16, 2 ** (length.bit_length() - 3))
    return -(-length // step) * step


def _batches(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Places of the prompts, the shortest first; the last one fills the last batch up."""
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    size = min(batch_size, len(order))
    for start in range(0, len(order), max(size, 1)):
        places = order[start : start + size]
        yield places + places[-1:] * (size - len(places))


def _rows(batch: Generated, options: GenerationOptions) -> Iterator[list[int]]:
    """The new tokens of each row, without its eos."""
    tokens, lengths = np.asarray(batch.tokens), np.asarray(batch.lengths)
    for row, length in zip(tokens, lengths, strict=True):
        kept = row[:length].tolist()
        yield kept[:-1] if kept[-1] in options.eos_ids else kept
