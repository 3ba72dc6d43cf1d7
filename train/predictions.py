"""A compiled step run over all evaluation rows."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .batches import Encoded, evaluation_batches
from .console import Console


def compiled_once(step: Any, name: str, console: Console) -> Callable[..., Any]:
    """A jitted step whose compilations, one for each padded length, are announced and timed."""
    programs: dict[tuple[int, ...], Any] = {}

    def call(*arguments: Any) -> Any:
        shape = arguments[-1]["input_ids"].shape
        if shape not in programs:
            with console.compiling(f"{name}, {' x '.join(map(str, shape))} tokens"):
                programs[shape] = step.lower(*arguments).compile()
        return programs[shape](*arguments)

    return call


def predictions(
    call: Callable[[Any], jax.Array],
    encoded: Encoded,
    batch_size: int,
    own: np.ndarray | None = None,
) -> np.ndarray:
    """Outputs ``(examples, n)`` in the examples' order, each example counted once.

    Args:
        call: A batch -> outputs ``(batch, n)``, whole in every process.
        encoded: The examples.
        batch_size: Rows of a batch, of all processes together.
        own: Which of its places this process collates; all if None.
    """
    outputs: dict[int, np.ndarray] = {}
    for rows, batch in evaluation_batches(encoded, batch_size, own):
        # The zip ends with the rows: what only filled the batch up is left behind.
        outputs.update(zip(rows.tolist(), jax.device_get(call(batch)), strict=False))
    return np.stack([outputs[row] for row in range(len(outputs))])
