"""What a language model knows: the last word of LAMBADA's passages, the perplexity of a text.

    log p(target) = sum of log p(token | all before it), over the target's tokens
    right           every token of the target is the most probable one
    perplexity      exp(-mean log p), a mean over words for LAMBADA, over tokens for a text

Weights may be plain or adapted (`lora_jax.combine`): nothing is merged.
"""

import functools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax

Progress = Callable[[int, int], None]
WIDTHS = 64  # Batches are padded to a multiple of this, so that few shapes compile.


class LastWords(NamedTuple):
    """How well last words were predicted.

    Attributes:
        accuracy: Share of the passages all tokens of whose last word were the most probable.
        perplexity: ``exp`` of the mean of ``-log p(last word)``.
        count: Passages.
    """

    accuracy: float
    perplexity: float
    count: int


class TextPerplexity(NamedTuple):
    """How well a text was predicted.

    Attributes:
        perplexity: ``exp(loss)``.
        loss: The mean of ``-log p(token)``, in nats.
        tokens: How many tokens were predicted.
    """

    perplexity: float
    loss: float
    tokens: int


class Passage(NamedTuple):
    """Tokens, of which those from ``start`` on are to be predicted.

    Attributes:
        ids: Tokens.
        start: At least 1, since a first token follows from nothing.
    """

    ids: Sequence[int]
    start: int


class Scores(NamedTuple):
    """Of each row of a batch: ``log_p (B,)`` float32 of its targets, and ``right (B,)`` bool."""

    log_p: jax.Array
    right: jax.Array


def read_lambada(path: str | os.PathLike) -> list[str]:
    """Reads LAMBADA's passages (Paperno et al., ACL 2016): JSON lines with a ``text`` each.

    Raises:
        ValueError: There is no such file.
    """
    return [json.loads(line)["text"] for line in _read(path).split("\n") if line.strip()]


def read_wikitext(path: str | os.PathLike, *, separator: str = "") -> str:
    """Reads a file of WikiText (Merity et al., ICLR 2017) as one text.

    Args:
        path: The file.
        separator: What to put between two lines, beside the newline that each ends with: nothing
            leaves the file as it is, two newlines give the text that people get who join the
            rows of the ``datasets`` library by two newlines.

    Raises:
        ValueError: There is no such file.
    """
    return _read(path).replace("\n", "\n" + separator).removesuffix(separator)


