"""Runs groups of jobs in processes of their own, until a time by which everything must end."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .jobs import Job

ROOT = Path(__file__).resolve().parents[2]
WORKER = (sys.executable, "-m", "benchmarks.claims.worker")
LEAST = 5.0  # seconds: below this no process gets as far as its first result
LATE = "the time was up"
# Most of the device's memory from the start: three quarters, the default, would miss points.
SETTINGS = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}


def run(jobs: Sequence[Job], end: float, log: Path) -> Iterator[dict[str, Any]]:
    """The outcome of every job, in order.

    A process that dies costs the point that it was at; the next one goes on behind it.

    Args:
        jobs: What to measure.
        end: When, by `time.monotonic`, what is not measured yet stays so.
        log: Where what processes print is added.
    """
    left = list(jobs)
    while left:
        if end - time.monotonic() < LEAST:
            yield from (job.fields() | {"status": "not run", "why": LATE} for job in left)
            return
        results, why = _process(left, end - time.monotonic(), log)
        yield from results
        left = left[len(results) :]
        if left and why:
            status = "not run" if why == LATE else "failed"
            yield left.pop(0).fields() | {"status": status, "why": why}


def _process(jobs: Sequence[Job], limit: float, log: Path) -> tuple[list[dict[str, Any]], str]:
    """What one process measured, and why it ended early if it did."""
    text = json.dumps([job.fields() for job in jobs])
    why = ""
    with tempfile.TemporaryFile("w+") as results, log.open("a") as errors:
        try:
            done = subprocess.run(
                WORKER,
                input=text,
                text=True,
                stdout=results,
                stderr=errors,
                cwd=ROOT,
                env=SETTINGS | os.environ,
                timeout=limit,
            )
            if done.returncode:
                why = f"the process ended with {done.returncode}: see {log.name}"
        except subprocess.TimeoutExpired:
            why = LATE
        results.seek(0)
        lines = [line for line in results if line.endswith("\n")]
    if len(lines) < len(jobs):
        why = why or f"the process gave no result: see {log.name}"
    return [json.loads(line) for line in lines], why
