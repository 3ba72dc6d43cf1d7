"""The order of rows: a new permutation for each epoch, known at any position without the rest.

order(rows, seed)[position]      position = step * batch_size + place in the batch
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np


class Order(Protocol):
    """Row numbers without end."""

    def __getitem__(self, position: int, /) -> Any:
        """The row at a position, counted over all epochs."""
        ...


MakeOrder = Callable[[int, int], Order]
"""``(rows, seed) -> Order``."""


def grain_order(rows: int, seed: int) -> Order:
    """The order of grain's shuffle."""
    import grain

    return grain.MapDataset.range(rows).shuffle(seed=seed).repeat()


class _Permutations:
    """Numpy's permutations, the last few epochs kept."""

    def __init__(self, rows: int, seed: int):
        self._rows = rows
        self._epoch = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng((seed, epoch)).permutation(rows)
        )

    def __getitem__(self, position: int, /) -> int:
        epoch, place = divmod(position, self._rows)
        return int(self._epoch(epoch)[place])


def numpy_order(rows: int, seed: int) -> Order:
    """The order of numpy's PCG64, seeded with the run's seed and the epoch's number."""
    return _Permutations(rows, seed)
