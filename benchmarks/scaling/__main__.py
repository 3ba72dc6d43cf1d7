"""The command: each point in turn, until the time is up; then the table and the plot."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.step import processes
from benchmarks.step.__main__ import SPARE, check_remat
from benchmarks.step.cases import CASES, describe
from benchmarks.step.contenders import CONTENDERS, OURS, why_not
from benchmarks.step.job import changes_of, tokens

from .figure import draw
from .machine import machine
from .points import SCALINGS, WAYS, Point, held_rows, points, share
from .table import is_measured, rate, table

# NVLink multicast is off: NCCL sends through rings and trees, whatever the machine can do besides.
FIXED = {"NCCL_NVLS_ENABLE": "0"}
PEERS = [name for name, one in CONTENDERS.items() if one.module == "benchmarks.peers.peft_step"]
DEFAULT = (OURS, "peft-autocast")  # trainers run PEFT under autocast
ANSWERED = ("measured", "absent")
NAMES = ("case", "contender", "scaling", "way", "devices", "machine")  # of a row, not of figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; exit code 1 if a point that could run gave no figures."""
    chosen = parse(arguments)
    check(chosen)
    end = time.monotonic() + 60 * chosen.minutes - SPARE
    out = Path(chosen.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    known = [row for file in chosen.earlier for row in json.loads(Path(file).read_text())]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as fresh:
        cache = Path(chosen.compilation_cache or fresh).resolve()
        here = machine(environment())
        for names, point in points(chosen, cache):
            found = {"machine": here, "rows": point.rows, "passes": point.passes}
            found |= {"options": options(point, chosen)}
            found |= again(found, rows + known) or measured(point, chosen, end, here["count"], out)
            rows.append(names | found)
            print(_progress(rows[-1]), file=sys.stderr, flush=True)
            write(out, rows)
    print(table(rows))
    print("\n".join(filter(None, [draw(out / "scaling.png", rows), str(out / "scaling.json")])))
    return int(any(row["status"] not in ANSWERED for row in rows))


def measured(
    point: Point, chosen: argparse.Namespace, end: float, count: int, out: Path
) -> dict[str, Any]:
    """What came of a point: its figures, or why there are none.

    Args:
        point: What to measure.
        chosen: The command line.
        end: When all must be done, by the monotonic clock.
        count: How many devices the machine has.
        out: The directory of the log.
    """
    if point.devices > count:
        return {"status": "absent", "why": f"{point.devices} devices, and this machine has {count}"}
    if (why := why_not(point.contender, point.work)) is not None:
        return {"status": "absent", "why": why}

    def run(point: Point) -> dict[str, Any]:
        left = min(chosen.limit, end - time.monotonic())
        log = out / "scaling.log"
        variables = environment(point.xla)
        return processes.outcome("benchmarks.scaling.worker", point, left, log, variables)

    if chosen.twice and point.contender == OURS:
        cold = run(point.replace(start_only=True))
        return cold if not is_measured(cold) else run(point) | {"cold": cold}
    return run(point)


def again(found: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The figures of a row that measured the same, with the same versions, on the same devices."""
    for row in rows:
        machines = [one["machine"] | {"count": None} for one in (row, found)]
        if is_measured(row) and row["options"] == found["options"] and machines[0] == machines[1]:
            return {name: value for name, value in row.items() if name not in NAMES}
    return None


def options(point: Point, chosen: argparse.Namespace) -> dict[str, Any]:
    """All that the figures of a point depend on, beside the machine."""
    fields = {name: value for name, value in point.fields().items() if name != "cache"}
    return fields | {"twice": chosen.twice}


def environment(options: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """The variables of a point's process.

    Args:
        options: Of the compiler. They go into ``XLA_FLAGS``: what sends is set up before a program.
    """
    found = processes.common() | FIXED
    flags = [f"--{name}={value.lower()}" for name, value in options.items()]
    given = found.get("XLA_FLAGS", "").split()
    return found | ({"XLA_FLAGS": " ".join([*given, *flags])} if flags else {})


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    """Writes what there is so far."""
    (out / "scaling.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (out / "scaling.md").write_text(table(rows), encoding="utf-8")


def check(chosen: argparse.Namespace) -> None:
    """Refuses before anything runs what no point could do."""
    if chosen.rows is not None and chosen.rows < 1:
        raise SystemExit(f"--rows counts from 1, got {chosen.rows}.")
    changes = [changes_of(variant) for variant in chosen.variants]
    check_remat(chosen.cases, [chosen.remat, *(change.get("remat") for change in changes)])
    for case in chosen.cases:
        for scaling in chosen.scaling:
            for devices in chosen.devices:
                try:
                    share(scaling, held_rows(chosen, case), devices)
                except ValueError as error:
                    raise SystemExit(f"{case}, {scaling} scaling: {error}") from None


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    decoders = {name: one for name, one in CASES.items() if one.shape.task == "causal-lm"}
    cases = [f"  {name:<20}{describe(case)}" for name, case in decoders.items()]
    contenders = [f"  {name:<20}{CONTENDERS[name].is_what}" for name in (OURS, *PEERS)]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=str(sys.modules[__package__].__doc__),  # pyright: ignore
        epilog="\n".join(
            ["cases, batch a device:", *cases, "", "contenders, PEFT under DDP:", *contenders]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=decoders, default=["tiny"], metavar="CASE")
    add("--contenders", nargs="+", choices=(OURS, *PEERS), default=DEFAULT, metavar="CONTENDER")
    add("--ways", nargs="+", choices=WAYS, default=WAYS, help="of ours; peers have data alone")
    add("--devices", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N")
    add("--scaling", nargs="+", choices=SCALINGS, default=SCALINGS)
    add("--rows", type=int, metavar="N", help="a device holds at once; by default the case's batch")
    add("--out", default="runs/scaling", help="directory of figures, log, plot (%(default)s)")
    add("--earlier", nargs="+", default=[], metavar="FILE", help="figures to take, not measure")
    add("--minutes", type=float, default=9.5, help="all ends by then (%(default)s)")
    add("--limit", type=float, default=180, help="seconds for each process (%(default)s)")
    add("--warmup", type=int, default=3, help="steps that are not timed (%(default)s)")
    add("--rounds", type=int, default=5, help="blocks of steps that are (%(default)s)")
    add("--steps", type=int, default=6, help="steps a block (%(default)s)")
    ours = parser.add_argument_group("ours")
    add = ours.add_argument
    add("--layers", default="unrolled", help="unrolled, scanned, or how many a step (%(default)s)")
    add("--remat", metavar="NAME", help="policy; by default that of the case")
    chunk = "a device's tokens of the loss at a time; 0 is all; by default that of the case"
    add("--chunk", type=tokens, metavar="TOKENS", help=chunk)
    add("--variants", nargs="+", default=[], help="more rows of ours: remat=named xla_...=True ...")
    add("--compilation-cache", metavar="DIR", help="by default an empty one, removed afterwards")
    add("--twice", action="store_true", help="fill the cache first: peaks without the search")
    return parser.parse_args(arguments)


def _progress(row: dict[str, Any]) -> str:
    """A line while it runs."""
    names = ", ".join(str(row[name]) for name in ("case", "contender", "scaling", "way", "devices"))
    said = f"{rate(row):,.0f} tokens/s" if is_measured(row) else row["why"]
    return f"{names}: {row['status']}, {said}"


if __name__ == "__main__":
    sys.exit(main())
