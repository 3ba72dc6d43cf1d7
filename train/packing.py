"""Packing: several examples in one row, each blind to the others.

    input_ids    a a a b b c c c c .        attention stays within a segment, and
    segment_ids  1 1 1 2 2 3 3 3 3 0        positions count from each example's start
    positions    0 1 2 0 1 0 1 2 3 0

Which examples share a row is settled once, from their lengths and a seed; the order of the rows
is shuffled anew in each epoch as that of unpacked examples is.
"""

import bisect
from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Puts examples into rows: the longest first, each where it leaves the least room.

    Best fit decreasing needs at most 11/9 of the fewest rows possible, plus one (Johnson 1974).

    Args:
        lengths: Tokens of each example, at most ``capacity``.
        capacity: Tokens of a row.
        seed: Orders examples of equal length.

    Returns:
        For each row the examples in it.

    >>> pack([5, 3, 6, 2], 8, seed=0)
    [[2, 3], [0, 1]]
    """
    ties = np.random.default_rng(seed).permutation(len(lengths))
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), rising
    for example in sorted(range(len(lengths)), key=lambda one: (-lengths[one], ties[one])):
        place = bisect.bisect_left(open_rows, (lengths[example], -1))
        if place == len(open_rows):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = open_rows.pop(place)
        rows[row].append(example)
        if room > lengths[example]:
            bisect.insort(open_rows, (room - lengths[example], row))
    return rows
