"""Where a step's time and memory go: a trace by kernel and operation, the buffers at the peak.

    DIR/profile.md      tables: the longest kernels and operations, the largest buffers
    DIR/timeline.tsv    one step, a kernel a line
    DIR/trace/          the trace itself, for TensorBoard or Perfetto
    DIR/xla/            the program, and what is alive when

The process has to run with XLA's dumps on (`processes.environment` sees to it).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from . import buffers, kernels

STEPS = 3
LONGEST = 25


def profile(compiled: Any, advance: Callable[[], Any], directory: Path) -> None:
    """Traces some steps and writes the report.

    Args:
        compiled: The compiled step.
        advance: Takes one step.
        directory: Where everything is written.
    """
    trace = directory / "trace"
    with jax.profiler.trace(str(trace), create_perfetto_trace=True):
        for _ in range(STEPS - 1):
            advance()
        jax.block_until_ready(advance())
    program = compiled.as_text()
    (directory / "program.txt").write_text(program, encoding="utf-8")
    lines = _or_why(lambda: kernels.timeline(trace, program, STEPS))
    (directory / "timeline.tsv").write_text(lines, encoding="utf-8")
    report = [
        f"# Profile of {STEPS} steps",
        _or_why(lambda: kernels.tables(trace, program, STEPS, LONGEST)),
        _or_why(lambda: buffers.table(directory / "xla", program, LONGEST)),
    ]
    (directory / "profile.md").write_text("\n\n".join(report) + "\n", encoding="utf-8")


def _or_why(make: Callable[[], str]) -> str:
    """A part of the report, or what kept it from being made: the other parts stand without it."""
    try:
        return make()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
