"""Times, measured in turns: what one round measures together shares the machine's mood.

ratio = median over rounds of  seconds[x] / seconds[y]      with the interval that noise leaves
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

BURST = 0.1  # seconds: far above what reading the clock and starting a call cost


class Spread(NamedTuple):
    """A median and the interval that holds it with 95 % probability."""

    median: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    """The median of samples, its interval from their order alone.

    The median of ``n`` independent samples lies between the sorted samples ``n / 2 -+ 0.98
    sqrt(n)`` in 95 of 100 cases, whatever their distribution; of few samples these are the
    least and the largest, which takes at least 6.

    >>> spread([3.0, 1.0, 2.0])
    Spread(median=2.0, low=1.0, high=3.0)
    """
    ordered = sorted(samples)
    reach = 0.98 * math.sqrt(len(ordered))
    low = max(0, math.floor(len(ordered) / 2 - reach))
    high = min(len(ordered) - 1, math.ceil(len(ordered) / 2 + reach))
    return Spread(statistics.median(ordered), ordered[low], ordered[high])


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The spread of ``above / below``, round by round.

    >>> ratio([2.0, 4.0, 9.0], [1.0, 2.0, 3.0]).median
    2.0
    """
    return spread([a / b for a, b in zip(above, below, strict=True)])


def rounds(
    calls: Mapping[str, Callable[[], Any]],
    *,
    seconds: float,
    least: int = 6,
    burst: float = BURST,
) -> dict[str, list[float]]:
    """Seconds of one call of each, round after round, each round in an order of its own.

    With one order all the time each would have one predecessor, and the caches that it leaves.

    Args:
        calls: Name to a function without arguments, warm: what it returns is waited for.
        seconds: How long to go on.
        least: Rounds at least, whatever they take.
        burst: Seconds that one measurement takes at least: short calls are repeated.
    """
    names = list(calls)
    repeats = {name: max(1, math.ceil(burst / timed(calls[name]))) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in names}
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds
    while len(taken[names[0]]) < least or time.perf_counter() < end:
        shuffle(names)
        for name in names:
            taken[name].append(timed(calls[name], repeats[name]))
    return taken


def timed(call: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds of one call, as the mean of some in a row, the last one waited for."""
    begun = time.perf_counter()
    for _ in range(repeats - 1):
        call()
    jax.block_until_ready(call())
    return max((time.perf_counter() - begun) / repeats, 1e-9)
