"""From examples to batches of token ids: tokenised once, shuffled and batched by grain.

A batch is a function of the step's number alone, so a run resumes at any step without a state of
its own. Batches are padded to few lengths, since a program compiles for each: two in training,
four in evaluation, which compiles sooner and sees texts of like length together.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# transformers says on import that it found no PyTorch; its models are not used here.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import grain
import numpy as np
import transformers

from .data import Examples

Batch = dict[str, np.ndarray]
"""`input_ids` and `attention_mask` (batch, length) int32, `labels` (batch,) int32, and
`token_type_ids` (batch, length) int32 for models that tell pairs apart by them."""


class Encoded(NamedTuple):
    """Tokenised examples.

    Attributes:
        ids: Token ids of each example, int32, unpadded.
        types: Token types of each example, or None where the tokenizer has none.
        labels: ``(examples,)`` int32.
        pad: The id that fills a row up.
        lengths: The lengths that batches may be padded to, rising.
        truncated: How many texts were cut to the maximum length.
    """

    ids: list[np.ndarray]
    types: list[np.ndarray] | None
    labels: np.ndarray
    pad: int
    lengths: tuple[int, ...]
    truncated: int

    @property
    def tokens(self) -> int:
        """Tokens in all, padding not counted."""
        return sum(map(len, self.ids))


GROUP = 8  # batches whose rows are dealt out together where texts of like length meet

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model: from its directory, without asking anyone, or by its hub name.

    Raises:
        ValueError: There is none, or it cannot pad.
    """
    local = Path(path).is_dir()
    # Without a vocabulary transformers makes a tokenizer that knows no word.
    if local and not any((Path(path) / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{path} has no tokenizer: none of {', '.join(TOKENIZER_FILES)}.")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            path, local_files_only=local, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} has no tokenizer that can be read: {error}") from None
    if tokenizer.pad_token_id is None:
        raise ValueError(f"The tokenizer of {path} has no padding token.")
    return tokenizer


def encode(tokenizer: Any, examples: Examples, max_length: int) -> Encoded:
    """Tokenises examples, cut to ``max_length`` tokens, special tokens included."""
    both = (examples.texts,) if examples.pairs is None else (examples.texts, examples.pairs)
    whole = tokenizer(*both, verbose=False)
    cut = tokenizer(*both, truncation=True, max_length=max_length, verbose=False)
    ids = [np.asarray(row, np.int32) for row in cut["input_ids"]]
    types = cut.get("token_type_ids")
    return Encoded(
        ids=ids,
        types=types and [np.asarray(row, np.int32) for row in types],
        labels=np.asarray(examples.labels, np.int32),
        pad=tokenizer.pad_token_id,
        lengths=padded_lengths(max(map(len, ids)), max_length),
        truncated=sum(len(row) > max_length for row in whole["input_ids"]),
    )


def padded_lengths(longest: int, max_length: int) -> tuple[int, ...]:
    """At most four lengths in even steps, multiples of 8, up to the longest text.

    >>> padded_lengths(62, 64), padded_lengths(20, 512), padded_lengths(500, 100)
    ((16, 32, 48, 64), (8, 16, 24), (32, 64, 96, 100))
    """
    top = min(max_length, math.ceil(longest / 8) * 8)
    step = math.ceil(top / 32) * 8
    return tuple(sorted({min(top, step * part) for part in range(1, 5)}))


def training_batches(
    encoded: Encoded, batch_size: int, seed: int, *, group_by_length: bool = False
) -> Any:
    """A `grain.MapDataset` without end, ``batches[step]``, each epoch in an order of its own.

    A batch may hold the end of one epoch and the start of the next, so no row is left out.

    Args:
        encoded: The examples.
        batch_size: Rows of a batch.
        seed: Seed of the order.
        group_by_length: Put texts of like length into one batch, so that there is less padding:
            the rows of every `GROUP` batches are dealt out anew by length, and these batches
            come in a random order. It pads to four lengths, otherwise to two.
    """
    rows = grain.MapDataset.range(len(encoded.ids)).shuffle(seed=seed).repeat()
    if group_by_length:
        groups: Any = rows.batch(GROUP * batch_size).map(lambda group: by_length(encoded, group))
        order: Any = grain.MapDataset.range(GROUP).shuffle(seed=seed).repeat()
        steps = grain.MapDataset.range(len(order))
        return steps.map(lambda step: collate(encoded, groups[step // GROUP][order[step]]))
    few = encoded._replace(lengths=encoded.lengths[::-2][::-1])
    return rows.batch(batch_size).map(lambda batch: collate(few, batch))


def by_length(encoded: Encoded, rows: np.ndarray) -> np.ndarray:
    """Deals the rows of some batches out by length: ``(GROUP, batch_size)``, shortest first."""
    lengths = [len(encoded.ids[row]) for row in rows]
    return rows[np.argsort(lengths, kind="stable")].reshape(GROUP, -1)


def evaluation_batches(encoded: Encoded, batch_size: int) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every row once: ``(rows, batch)``, of texts of like length, the shortest first.

    The last batch is filled up to the same size; only its first ``len(rows)`` examples count.
    """
    order = np.argsort([len(row) for row in encoded.ids], kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, collate(encoded, np.resize(rows, batch_size))


def collate(encoded: Encoded, rows: Sequence[int] | np.ndarray) -> Batch:
    """Pads the examples at ``rows`` into one batch."""
    longest = max(len(encoded.ids[row]) for row in rows)
    length = next(length for length in encoded.lengths if length >= longest)
    batch = {
        "input_ids": np.full((len(rows), length), encoded.pad, np.int32),
        "attention_mask": np.zeros((len(rows), length), np.int32),
        "labels": encoded.labels[np.asarray(rows)],
    }
    if encoded.types:
        batch["token_type_ids"] = np.zeros((len(rows), length), np.int32)
    for position, row in enumerate(rows):
        size = len(encoded.ids[row])
        batch["input_ids"][position, :size] = encoded.ids[row]
        batch["attention_mask"][position, :size] = 1
        if encoded.types:
            batch["token_type_ids"][position, :size] = encoded.types[row]
    return batch
