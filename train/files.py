"""From a file or hub data set to rows: each a dict from column to cell, missing cells as None.

Files are read as they stand, into memory. CSV, TSV, JSON, JSONL and text need nothing but Python;
Parquet and the hub need the package `datasets`. A `.gz` at the end is taken off first.
"""

import csv
import gzip
import importlib
import io
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<subset>[\w.-]+))?(@(?P<split>[\w.-]+))?")
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".parquet")
LONGEST_CELL = 2**31 - 1  # the csv module refuses cells beyond 128 kB, which a document may be


class Rows(NamedTuple):
    """The rows of one source.

    Attributes:
        source: The file's or data set's name, for messages.
        columns: The columns of all rows together.
        rows: Every row has every column.
        names: Column -> the names of its classes, where the source itself has them.
    """

    source: str
    columns: tuple[str, ...]
    rows: list[Row]
    names: dict[str, tuple[str, ...]]


def read_rows(source: str, columns: Sequence[str] | None = None) -> Rows:
    """Reads a local file by its suffix, else a hub data set.

    Args:
        source: A file, or `owner/name[:subset][@split]`.
        columns: Names of the columns of a CSV or TSV file without a header.

    Raises:
        ValueError: It cannot be read, or holds no rows.
    """
    path = Path(source)
    if not path.is_file():
        rows = _from_datasets(source, _read_hub(source))
    elif suffix(path) == ".parquet":
        rows = _from_datasets(source, _read_parquet(path))
    else:
        rows = _rows(source, list(_records(path, columns)))
    if not rows.rows:
        raise ValueError(f"{source} holds no rows.")
    return rows


def suffix(path: Path) -> str:
    """A file's suffix in small letters, that of compression left out."""
    path = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return path.suffix.lower()


def read_text(path: Path) -> str:
    """A file's text, unpacked.

    Raises:
        ValueError: It is empty, or not UTF-8.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix.lower() == ".gz" else content
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path} is not UTF-8: line {line} holds the byte {content[error.start]:#04x}. Save it "
            "as UTF-8, for instance with: iconv -f latin1 -t utf-8"
        ) from None
    if not text:
        raise ValueError(f"{path} is empty.")
    return text


def _records(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    readers = {
        ".csv": lambda text: _table(path, text, columns, {"delimiter": ","}),
        # Quotes are special in CSV alone.
        ".tsv": lambda text: _table(
            path, text, columns, {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        ),
        ".json": lambda text: _json(path, text),
        ".jsonl": lambda text: _json_lines(path, text),
        ".txt": lambda text: [{"text": text}],
    }
    if suffix(path) not in readers:
        raise ValueError(f"{path}: cannot read {path.suffix!r} files; can read {[*SUFFIXES]}.")
    yield from readers[suffix(path)](read_text(path))


def _table(
    path: Path, text: str, columns: Sequence[str] | None, dialect: dict[str, Any]
) -> Iterator[Row]:
    """CSV and TSV: every cell is the text it is."""
    csv.field_size_limit(LONGEST_CELL)
    lines = csv.reader(io.StringIO(text, newline=""), **dialect)
    try:
        names = list(columns or next(lines, []))
        if len(set(names)) < len(names):
            raise ValueError(f"{path}: two columns have the same name: {names}.")
        for cells in filter(None, lines):
            if len(cells) > len(names):
                raise ValueError(
                    f"{path} cannot be read: line {lines.line_num} has {len(cells)} cells, more "
                    f"than there are columns, {names}."
                )
            yield dict(zip(names, cells, strict=False))
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read: line {lines.line_num}: {error}") from None


def _json(path: Path, text: str) -> list[Row]:
    """A list of objects, or an object a line, which is often called `.json` as well."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return _json_lines(path, text)
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows, start=1):
        _check_object(path, f"row {number}", row)
    return rows


def _json_lines(path: Path, text: str) -> list[Row]:
    rows = []
    # Not splitlines: JSON strings may hold line separators of Unicode.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} cannot be read: line {number} is not JSON: {error}") from None
        _check_object(path, f"line {number}", row)
        rows.append(row)
    return rows


def _check_object(path: Path, place: str, row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(
            f"{path} cannot be read: {place} is {type(row).__name__} {str(row)[:40]!r}, not an "
            "object with keys."
        )


def _rows(source: str, records: list[Row]) -> Rows:
    columns = tuple(dict.fromkeys(key for record in records for key in record))
    return Rows(source, columns, [{key: row.get(key) for key in columns} for row in records], {})


def _from_datasets(source: str, table: Any) -> Rows:
    """The rows of a `datasets.Dataset`."""
    names = {
        column: tuple(feature.names)
        for column, feature in table.features.items()
        if hasattr(feature, "names")
    }
    return Rows(source, tuple(table.column_names), list(table), names)


def _read_parquet(path: Path) -> Any:
    """Reads Parquet; nothing is left in a cache."""
    datasets = _datasets(str(path))
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with tempfile.TemporaryDirectory() as cache:
            return datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from None
    finally:
        datasets.logging.set_verbosity(verbosity)


def _read_hub(source: str) -> Any:
    """Loads `owner/name[:subset][@split]` from the hub, or from its cache."""
    match = HUB_NAME.fullmatch(source)
    if suffix(Path(source)) in SUFFIXES:
        raise ValueError(f"There is no file {source!r}.")
    if not match:
        raise ValueError(
            f"{source!r} is neither a file nor a hub data set, owner/name[:subset][@split]."
        )
    datasets = _datasets(source)
    try:
        return datasets.load_dataset(
            match["name"], match["subset"], split=match["split"] or "train"
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{source!r} is no file here, and the hub gives no such data set: {reason}"
        ) from None


def _datasets(source: str) -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise ValueError(
            f"{source}: Parquet files and the hub are read by the package datasets. Install it "
            "with: pip install 'lora_jax[train]'; CSV, TSV, JSON, JSONL and text need nothing."
        ) from None
