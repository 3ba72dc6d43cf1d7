"""The command: plans the parts, runs them until the time is up, and writes what there is.

python -m benchmarks.claims --parts a b --sizes llama-1b --minutes 9 --out DIR
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from . import arithmetic, figure, processes, tables
from .jobs import GRIDS, Job, groups
from .shapes import SHAPES

PARTS = {"a": 1, "b": 4, "c": 2, "d": 3, "e": 2}  # shares of the time that is left
MINUTES = 9.0
POINT = (
    *("part", "kind", "series", "size", "method", "batch", "length", "rank", "dtype"),
    *("scan_layers", "remat"),
)
SECONDS = 3.0
SPARE = 10.0  # seconds, for the tables and the figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; exit code 1 if a point failed (one that does not fit has not)."""
    chosen = parse(arguments)
    end = time.monotonic() + 60 * chosen.minutes - SPARE
    # Processes of their own measure; this one must not take the accelerator's memory.
    jax.config.update("jax_platforms", "cpu")
    out = Path(chosen.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    results, failed = earlier(chosen.earlier), False
    parts = chosen.parts or (list("abcd") if chosen.sizes else None)
    machine = None
    if parts is None or set(parts) - {"a"}:
        (machine,) = processes.run([Job(part="", kind="machine")], end, out / "log.txt")
        if machine["status"] != "measured":
            print(f"No device can be used: {machine['why']}", file=sys.stderr)
            return 1
    parts = parts or list("abcde" if machine["platform"] == "cpu" else "abcd")  # pyright: ignore
    for number, part in enumerate(parts):
        weight = PARTS[part] / sum(PARTS[p] for p in parts[number:])
        until = time.monotonic() + weight * max(0.0, end - time.monotonic())
        measured = run(part, chosen, machine, until, out / "log.txt")
        failed |= any(row.get("status") == "failed" for row in measured["rows"])
        results = joined(results, {part: measured})
        write(out, results)
    print((out / "claims.md").read_text(encoding="utf-8"))
    print("\n".join(f"{file}" for file in sorted(out.glob("claims.*"))))
    return int(failed)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims",
        description=str(sys.modules[__package__].__doc__),  # pyright: ignore
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help="default: all; without e on an accelerator"
    )
    parser.add_argument(
        "--sizes", nargs="+", choices=SHAPES, default=[], help="default: each part's own"
    )
    parser.add_argument("--out", default="runs/claims", help="directory (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="all ends by then (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="to measure a point (default: %(default)s)"
    )
    parser.add_argument("--unroll", action="store_true", help="layers unrolled: no scan over them")
    parser.add_argument("--remat", default="none", help="what layers recompute (default: none)")
    parser.add_argument(
        "--earlier",
        nargs="+",
        default=[],
        metavar="FILE",
        help="claims.json of earlier calls: their parts and points go into tables and figure too",
    )
    return parser.parse_args(arguments)


def run(
    part: str, chosen: argparse.Namespace, machine: Any, until: float, log: Path
) -> dict[str, Any]:
    """The results of one part, by ``until``."""
    if part == "a":
        rows = arithmetic.rows(chosen.sizes or arithmetic.SIZES)
        return {"rows": rows, "written": arithmetic.written_rows()}
    grid = GRIDS["cpu" if machine["platform"] == "cpu" else "gpu"]
    common = {
        "seconds": chosen.seconds,
        "scan_layers": not chosen.unroll,
        "remat": chosen.remat,
    }
    rows = []
    for jobs in groups(part, grid, chosen.sizes, common):
        for row in processes.run(jobs, until, log):
            rows.append(row)
            print(progress(row), file=sys.stderr, flush=True)
    return {"machines": [machine], "rows": rows}


def progress(row: dict[str, Any]) -> str:
    """A line while it runs."""
    place = f"{row['batch']} x {row['length']} rank {row['rank']}"
    why = f": {row['why']}" if "why" in row else ""
    return (
        f"{row['part']} {row['series']} {row['size']} {row['method']} {place} {row['status']}{why}"
    )


def earlier(files: Sequence[str]) -> dict[str, Any]:
    """The results of earlier calls."""
    results: dict[str, Any] = {}
    for file in files:
        results = joined(results, json.loads(Path(file).read_text(encoding="utf-8")))
    return results


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The parts of both; where both have one, the points of both, the later of two alike."""
    both = {}
    for part, found in second.items():
        before = first.get(part, {})
        lists = {name: value for name, value in found.items() if name in ("rows", "machines")}
        both[part] = found | {name: before.get(name, []) + own for name, own in lists.items()}
        if part != "a":  # that one is not measured
            both[part]["rows"] = latest(both[part]["rows"])
    return first | both


def latest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each point once: its last figures, or without any why it has none."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        point = tuple(row[name] for name in POINT)
        if point not in found or row["status"] == "measured":
            found[point] = row
    return list(found.values())


def write(out: Path, results: dict[str, Any]) -> None:
    """Writes ``claims.json``, ``claims.md`` and ``claims.png``: after each part, to have it."""
    text = json.dumps(results, indent=1)
    (out / "claims.json").write_text(text + "\n", encoding="utf-8")
    why = figure.draw(out / "claims.png", results)
    note = f"\n{why}\n" if why else ""
    (out / "claims.md").write_text(tables.page(results) + note, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
