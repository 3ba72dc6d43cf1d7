"""The values that codes stand for, and where one code ends and the next begins.

NF4          16 quantiles of a normal distribution: what an entry of a weight is rounded to
DYNAMIC_MAP  256 values, dense around 0: what a block's absmax is rounded to
"""

import numpy as np

F32 = np.float32

# arXiv 2305.14314, appendix E, with the digits that bitsandbytes has. They are the quantiles of
# section 3 in float32, which the rounding of whoever computed them first belongs to.
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    F32,
)


def midpoints(values: np.ndarray) -> np.ndarray:
    """Between each value and the next, float32: a number above it is nearer to the next."""
    return (values[:-1] + values[1:]) / F32(2)


def dynamic_map() -> np.ndarray:
    """The signed 8-bit dynamic map, sorted, float32: ``(256,)`` (arXiv 2110.02861, section 1.3).

    Decade ``10**-6 ... 10**0`` number ``e`` is cut into ``2**e`` equal intervals from a tenth to
    the whole of it; their middles with both signs, 0 and 1 are the values.
    """
    middles = [F32(10.0 ** (e - 6)) * midpoints(_tenth_to_one(2**e)) for e in range(7)]
    positive = np.concatenate(middles)
    return np.sort(np.concatenate([-positive, [F32(0), F32(1)], positive]))


def _tenth_to_one(intervals: int) -> np.ndarray:
    """``intervals + 1`` bounds from 0.1 to 1, rounded as `torch.linspace` rounds them.

    Its step is float32, each half counts from its own end, and there is one rounding at the end.
    """
    start, end = float(F32(0.1)), 1.0
    step = float((F32(end) - F32(start)) / F32(intervals))
    index = np.arange(intervals + 1)
    forward, backward = start + step * index, end - step * (intervals - index)
    return np.where(index < (intervals + 1) // 2, forward, backward).astype(F32)


def dynamic_bounds(values: np.ndarray) -> np.ndarray:
    """Where a code of the dynamic map begins, for numbers moved to ``[0, 2]``: float32 ``(255,)``.

    ``x`` gets the code ``sum(x + 1 >= bounds)``. That is the value nearest to ``x`` after ``x``
    has been rounded to one of 65,536 steps from -1 to 1, as bitsandbytes does on a CPU. (On a GPU
    it rounds to the nearest value at once: about 2 codes in 1,000 then differ, by one.)
    """
    steps = np.arange(65536, dtype=F32) / F32(65535) * F32(2) - F32(1)
    codes = np.searchsorted(midpoints(values), steps)
    first = np.searchsorted(codes, np.arange(1, 256))
    # Floats from 0 up are ordered as their bits are, so the first one to reach a step is found
    # by bisection.
    low, high = np.zeros(255, np.int32), np.full(255, F32(2).view(np.int32))
    while (low < high).any():
        middle = low + (high - low) // 2
        reached = _step(middle.view(F32)) >= first
        low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
    return high.view(F32)


def _step(moved: np.ndarray) -> np.ndarray:
    """The step that ``x + 1`` is rounded to: ``(x + 1) / 2 * 65535 + 0.5``, rounded once, cut."""
    scaled = moved.astype(np.float64) * 0.5 * 65535 + 0.5
    return scaled.astype(F32).astype(np.int32)


DYNAMIC_MAP = dynamic_map()
DYNAMIC_BOUNDS = dynamic_bounds(DYNAMIC_MAP)
