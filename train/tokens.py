"""From records to tokens, each marked as one to learn or one to read.

    prompt          completion    eos
    0 0 0 0 0 0     1 1 1 1 1     1        loss_on: completion
    0 1 1 1 1 1     1 1 1 1 1     1        loss_on: all; the first token follows from nothing

The mark belongs to the token itself; the loss shifts it to the position that predicts it. A text
is tokenised as one, and the marks follow from where each token stands in it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .config import DataSection
from .records import Chat, Record, Text
from .template import answer_spans, has_markers, marked_tokens, render

Span = tuple[int, int]
Marked = tuple[np.ndarray, np.ndarray, int]
"""Token ids, which of them are of completions, and how many lie across a boundary."""


class Tokens(NamedTuple):
    """An example.

    Attributes:
        ids: ``(length,)`` int32.
        learned: ``(length,)`` bool: the tokens whose prediction is in the loss.
        prompt: How many tokens come before the last completion; of a plain text, half of it;
            all where no completion can be told apart.
        answer: The last completion as text; empty of a plain text, which answers nothing.
        shared: How many tokens hold the end of a prompt and the start of a completion. They are
            not learned.
    """

    ids: np.ndarray
    learned: np.ndarray
    prompt: int
    answer: str = ""
    shared: int = 0

    def cut(self, length: int) -> "Tokens":
        """The first tokens of it."""
        return self._replace(ids=self.ids[:length], learned=self.learned[:length])


def tokenise(tokenizer: Any, records: Sequence[Record], section: DataSection) -> list[Tokens]:
    """Tokenises the records of one source, at full length.

    A chat is what the tokenizer's template makes of it, its end of turn included. To other texts
    the tokenizer adds what it starts texts with, and the eos token is appended.

    Args:
        tokenizer: A fast tokenizer of transformers.
        records: The records, all chats or none.
        section: `loss_on` says what is learned.

    Raises:
        ValueError: The tokenizer has no template, or one whose turns cannot be told apart.
    """
    if isinstance(records[0], Chat):
        marked = _tokenise_chats(tokenizer, records, section.loss_on)
    else:
        given = [_given_and_learned(record) for record in records]
        texts = [prompt + completion for prompt, completion in given]
        spans = [[(len(prompt), len(prompt + rest))] for prompt, rest in given]
        marked = [_end(tokenizer, one) for one in _mark(tokenizer, texts, spans)]
    pairs = zip(records, marked, strict=True)
    return [_tokens(record, one, section.loss_on == "all") for record, one in pairs]


def windows(tokenizer: Any, text: str, length: int) -> list[Tokens]:
    """Cuts a long text into windows of ``length`` tokens, each starting with the last one's end.

    The one token that two windows share is read in the second and learned in the first, so that
    every token but the very first is learned once.

    >>> def digits(text, **_):
    ...     return {"input_ids": list(map(int, text))}
    >>> [window.ids.tolist() for window in windows(digits, "1234567", 3)]
    [[1, 2, 3], [3, 4, 5], [5, 6, 7]]
    """
    ids = np.asarray(tokenizer(text, verbose=False)["input_ids"], np.int32)
    starts = range(0, max(1, len(ids) - 1), length - 1)
    parts = [ids[start : start + length] for start in starts]
    return [Tokens(part, np.arange(len(part)) > 0, len(part) // 2) for part in parts]


def marked_text(tokenizer: Any, tokens: Tokens) -> str:
    """An example's text with what is learned between ⟦ and ⟧."""
    changes = np.flatnonzero(np.diff(tokens.learned.astype(np.int8))) + 1
    parts = np.split(tokens.ids, changes)
    flags = [tokens.learned[start] for start in (0, *changes)]
    texts = [tokenizer.decode(part.tolist(), clean_up_tokenization_spaces=False) for part in parts]
    return "".join(f"⟦{text}⟧" if flag else text for text, flag in zip(texts, flags, strict=True))


def _given_and_learned(record: Any) -> tuple[str, str]:
    return ("", record.text) if isinstance(record, Text) else (record.prompt, record.completion)


def _tokenise_chats(tokenizer: Any, chats: Sequence[Any], loss_on: str) -> list[Marked]:
    texts = [render(tokenizer, chat.messages) for chat in chats]
    if has_markers(tokenizer):
        marked = (marked_tokens(tokenizer, chat.messages) for chat in chats)
        return [(np.asarray(ids, np.int32), np.asarray(marks, bool), 0) for ids, marks in marked]
    spans = []
    for chat, text in zip(chats, texts, strict=True):
        try:
            spans.append(answer_spans(tokenizer, chat.messages, text))
        except ValueError:
            if loss_on == "completion":
                raise
            spans.append([])
    # The template has written all special tokens already.
    return _mark(tokenizer, texts, spans, add_special_tokens=False)


def _mark(
    tokenizer: Any, texts: list[str], spans: Sequence[Sequence[Span]], **kwargs: Any
) -> list[Marked]:
    """Tokenises texts; marked is what lies within one of a text's spans of characters."""
    encoded = tokenizer(texts, return_offsets_mapping=True, verbose=False, **kwargs)
    found = []
    for ids, offsets, inside in zip(
        encoded["input_ids"], encoded["offset_mapping"], spans, strict=True
    ):
        starts, ends = np.asarray(offsets, np.int64).reshape(-1, 2).T
        marks, shared = np.zeros(len(ids), bool), 0
        for start, end in inside:
            # Special tokens end at 0. Some tokenizers count no spaces, so one of spaces alone
            # starts where it ends.
            marks |= (starts >= start) & (ends <= end) & (ends > start)
            shared += int(((starts < start) & (ends > start)).sum())
        found.append((np.asarray(ids, np.int32), marks, shared))
    return found


def _end(tokenizer: Any, marked: Marked) -> Marked:
    """Ends a text with eos, to be learned; there may be one, which the tokenizer has added."""
    ids, marks, shared = marked
    eos = tokenizer.eos_token_id
    if eos is None:
        return marked
    length = len(ids) - (ids[-1:] == [eos]).sum()
    return np.append(ids[:length], np.int32(eos)), np.append(marks[:length], True), shared


def _tokens(record: Record, marked: Marked, learn_all: bool) -> Tokens:
    ids, marks, shared = marked
    learned = (marks | learn_all) & (np.arange(len(ids)) > 0)
    if isinstance(record, Text):
        return Tokens(ids, learned, len(ids) // 2)
    if isinstance(record, Chat):
        answers = [turn["content"] for turn in record.messages if turn["role"] == "assistant"]
        return Tokens(ids, learned, _last_start(marks), answers[-1].strip(), shared)
    return Tokens(ids, learned, _last_start(marks), record.completion.strip(), shared)


def _last_start(marks: np.ndarray) -> int:
    """Where the last run of marks starts; the end if there is none."""
    starts = np.flatnonzero(marks & ~np.append(False, marks[:-1]))
    return int(starts[-1]) if len(starts) else len(marks)
