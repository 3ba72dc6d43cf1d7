"""The command: each contender on each case, in turn, until the time is up; then the tables."""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import processes
from .cases import CASES, describe
from .contenders import CONTENDERS, DEFAULT, OURS, why_not
from .job import Job, changes_of, tokens
from .table import tables

SPARE = 5.0  # seconds, to write what there is


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; exit code 1 if a contender that could run gave no figures."""
    chosen = parse(arguments)
    changes = [changes_of(variant) for variant in chosen.variants]  # wrong ones are said at once
    check_remat(chosen.cases, [chosen.remat, *(change.get("remat") for change in changes)])
    end = time.monotonic() + 60 * chosen.minutes - SPARE
    out = Path(chosen.out).resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as fresh:
        cache = Path(chosen.compilation_cache or fresh).resolve()
        for case in chosen.cases:
            for name, job in jobs(case, chosen, cache):
                rows.append(row(name, job, chosen, end, out.with_suffix(".log")))
                print(_progress(rows[-1]), file=sys.stderr, flush=True)
                out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(tables(rows))
    for report in sorted(Path(chosen.profile).glob("*/profile.md")) if chosen.profile else ():
        print(report.read_text(encoding="utf-8"))
    print(f"{out}, {out.with_suffix('.log')}")
    return int(any(row["status"] not in ("measured", "absent") for row in rows))


def row(name: str, job: Job, chosen: argparse.Namespace, end: float, log: Path) -> dict[str, Any]:
    """What came of a contender: its figures, or why there are none.

    Ours starts twice, with an empty compilation cache and a full one, unless ``--once`` was said.
    What searching for the fastest kernels takes of memory is in the first process alone.
    """
    names = {"case": job.case, "contender": name}
    if (why := why_not(job.contender, job.work)) is not None:
        return names | {"status": "absent", "why": why}

    def run(job: Job) -> dict[str, Any]:
        return processes.run(job, min(chosen.limit, end - time.monotonic()), log)

    cold: dict[str, Any] = {}
    if job.contender == OURS and not chosen.once:
        cold = run(job.replace(start_only=True))
        if cold["status"] != "measured":
            return names | cold
    found = names | {"options": job.fields()} | run(job) | ({"cold": cold} if cold else {})
    if name == OURS and chosen.profile and found["status"] == "measured":
        place = str(Path(chosen.profile).resolve() / job.case)
        found["profile"] = run(job.replace(profile=place, cache=None, rounds=1, steps=2))["status"]
    return found


def check_remat(cases: Sequence[str], policies: Sequence[str | None]) -> None:
    """Refuses to keep what every other contender of a case recomputes."""
    recomputed = [case for case in cases if CASES[case].remat]
    if recomputed and (others := [p for p in policies if p not in (None, "full")]):
        raise SystemExit(
            f"In {', '.join(recomputed)} every contender recomputes every layer; "
            f"--remat {others[0]} would not. Leave one of them out."
        )


def jobs(case: str, chosen: argparse.Namespace, cache: Path) -> Iterator[tuple[str, Job]]:
    """Who is measured on a case, by the name of its row: the contenders, and variants of ours."""
    copied = ("warmup", "rounds", "steps", "layers", "remat", "chunk")
    options = {name: getattr(chosen, name) for name in copied}
    for contender in chosen.contenders:
        job = Job(case=case, contender=contender, cache=str(cache), **options)
        yield contender, job
        for variant in chosen.variants if contender == OURS else ():
            yield f"{OURS}, {variant}", job.replace(**changes_of(variant))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    cases = [f"  {name:<20}{describe(case)}" for name, case in CASES.items()]
    contenders = [f"  {name:<20}{one.is_what}" for name, one in CONTENDERS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=str(sys.modules[__package__].__doc__),  # pyright: ignore
        epilog="\n".join(["cases:", *cases, "", "contenders:", *contenders]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--cases", nargs="+", choices=CASES, default=["tiny"], metavar="CASE")
    add("--contenders", nargs="+", choices=CONTENDERS, default=DEFAULT, metavar="CONTENDER")
    add("--out", default="runs/step.json", help="figures; the log goes beside (%(default)s)")
    add("--minutes", type=float, default=9.5, help="all ends by then (%(default)s)")
    add("--limit", type=float, default=180, help="seconds for each process (%(default)s)")
    add("--warmup", type=int, default=3, help="steps that are not timed (%(default)s)")
    add("--rounds", type=int, default=5, help="blocks of steps that are (%(default)s)")
    add("--steps", type=int, default=8, help="steps a block (%(default)s)")
    ours = parser.add_argument_group("ours")
    add = ours.add_argument
    add("--layers", default="unrolled", help="unrolled, scanned, or how many a step (%(default)s)")
    add("--remat", metavar="NAME", help="policy; by default that of the case")
    chunk = "tokens of the loss at a time; 0 is all; by default that of the case"
    add("--chunk", type=tokens, metavar="TOKENS", help=chunk)
    add("--variants", nargs="+", default=[], help="more rows of ours: remat=named xla_...=True ...")
    add("--compilation-cache", metavar="DIR", help="by default an empty one, removed afterwards")
    add("--once", action="store_true", help="one process, not one to fill the cache before it")
    add("--profile", metavar="DIR", help="also trace ours: longest kernels, largest buffers")
    return parser.parse_args(arguments)


def _progress(row: dict[str, Any]) -> str:
    """A line while it runs."""
    said = row.get("why") or f"{1e3 * row['step_seconds']['median']:.1f} ms a step"
    return f"{row['case']}, {row['contender']}: {row['status']}, {said}"


if __name__ == "__main__":
    sys.exit(main())
