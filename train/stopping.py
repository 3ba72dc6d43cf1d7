"""Being asked to stop: SIGTERM and SIGINT let the step that runs end, and are obeyed after it.

with noted() as asked:
    ... a step ...
    if asked(step): save, and leave
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def noted() -> Iterator[Callable[[int], int]]:
    """While it lasts, the first signal is only noted. A second SIGINT interrupts at once.

    Yields:
        ``(step) -> number``: of the signal that has come, or 0. Processes that share a run agree
        on the step, a later one than that at which the signal came: ask after every step.
    """
    if jax.process_count() > 1:
        with _shared() as asked:
            yield asked
        return
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        del frame
        if number == signal.SIGINT and came:
            raise KeyboardInterrupt
        came.append(number)

    with _handling({signal.SIGTERM: note, signal.SIGINT: note}):
        yield lambda step: came[0] if came else 0


@contextlib.contextmanager
def _shared() -> Iterator[Callable[[int], int]]:
    """JAX's own notice of SIGTERM, which it passes on to all processes; SIGINT becomes one."""

    def pass_on(number: int, frame: Any) -> None:
        del number, frame
        os.kill(os.getpid(), signal.SIGTERM)

    with _handling({signal.SIGINT: pass_on}):
        yield (
            lambda step: (
                signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0
            )
        )


@contextlib.contextmanager
def _handling(handlers: dict[int, Callable[[int, Any], None]]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
