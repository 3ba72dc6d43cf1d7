"""What one process measures: a contender on a case, over some devices, with some rows a step."""

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.step.cases import CASES, Case
from benchmarks.step.contenders import OURS
from benchmarks.step.job import Job, changes_of

WAYS = ("data", "fsdp")
SCALINGS = ("weak", "strong")
STRONG_ROWS = 8  # of a step, or a case's whole batch if that is more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point(Job):
    """One contender on one case over some devices.

    Attributes:
        way: The mesh's axis that the devices are along: ``"data"`` or ``"fsdp"``.
        devices: How many.
        rows: Of a step, over all devices and passes.
        passes: How often a device computes a step's gradient, each time of a part of its rows.
    """

    way: str
    devices: int
    rows: int
    passes: int = 1

    @property
    def work(self) -> Case:
        """The case, with the rows of all devices as its batch."""
        case = CASES[self.case]
        return dataclasses.replace(case, shape=dataclasses.replace(case.shape, batch=self.rows))

    @property
    def title(self) -> str:
        """What the log calls it."""
        over = f"{self.way} over {self.devices}"
        return f"{self.case}, {self.contender}, {over}, {self.rows} rows in {self.passes}"


def read(text: str) -> Point:
    """The point of a process's argument."""
    return Point(**json.loads(text))


def share(scaling: str, batch: int, devices: int) -> tuple[int, int]:
    """Rows of a step, and passes, so that no device holds more than a case's batch at once.

    >>> share("weak", batch=2, devices=4)
    (8, 1)
    >>> [share("strong", batch=2, devices=n) for n in (1, 2, 4, 8)]
    [(8, 4), (8, 2), (8, 1), (8, 1)]

    Raises:
        ValueError: The devices cannot share the rows evenly.
    """
    if scaling == "weak":
        return batch * devices, 1
    rows = max(STRONG_ROWS, batch)
    passes = math.ceil(rows / devices / batch)
    if rows % (devices * passes):
        raise ValueError(f"{devices} devices cannot share {rows} rows evenly.")
    return rows, passes


def points(chosen: argparse.Namespace, cache: Path) -> Iterator[tuple[dict[str, Any], Point]]:
    """What identifies each row, and the point that is measured for it.

    Rows may share a point: one device is the same either way, and where a case's batch is as large
    as that of strong scaling, under either scaling.

    Args:
        chosen: The command line.
        cache: The directory of the compilation cache.
    """
    copied = ("warmup", "rounds", "steps", "layers", "remat", "chunk")
    options = {name: getattr(chosen, name) for name in copied}
    for case, (label, changes), scaling, way, devices in itertools.product(
        chosen.cases, _contenders(chosen), chosen.scaling, chosen.ways, chosen.devices
    ):
        names = {"case": case, "contender": label, "scaling": scaling, "way": way}
        contender = label.partition(",")[0]
        if contender != OURS and way != "data":
            continue
        if chosen.rows:
            names["contender"] += f", {chosen.rows} rows"
        rows, passes = share(scaling, held_rows(chosen, case), devices)
        size = {"devices": devices, "rows": rows, "passes": passes}
        way = way if devices > 1 else "data"
        fields = {"case": case, "contender": contender, "way": way, "cache": str(cache)}
        yield names | {"devices": devices}, Point(**fields | size | options | changes)


def held_rows(chosen: argparse.Namespace, case: str) -> int:
    """How many rows a device holds at once."""
    return chosen.rows or CASES[case].shape.batch


def _contenders(chosen: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """The contenders and variants of ours, each with what it changes."""
    variants = [(f"{OURS}, {variant}", changes_of(variant)) for variant in chosen.variants]
    peers = [(name, {}) for name in chosen.contenders if name != OURS]
    return ([(OURS, {}), *variants] if OURS in chosen.contenders else []) + peers
