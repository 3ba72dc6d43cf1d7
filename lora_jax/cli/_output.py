"""Tables: drawn on a terminal, plain aligned lines anywhere else, JSON for scripts."""

import json
import sys
from collections.abc import Sequence
from typing import Any

Row = Sequence[str]


def print_table(columns: Row, rows: Sequence[Row], *, title: str = "", foot: Row = ()) -> None:
    """Prints a table; ``foot`` is a last line set off from the others."""
    if sys.stdout.isatty():
        _draw(columns, rows, title, foot)
        return
    lines = [list(columns), *map(list, rows), *([list(foot)] if foot else [])]
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    if title:
        print(title)
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def print_json(value: Any) -> None:
    """Prints one JSON document."""
    print(json.dumps(value, indent=2))


def _draw(columns: Row, rows: Sequence[Row], title: str, foot: Row) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title or None, box=box.SIMPLE_HEAD, show_footer=bool(foot))
    for index, column in enumerate(columns):
        table.add_column(column, footer=foot[index] if foot else "", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)
