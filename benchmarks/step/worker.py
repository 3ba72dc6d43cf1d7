"""One contender on one case, in a process of its own: the job in, one line of JSON out.

python -m benchmarks.step.worker '{"case": "tiny", "contender": "ours"}'
"""

import importlib
import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from .contenders import CONTENDERS
from .job import Job, read

AnyJob = TypeVar("AnyJob", bound=Job)


def measure(job: Job) -> dict[str, Any]:
    """The figures of a job."""
    return importlib.import_module(CONTENDERS[job.contender].module).measure(job)


def outcome(job: AnyJob, measure: Callable[[AnyJob], dict[str, Any]] = measure) -> dict[str, Any]:
    """The figures of a job, or why there are none."""
    try:
        figures = measure(job)
    except Exception as error:
        traceback.print_exc()
        said = str(error).strip().splitlines() or [""]
        return {"status": "failed", "why": f"{type(error).__name__}: {said[0]}"[:300]}
    if not math.isfinite(figures["loss"]):
        return {"status": "failed", "why": f"the loss is {figures['loss']}"}
    return {"status": "measured"} | figures


def answer(outcome: Callable[[], dict[str, Any]]) -> None:
    """Measures, with what libraries print kept out of the result."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    results.write(json.dumps(outcome()) + "\n")
    results.flush()


if __name__ == "__main__":
    answer(lambda: outcome(read(sys.argv[1])))
