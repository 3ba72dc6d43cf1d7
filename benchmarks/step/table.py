"""The table: one row a contender, ratios to ours of the same case in the same run.

as fast      tokens a second of ours / of theirs      above 1, ours is faster
of memory    peak bytes of ours / of theirs           below 1, ours needs less
"""

from collections.abc import Mapping, Sequence
from typing import Any

from .cases import CASES, Case, describe, flops_a_token
from .contenders import OURS

GIB = 2**30
COLUMNS = (
    "contender",
    "tokens/s",
    "ours is x as fast",
    "peak GiB",
    "ours takes x of it",
    "ms a step (least to most)",
    "first step s",
    "of the matmul rate",
    "loss",
)
Row = Mapping[str, Any]


def tables(rows: Sequence[Row]) -> str:
    """Markdown: a table for each case that the rows are of, and what came of contenders in none."""
    parts = []
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        parts.append(f"## {case}\n\n{describe(CASES[case])}\n\n{table(own, CASES[case])}")
    return "\n\n".join(parts) + "\n"


def table(rows: Sequence[Row], case: Case) -> str:
    """The table of one case."""
    ours = next((row for row in rows if row["contender"] == OURS), None)
    ours = figures(ours, case) if ours and ours["status"] == "measured" else {}
    lines = [_line(COLUMNS), _line(["---"] + ["---:"] * (len(COLUMNS) - 1))]
    lines += [_line(_cells(row, ours, case)) for row in rows if row["status"] == "measured"]
    missing = [row for row in rows if row["status"] != "measured"]
    notes = [f"- {row['contender']}: {row['status']}, {row['why']}" for row in missing]
    notes += _starts(rows)
    return "\n".join(lines) + ("\n\n" + "\n".join(notes) if notes else "")


def figures(row: Row, case: Case) -> dict[str, float | None]:
    """What a measured row comes to: ``tokens`` a second, ``peak`` bytes, ``flops`` a second."""
    seconds = row["step_seconds"]["median"]
    tokens = case.shape.batch * case.shape.length / seconds
    return {
        "tokens": tokens,
        "peak": row.get("peak_bytes"),
        "flops": tokens * flops_a_token(case),
        "matmul": row.get("matmul_flops"),
    }


def ratios(row: Row, ours: Mapping[str, Any], case: Case) -> dict[str, float | None]:
    """Ours over theirs: ``speed`` and ``memory``; and theirs over the machine's: ``use``.

    Args:
        row: A measured row.
        ours: `figures` of our row; empty if it was not measured.
        case: The case of both.
    """
    theirs = figures(row, case)
    return {
        "speed": _over(ours.get("tokens"), theirs["tokens"]),
        "memory": _over(ours.get("peak"), theirs["peak"]),
        "use": _over(theirs["flops"], ours.get("matmul")),
    }


def _cells(row: Row, ours: Mapping[str, Any], case: Case) -> list[str]:
    found, ratio = figures(row, case), ratios(row, ours, case)
    step = {name: 1e3 * seconds for name, seconds in row["step_seconds"].items()}
    return [
        row["contender"],
        f"{found['tokens']:,.0f}",
        _number(ratio["speed"], ".2f"),
        _number(_over(found["peak"], GIB), ".2f"),
        _number(ratio["memory"], ".2f"),
        f"{step['median']:.1f} ({step['least']:.1f} to {step['most']:.1f})",
        f"{(row.get('cold') or row)['first_step_seconds']:.1f}",
        _number(ratio["use"], ".1%"),
        f"{row['loss']:.3f}",
    ]


def _starts(rows: Sequence[Row]) -> list[str]:
    """How long ours takes to its first step, without and with a compilation cache."""
    notes = []
    for row in rows:
        if row["status"] == "measured" and (cold := row.get("cold")):
            notes.append(
                f"- {row['contender']}: first step after {cold['first_step_seconds']:.1f} s with "
                f"an empty compilation cache, {cold['compile_seconds']:.1f} s of it compiling; "
                f"after {row['first_step_seconds']:.1f} s with a full one"
            )
        if row["status"] == "measured" and (planned := row.get("planned")):
            notes.append(
                f"- {row['contender']}: XLA plans {planned['total'] / GIB:.2f} GiB, "
                f"{planned['temporaries'] / GIB:.2f} of them temporaries"
            )
    return notes


def _over(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _number(value: float | None, format: str) -> str:
    return "-" if value is None else f"{value:{format}}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
