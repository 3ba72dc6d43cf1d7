"""Random batches, the same ones for every contender, and different from step to step."""

import itertools
from collections.abc import Iterator

import numpy as np

from .cases import Case

DISTINCT = 32  # then they come again
FIRST = 3  # ids below are the special tokens of one model or another


def batches(case: Case) -> list[dict[str, np.ndarray]]:
    """All of them: ``input_ids (batch, length)`` and ``labels``, int32.

    A decoder's labels are its inputs (whoever computes the loss shifts them), a classifier's are
    ``(batch,)`` of two classes.
    """
    rng = np.random.default_rng(0)
    shape = case.shape
    size = (shape.batch, shape.length)

    def draw() -> dict[str, np.ndarray]:
        ids = rng.integers(FIRST, shape.fields["vocab_size"], size, np.int32)
        causal = shape.task == "causal-lm"
        return {
            "input_ids": ids,
            "labels": ids if causal else rng.integers(0, 2, shape.batch, np.int32),
        }

    return [draw() for _ in range(DISTINCT)]


def endless(items: list) -> Iterator:
    """Around and around."""
    return itertools.cycle(items)
