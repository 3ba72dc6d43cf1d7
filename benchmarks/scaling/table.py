"""The table: a line for each row, measured or not.

efficiency    tokens a second / (devices * tokens a second of one device), same case and contender
results       MB that collectives leave on each device in a step, by kind
sent          MB that each device sends in a step, in a ring
"""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.step.cases import CASES

GIB = 2**30
COLUMNS = (
    "case",
    "contender",
    "scaling",
    "way",
    "devices",
    "rows x passes",
    "tokens/s",
    "efficiency",
    "ms a step (least to most)",
    "results, MB",
    "sent, MB",
    "peak GiB a device",
    "XLA plans GiB",
    "first step s",
)
NUMBERS = 4  # how many columns stand before those of numbers
Row = Mapping[str, Any]


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [_line(COLUMNS)]
    lines += [_line(["---"] * NUMBERS + ["---:"] * (len(COLUMNS) - NUMBERS))]
    return "\n".join(lines + [_line(_cells(row, rows)) for row in rows]) + "\n"


def is_measured(row: Row) -> bool:
    """Whether there are figures."""
    return row["status"] == "measured"


def rate(row: Row) -> float:
    """Tokens a second of a measured row, over all devices."""
    tokens = row["rows"] * CASES[row["case"]].shape.length
    return tokens / row["step_seconds"]["median"]


def efficiency(row: Row, rows: Sequence[Row]) -> float | None:
    """Of a measured row; None if one device was not measured.

    A variant that was measured over several devices alone stands beside what it varies.

    Args:
        row: The row.
        rows: All rows, that of one device among them.
    """
    plain = row["contender"].partition(",")[0]
    shared = row["devices"] if row["scaling"] == "weak" else 1
    for contender in (row["contender"], plain):
        wanted = {"case": row["case"], "scaling": row["scaling"], "contender": contender}
        for other in rows:
            alike = all(other[name] == value for name, value in wanted.items())
            alike = alike and other["devices"] == 1 and other["rows"] * shared == row["rows"]
            if alike and is_measured(other):
                return rate(row) / (row["devices"] * rate(other))
    return None


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    names = [row["case"], row["contender"], row["scaling"], row["way"], str(row["devices"])]
    names.append(f"{row['rows']} x {row['passes']}")
    if not is_measured(row):
        said = f"{row['status']}: {row['why']}".replace("|", "/")
        return [*names, said, *["-"] * (len(COLUMNS) - len(names) - 1)]
    step = {name: 1e3 * seconds for name, seconds in row["step_seconds"].items()}
    wire = row.get("wire", {})
    moved = [f"{kind} {size / 1e6:,.2f}" for kind, size in wire.get("results", {}).items()]
    return [
        *names,
        f"{rate(row):,.0f}",
        _number(efficiency(row, rows), ".1%"),
        f"{step['median']:.1f} ({step['least']:.1f} to {step['most']:.1f})",
        ", ".join(moved) or "-",
        ("at least " if wire.get("in_loops_of_unknown_length") else "")
        + _number(wire.get("sent"), ",.2f", 1e6),
        _number(row.get("peak_bytes"), ".2f", GIB),
        _number(row.get("planned", {}).get("total"), ".2f", GIB),
        f"{(row.get('cold') or row)['first_step_seconds']:.1f}",
    ]


def _number(value: float | None, format: str, unit: float = 1) -> str:
    return "-" if value is None else f"{value / unit:{format}}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
