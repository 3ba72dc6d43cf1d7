"""The clock: blocks of steps that follow each other without a wait, as training has them.

seconds of a step = (seconds from one wait to the next) / (steps between them)
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

from .job import Job


def timed_steps(
    job: Job, advance: Callable[[], Any], wait: Callable[[Any], float]
) -> dict[str, Any]:
    """Runs and times the steps of a job.

    Args:
        job: How many.
        advance: Starts one step, and gives its loss as the framework has it.
        wait: Waits for all that was started, and gives the loss as a number.

    Returns:
        ``first_run_seconds`` of the first step, ``step_seconds`` (median, least, most of the
        rounds), how many were timed, and the last ``loss``.
    """
    begun = time.perf_counter()
    loss = wait(advance())
    figures: dict[str, Any] = {"first_run_seconds": time.perf_counter() - begun}
    if not job.start_only:
        loss = _block(advance, wait, max(1, job.warmup - 1))[1]
        blocks = [_block(advance, wait, job.steps) for _ in range(job.rounds)]
        seconds = [taken / job.steps for taken, _ in blocks]
        loss = blocks[-1][1]
        figures["step_seconds"] = spread(seconds)
        figures["timed_steps"] = job.steps * job.rounds
    return figures | {"loss": loss}


def spread(seconds: list[float]) -> dict[str, float]:
    """The median of some seconds, and the least and most of them."""
    return {"median": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}


def _block(
    advance: Callable[[], Any], wait: Callable[[Any], float], steps: int
) -> tuple[float, float]:
    """Seconds that some steps in a row take, and the loss of the last."""
    begun = time.perf_counter()
    for _ in range(steps - 1):
        advance()
    loss = wait(advance())
    return time.perf_counter() - begun, loss
