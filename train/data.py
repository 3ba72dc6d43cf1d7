"""From files to examples: rows read, columns recognised, labels numbered, a part held out.

Whatever is wrong with the data is a ValueError that names the file, the row, the keys it has and
the nearest format that would do. Rows are counted from 1; a header is not a row.
"""

import difflib
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .config import DataSection
from .files import Rows, read_rows

FORMATS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("text", "text_pair"),
    ("text",),
    ("sentence",),
)
"""Columns that are recognised, pairs first; each with a `label` (or `labels`) beside it."""
LABELS = ("label", "labels")


class Examples(NamedTuple):
    """Labelled texts. `pairs` is None for single sentences; labels count from 0."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[int]

    def take(self, rows: Sequence[int]) -> "Examples":
        """The examples at these positions, in this order."""
        texts, pairs, labels = self
        return Examples(
            [texts[row] for row in rows],
            pairs and [pairs[row] for row in rows],
            [labels[row] for row in rows],
        )


class Data(NamedTuple):
    """What a run learns from and is evaluated on, and the names of its classes."""

    train: Examples
    evaluation: Examples
    names: tuple[str, ...]


def load_data(section: DataSection, num_labels: int | None = None) -> Data:
    """Reads everything that a run needs.

    Args:
        section: Where the data is, and how to read it.
        num_labels: How many classes the model has, where that is settled.

    Raises:
        ValueError: A file or row cannot be used, or there are too few rows.
    """
    tables = [read_table(section.train, section)]
    if section.validation:
        tables.append(read_table(section.validation, section))
    names = class_names(tables, section, num_labels)
    examples = [number_labels(table, names) for table in tables]
    order = list(range(len(examples[0].texts)))
    random.Random(section.seed).shuffle(order)
    held_out, rest = order[: section.holdout], order[section.holdout :]
    if not rest:
        raise ValueError(
            f"{section.train} has {len(order)} rows; `data.holdout` of {section.holdout} leaves "
            "none to train on."
        )
    evaluation = examples[1] if section.validation else examples[0].take(held_out)
    return Data(examples[0].take(rest[: section.limit]), evaluation, names)


class Table(NamedTuple):
    """Checked rows of one source: texts, perhaps pairs, and labels as they were found."""

    source: str
    texts: list[str]
    pairs: list[str] | None
    labels: list[int] | list[str]
    names: tuple[str, ...] | None  # where the source itself names its classes


def read_table(source: str, section: DataSection) -> Table:
    """Reads one file or hub data set and checks every row."""
    rows = read_rows(source, section.columns)
    text, pair, label = _recognise(rows.columns, section, source)
    wanted = [column for column in (text, pair, label) if column]
    columns = {column: [row[column] for row in rows.rows] for column in wanted}
    _check_rows(rows, columns, label)
    names = rows.names.get(label)
    pairs = columns[pair] if pair else None
    return Table(source, columns[text], pairs, _labels(columns[label], section.labels), names)


def class_names(
    tables: Sequence[Table], section: DataSection, num_labels: int | None
) -> tuple[str, ...]:
    """The names of the classes in order: as configured, as the source says, or as found."""
    found = sorted({label for table in tables for label in table.labels}, key=_sort_key)
    names = section.labels or tables[0].names
    if names is None and any(isinstance(label, str) for label in found):
        names = tuple(map(str, found))
    if names is None:
        count = num_labels or max(2, *(int(label) + 1 for label in found))
        names = tuple(map(str, range(count)))
    if num_labels not in (None, len(names)):
        raise ValueError(
            f"`model.num_labels` is {num_labels}, but there are {len(names)} classes: "
            f"{', '.join(names[:10])}."
        )
    if len(found) < 2:
        raise ValueError(f"{tables[0].source} has only the label {found[0]!r}: nothing to learn.")
    return names


def number_labels(table: Table, names: tuple[str, ...]) -> Examples:
    """Labels as numbers below ``len(names)``; the first one that is not is an error."""
    numbers = {name: number for number, name in enumerate(names)}
    labels = []
    for row, label in enumerate(table.labels, start=1):
        number = numbers.get(label) if isinstance(label, str) else label
        if number is None or not 0 <= number < len(names):
            raise ValueError(
                f"{table.source}, row {row}: label {label!r} is out of range. "
                + _classes(label, names)
            )
        labels.append(number)
    return Examples(table.texts, table.pairs, labels)


def _classes(label: Any, names: tuple[str, ...]) -> str:
    if not isinstance(label, str):
        return f"There are {len(names)} classes, numbered 0 to {len(names) - 1}."
    near = difflib.get_close_matches(label, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"The classes are {', '.join(names)}.{hint}"


def _recognise(
    columns: Sequence[str], section: DataSection, source: str
) -> tuple[str, str | None, str]:
    """The columns of the text, of its pair and of the label."""
    for name in (section.text, section.text_pair, section.label):
        if name and name not in columns:
            near = difflib.get_close_matches(name, columns, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{source} has no column {name!r}{hint} It has {list(columns)}.")
    label = section.label or next((name for name in LABELS if name in columns), None)
    texts: tuple[str | None, ...] | None = (section.text, section.text_pair)
    if not section.text:
        texts = next((known for known in FORMATS if set(known) <= set(columns)), None)
    if texts is None or label is None:
        raise ValueError(
            f"{source} has the columns {list(columns)}. {_nearest_format(columns)} Rename them, "
            "or name them in the config: data.text, data.text_pair, data.label."
        )
    text, pair = (*texts, None)[:2]
    return str(text), pair, label


def _nearest_format(columns: Sequence[str]) -> str:
    """Says which known format these columns are most like."""

    def likeness(known: tuple[str, ...]) -> float:
        ratios = [
            max(
                difflib.SequenceMatcher(None, key, str(column).lower()).ratio()
                for column in [*columns, ""]
            )
            for key in known
        ]
        return sum(ratios) / len(ratios)

    nearest = max(FORMATS, key=likeness)
    return f"The nearest format is {', '.join((*nearest, LABELS[0]))}."


def _check_rows(rows: Rows, columns: dict[str, list], label: str) -> None:
    """Refuses empty and ill-typed cells; names the first five rows that have one."""
    bad = [
        (row, column, cells[row])
        for column, cells in columns.items()
        for row in range(len(cells))
        if not _usable(cells[row], column == label)
    ]
    if not bad:
        return
    lines = list(_describe(rows, sorted(bad, key=lambda item: item[0])[:5]))
    more = [f"and {len(bad) - 5} more"] if len(bad) > 5 else []
    raise ValueError(
        f"{rows.source} has {len(bad)} bad cell{'s' * (len(bad) > 1)}:\n  "
        + "\n  ".join(lines + more)
    )


def _usable(cell: Any, is_label: bool) -> bool:
    if isinstance(cell, str):
        return bool(cell.strip())
    return is_label and isinstance(cell, int)


def _describe(rows: Rows, bad: Sequence[tuple[int, str, Any]]) -> Iterator[str]:
    for row, column, cell in bad:
        keys = [key for key, value in rows.rows[row].items() if value not in (None, "")]
        found = "is empty" if cell in (None, "") else f"is {type(cell).__name__} {cell!r}"
        yield f"row {row + 1}: {column!r} {found}; its keys are {keys}. {_nearest_format(keys)}"


def _labels(cells: list, names: Sequence[str] | None) -> list[int] | list[str]:
    """Whole numbers where all are; else names, as where the config names them so."""
    named = set(names or ())
    if named and all(str(cell) in named for cell in cells):
        return [str(cell) for cell in cells]
    try:
        return [int(cell) for cell in cells]
    except ValueError:
        return [str(cell) for cell in cells]


def _sort_key(label: int | str) -> tuple[bool, int | str]:
    return isinstance(label, str), label
