"""One point, in a process of its own: the point in, one line of JSON out.

python -m benchmarks.scaling.worker '{"case": "tiny", "contender": "ours", "way": "data", ...}'
"""

import importlib
import sys
from typing import Any

from benchmarks.step.contenders import OURS
from benchmarks.step.worker import answer, outcome

from .points import Point, read


def measure(point: Point) -> dict[str, Any]:
    """The figures of a point."""
    ours = point.contender == OURS
    module = "benchmarks.scaling.ours" if ours else "benchmarks.peers.peft_ddp"
    return importlib.import_module(module).measure(point)


if __name__ == "__main__":
    answer(lambda: outcome(read(sys.argv[1]), measure))
