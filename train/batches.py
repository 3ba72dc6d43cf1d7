"""From encoded rows to batches: shuffled, grouped, and padded to few lengths.

A batch is a function of the step's number alone, so a run resumes at any step without a state of
its own. Batches are padded to few lengths, since a program compiles for each: two in training,
four in evaluation, which compiles sooner and sees rows of like length together.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from .order import MakeOrder, Order

Batch = dict[str, np.ndarray]
"""Arrays ``(batch, ...)``; among them `input_ids` and `attention_mask` (batch, length) int32."""

GROUP = 8  # batches whose rows are dealt out together where rows of like length meet


class Encoded(Protocol):
    """Rows of tokens that can be batched; each task has its own.

    Attributes:
        lengths: The lengths that batches may be padded to, rising.
        sizes: Tokens of each row, padding not counted; counted anew when asked for.
        size: Tokens of one row.
        ids: The tokens themselves.
        pad: The token that fills a row up.
    """

    @property
    def lengths(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def sizes(self) -> Sequence[int]: ...  # noqa: D102

    def size(self, row: int, /) -> int: ...  # noqa: D102

    @property
    def ids(self) -> Sequence[np.ndarray]: ...  # noqa: D102

    @property
    def pad(self) -> int: ...  # noqa: D102

    def collate(self, rows: Sequence[int] | np.ndarray, length: int) -> Batch:
        """Pads the rows of these numbers to ``length`` tokens."""
        ...


class Batches:
    """The batches of training, ``batches[step]``, without end.

    A batch may hold the end of one epoch and the start of the next, so no row is left out.

    Args:
        encoded: The rows.
        batch_size: Rows of a batch.
        seed: Seed of the order.
        make_order: What shuffles.
        own: Which places of a batch to collate, where processes share it; all if None.
        group_by_length: Put rows of like length into one batch, so that there is less padding:
            the rows of every `GROUP` batches are dealt out anew by length, and these batches
            come in a random order. It pads to four lengths, otherwise to two.
    """

    def __init__(
        self,
        encoded: Encoded,
        batch_size: int,
        seed: int,
        make_order: MakeOrder,
        *,
        own: np.ndarray | None = None,
        group_by_length: bool = False,
    ):
        self._encoded, self._batch_size = encoded, batch_size
        self._own = np.arange(batch_size) if own is None else own
        self._order = make_order(len(encoded.sizes), seed)
        self._groups: Order | None = make_order(GROUP, seed) if group_by_length else None
        # Of a step they are asked for twice: for its batch, and to be named and counted.
        self.rows = functools.lru_cache(maxsize=2)(self._rows)

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        encoded = self._encoded
        lengths = encoded.lengths if self._groups else encoded.lengths[::-2][::-1]
        return collate(encoded, self.rows(step), lengths, self._own)

    def _rows(self, step: int) -> np.ndarray:
        """The numbers of the rows of a step, of all processes together."""
        encoded, size = self._encoded, self._batch_size
        if self._groups is None:
            return np.array([self._order[step * size + place] for place in range(size)])
        first = step // GROUP * GROUP * size
        rows = np.array([self._order[first + place] for place in range(GROUP * size)])
        return by_length(encoded, rows)[int(self._groups[step])]

    def tokens(self, rows: np.ndarray) -> int:
        """How many tokens some rows have, padding not counted."""
        return sum(self._encoded.size(row) for row in rows.tolist())


def by_length(encoded: Encoded, rows: np.ndarray) -> np.ndarray:
    """Deals the rows of some batches out by length: ``(GROUP, batch_size)``, shortest first."""
    lengths = [encoded.size(row) for row in rows]
    return rows[np.argsort(lengths, kind="stable")].reshape(GROUP, -1)


def evaluation_batches(
    encoded: Encoded, batch_size: int, own: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, Batch]]:
    """Every row once: ``(rows, batch)``, of rows of like length, the shortest first.

    The last batch is filled up to the same size; only its first ``len(rows)`` rows count. Of the
    batch only the ``own`` places are collated, where processes share it.
    """
    order = np.argsort(encoded.sizes, kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield rows, collate(encoded, np.resize(rows, batch_size), encoded.lengths, own)


def collate(
    encoded: Encoded,
    rows: Sequence[int] | np.ndarray,
    lengths: Sequence[int],
    own: np.ndarray | None = None,
) -> Batch:
    """One batch of these rows, padded to the least of the lengths that holds the longest.

    Args:
        encoded: Where the rows are from.
        rows: Their numbers.
        lengths: To choose from.
        own: Which places of the batch to form; all if None.
    """
    longest = max(encoded.size(row) for row in rows)
    length = next(length for length in lengths if length >= longest)
    return encoded.collate(rows if own is None else np.asarray(rows)[own], length)


def pad(rows: Sequence[Any], length: int, fill: int) -> np.ndarray:
    """Rows of integers, filled up at the end: ``(rows, length)`` int32.

    >>> pad([[1, 2], [3]], 3, 0).tolist()
    [[1, 2, 0], [3, 0, 0]]
    """
    padded = np.full((len(rows), length), fill, np.int32)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded


def padded_lengths(longest: int, max_length: int) -> tuple[int, ...]:
    """At most four lengths in even steps, multiples of 8, up to the longest row.

    >>> padded_lengths(62, 64), padded_lengths(20, 512), padded_lengths(500, 100)
    ((16, 32, 48, 64), (8, 16, 24), (32, 64, 96, 100))
    """
    top = min(max_length, math.ceil(longest / 8) * 8)
    step = math.ceil(top / 32) * 8
    return tuple(sorted({min(top, step * part) for part in range(1, 5)}))
