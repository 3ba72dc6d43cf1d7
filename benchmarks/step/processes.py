"""Runs a job in a process of its own, and ends it, with all it started, when its time is up."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    """The outcome of a job.

    Args:
        job: What to measure.
        limit: Seconds until it is ended.
        log: Where what it prints is added.
    """
    with tempfile.TemporaryDirectory() as scratch:
        variables = environment(job, Path(scratch))
        return outcome("benchmarks.step.worker", job, limit, log, variables)


def outcome(
    worker: str, job: Job, limit: float, log: Path, variables: Mapping[str, str]
) -> dict[str, Any]:
    """The outcome of a job, whatever becomes of its process.

    Args:
        worker: The module that it runs, with the job as its argument.
        job: What to measure.
        limit: Seconds until it is ended.
        log: Where what it prints is added.
        variables: Of its environment.

    Returns:
        ``status`` (``"measured"``, ``"failed"``, ``"late"`` or ``"not run"``), and the figures or
        ``why`` there are none.
    """
    if limit < LEAST:
        return {"status": "not run", "why": "the time was up"}
    with log.open("a") as errors, tempfile.TemporaryFile("w+") as results:
        errors.write(f"\n== {job.title}\n")
        errors.flush()
        process = subprocess.Popen(
            (sys.executable, "-m", worker, json.dumps(job.fields())),
            stdout=results,
            stderr=errors,
            cwd=ROOT,
            env=variables,
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
    found = common()
    if job.contender != OURS:
        return found | {"UNSLOTH_COMPILE_LOCATION": str(scratch / "unsloth")}
    if job.profile:
        dump = f"--xla_dump_to={Path(job.profile).resolve() / 'xla'} --xla_dump_hlo_as_text"
        only = "--xla_dump_hlo_module_re=train_step"
        found["XLA_FLAGS"] = " ".join((found.get("XLA_FLAGS", ""), dump, only, NAMED)).strip()
    return found


def common() -> dict[str, str]:
    """The variables of every process."""
    return OFFLINE | AS_NEEDED | os.environ


def _end(process: subprocess.Popen) -> None:
    """Ends a process and what it started, if any of it is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