def lambada(
    model: Any,
    params: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> LastWords:
    """Predicts the last word of each passage: what follows its last space.

    The space belongs to the word, as it does in byte-level vocabularies. Passages are batched
    by length, in an order that depends on nothing else.

    Args:
        model: What `from_pretrained` gave for ``"causal-lm"``.
        params: Its weights, plain or adapted.
        tokenizer: A tokenizer of the transformers library.
        texts: The passages.
        batch_tokens: Tokens a batch, padding included, in each of which every word of the
            vocabulary has a float32 score on the device: 0.8 GB for 4096 and 49152 words.
        progress: Called with the passages done and all of them, after each batch.

    Raises:
        ValueError: No passages, or some that cannot be used: all of them are counted.
    """
    passages = [_last_word(tokenizer, text) for text in texts]
    scores = _score_all(model, params, passages, batch_tokens, progress)
    log_p = np.asarray(scores.log_p, np.float64)
    return LastWords(float(np.mean(scores.right)), math.exp(-log_p.mean()), len(passages))


def text_perplexity(
    model: Any,
    params: Any,
    tokenizer: Any,
    text: str,
    *,
    window: int = 1024,
    stride: int | None = None,
    limit: int | None = None,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> TextPerplexity:
    """The perplexity of a long text, read in windows.

    The text is tokenised as a whole. Windows start every ``stride`` tokens; each predicts what
    the one before it did not, from what it holds itself. Without overlap the first token of
    each window is therefore not predicted; with a stride of ``window - 1`` every token but the
    very first is, and smaller ones give each more to go by.

    Args:
        model: What `from_pretrained` gave for ``"causal-lm"``.
        params: Its weights, plain or adapted.
        tokenizer: A tokenizer of the transformers library.
        text: The text.
        window: Tokens a window.
        stride: Tokens from one window's start to the next; None is ``window``, no overlap.
        limit: Use only this many of the text's tokens, the first; None uses all.
        batch_tokens: See `lambada`. At least one window is computed at a time.
        progress: Called with the windows done and all of them, after each batch.

    Raises:
        ValueError: The text has no two tokens, or a window does not fit the model.
    """
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(
            f"Windows need at least 2 tokens and a stride from 1 to their length; got windows "
            f"of {window} and a stride of {stride}."
        )
    ids = tokenizer(text, verbose=False)["input_ids"][:limit]
    windows = list(_windows(ids, window, stride))
    scores = _score_all(model, params, windows, batch_tokens, progress)
    tokens = sum(len(passage.ids) - passage.start for passage in windows)
    loss = -float(np.sum(scores.log_p, dtype=np.float64)) / tokens
    return TextPerplexity(math.exp(loss), loss, tokens)


@functools.partial(jax.jit, static_argnames="model")
def score(model: Any, params: Any, ids: Any, mask: Any, targets: Any) -> Scores:
    """Scores a batch of rows; compiled once for a model and a shape.

    Args:
        model: What `from_pretrained` gave for ``"causal-lm"``.
        params: Its weights, plain or adapted.
        ids: ``(B, T)`` integers.
        mask: ``(B, T)`` bool, tokens that are not padding.
        targets: ``(B, T)`` bool, tokens to predict; the first of a row never is.

    Returns:
        Sums over each row. Logits, ``(B, T, vocab)`` float32, do not leave the device.
    """
    apply = lora_jax.adapt(model.apply, on_materialize="error")
    logits = apply(params, ids, mask)[:, :-1].astype(jnp.float32)
    following, wanted = ids[:, 1:], targets[:, 1:]
    chosen = jnp.take_along_axis(logits, following[..., None], axis=-1)[..., 0]
    log_p = jnp.where(wanted, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)
    right = (logits.argmax(axis=-1) == following) | ~wanted
    return Scores(log_p.sum(axis=1), right.all(axis=1))


def _read(path: str | os.PathLike) -> str:
    if not Path(path).is_file():
        raise ValueError(f"There is no file {os.fspath(path)!r}.")
    return Path(path).read_text(encoding="utf-8")


def _last_word(tokenizer: Any, text: str) -> Passage:
    context, space, word = text.rpartition(" ")
    if not (context and word):
        raise ValueError(f"{text[-60:]!r} has no last word: nothing before or after a space.")
    before = tokenizer(context)["input_ids"]
    ids = tokenizer(context + space + word)["input_ids"]
    if ids[: len(before)] != before or len(ids) == len(before):
        raise ValueError(
            f"This tokenizer has tokens that reach into the last word of {text[-60:]!r}, so its "
            "probability is not defined. A byte-level tokenizer that splits at spaces has none."
        )
    return Passage(ids, len(before))


def _windows(ids: Sequence[int], window: int, stride: int) -> Iterator[Passage]:
    done = 1  # the first token follows from nothing
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        done = max(done, begin + 1)
        if done < end:
            yield Passage(ids[begin:end], done - begin)
        done = end


def _score_all(
    model: Any,
    params: Any,
    passages: Sequence[Passage],
    batch_tokens: int,
    progress: Progress | None,
) -> Scores:
    """Scores of every passage, in the order given, as arrays on the host."""
    _check(passages, model.config.max_length)
    log_p, right = np.zeros(len(passages), np.float32), np.zeros(len(passages), bool)
    done = 0
    lengths = [len(passage.ids) for passage in passages]
    for rows, width in _batches(lengths, batch_tokens, model.config.max_length):
        batch = _padded([passages[row] for row in rows], width, max(1, batch_tokens // width))
        found = score(model, params, *batch)
        log_p[rows] = np.asarray(found.log_p)[: len(rows)]
        right[rows] = np.asarray(found.right)[: len(rows)]
        done += len(rows)
        if progress is not None:
            progress(done, len(passages))
    return Scores(log_p, right)  # type: ignore[arg-type]


def _check(passages: Sequence[Passage], max_length: int) -> None:
    if not passages:
        raise ValueError("There is nothing to predict: no passage has two tokens.")
    if bare := [passage for passage in passages if passage.start < 1]:
        raise ValueError(
            f"{len(bare)} of {len(passages)} passages have no token before the one to predict."
        )
    lengths = [len(passage.ids) for passage in passages]
    if long := [length for length in lengths if length > max_length]:
        raise ValueError(
            f"{len(long)} of {len(passages)} passages are longer than the {max_length} tokens "
            f"that the model has positions for, the longest {max(long)}."
        )


def _batches(
    lengths: Sequence[int], batch_tokens: int, longest: int
) -> Iterator[tuple[list[int], int]]:
    """Rows of like length, and the width to pad them to; the longest come first."""
    widths: dict[int, list[int]] = {}
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        width = min(-(-lengths[row] // WIDTHS) * WIDTHS, longest)
        widths.setdefault(width, []).append(row)
    for width, rows in widths.items():
        size = max(1, batch_tokens // width)
        for first in range(0, len(rows), size):
            yield rows[first : first + size], width


def _padded(
    passages: Sequence[Passage], width: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``ids``, ``mask`` and ``targets``, ``(size, width)``: rows that lack repeat the first."""
    shape = (size, width)
    ids, mask, targets = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, bool)
    for row in range(size):
        passage = passages[row] if row < len(passages) else passages[0]
        length = len(passage.ids)
        ids[row, :length], mask[row, :length] = passage.ids, True
        targets[row, passage.start : length] = True
    return ids, mask, targets
