"""Measures jobs, one after another, in a process that holds the device.

    python -m benchmarks.claims.worker < jobs.json > results.jsonl

A line goes out as soon as a point is measured: what dies later takes nothing with it. A point
that does not fit into memory is a line that says so.
"""

import gc
import json
import os
import platform
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO

import jax

from .jobs import Job

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"


def machine(job: Job) -> dict[str, Any]:
    """What this runs on."""
    del job
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "platform": device.platform,
        "device": device.device_kind if device.platform != "cpu" else platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_bytes": stats.get("bytes_limit"),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


# What a job does not need is not imported for it.


def step(job: Job) -> dict[str, Any]:
    """Parts b and d."""
    from .step import measure

    return measure(job)


def inference(job: Job) -> dict[str, Any]:
    """Part c."""
    from .inference import measure

    return measure(job)


def cpu(job: Job) -> dict[str, Any]:
    """Part e, which needs the ``train`` extra."""
    from benchmarks.cpu import measure

    return measure(seconds=job.seconds)


KINDS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "machine": machine,
    "step": step,
    "inference": inference,
    "cpu": cpu,
}


def outcome(job: Job) -> dict[str, Any]:
    """The job and its figures, or why there are none."""
    try:
        return job.fields() | {"status": "measured"} | KINDS[job.kind](job)
    except Exception as error:
        traceback.print_exc()
        if OUT_OF_MEMORY in str(error):
            return job.fields() | {"status": "does not fit", "why": "out of device memory"}
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return job.fields() | {"status": "failed", "why": why}


def main(source: TextIO, results: TextIO) -> None:
    """Reads jobs, writes results; a point of two series is measured once."""
    known: dict[Job, dict[str, Any]] = {}
    for fields in json.load(source):
        point = Job(**fields | {"series": ""})
        if point not in known:
            known[point] = outcome(point)
        results.write(json.dumps(known[point] | {"series": fields["series"]}) + "\n")
        results.flush()
        gc.collect()  # arrays in cycles of an error's frames, before the next point needs them


if __name__ == "__main__":
    # What libraries print goes to the log, and results alone to the output.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.stdin, results)
