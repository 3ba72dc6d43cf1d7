"""Runs a job in a process of its own, and ends it, with all it started, when its time is up."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

from .contenders import OURS
from .job import Job

ROOT = Path(__file__).resolve().parents[2]
LEAST = 10.0  # seconds: below this no process gets as far as a step

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
# Memory is taken as it is needed, so that the peak is what the step needed.
AS_NEEDED = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
# Kernels that CUDA graphs start come without the names of their operations.
NAMED = "--xla_gpu_enable_command_buffer="


def run(job: Job, limit: float, log: Path) -> dict[str, Any]:
    """The outcome of a job, whatever becomes of its process.

    Args:
        job: What to measure.
        limit: Seconds until it is ended.
        log: Where what it prints is added.

    Returns:
        ``status`` (``"measured"``, ``"failed"``, ``"late"`` or ``"not run"``), and the figures or
        ``why`` there are none.
    """
    if limit < LEAST:
        return {"status": "not run", "why": "the time was up"}
    with tempfile.TemporaryDirectory() as scratch, log.open("a") as errors:
        errors.write(f"\n== {job.case}, {job.contender}\n")
        errors.flush()
        return _process(job, limit, Path(scratch), errors)


def _process(job: Job, limit: float, scratch: Path, errors: IO[str]) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as results:
        process = subprocess.Popen(
            (sys.executable, "-m", "benchmarks.step.worker", json.dumps(job.fields())),
            stdout=results,
            stderr=errors,
            cwd=ROOT,
            env=environment(job, scratch),
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            return {"status": "late", "why": f"not done after {limit:.0f} s"}
        finally:
            _end(process)
        results.seek(0)
        lines = results.read().splitlines()
    if not lines:
        return {"status": "failed", "why": f"its process ended with {code}, without a result"}
    return json.loads(lines[-1])


def environment(job: Job, scratch: Path) -> dict[str, str]:
    """The variables of a job's process.

    Args:
        job: The job.
        scratch: Where it may write what nobody needs.
    """
    found = OFFLINE | AS_NEEDED | os.environ
    if job.contender != OURS:
        return found | {"UNSLOTH_COMPILE_LOCATION": str(scratch / "unsloth")}
    if job.profile:
        dump = f"--xla_dump_to={Path(job.profile).resolve() / 'xla'} --xla_dump_hlo_as_text"
        only = "--xla_dump_hlo_module_re=train_step"
        found["XLA_FLAGS"] = " ".join((found.get("XLA_FLAGS", ""), dump, only, NAMED)).strip()
    return found


def _end(process: subprocess.Popen) -> None:
    """Ends a process and what it started, if any of it is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
