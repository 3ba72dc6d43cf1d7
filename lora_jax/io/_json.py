"""JSON from others: one object, in which every name occurs once and every number is one.

What other readers take without a word is refused: a name that occurs twice (which of the two
counts?), NaN and infinities, nesting without end.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

MAX_BYTES = 16 << 20  # the index of 92,000 tensors has about 10 MB
MAX_DEPTH = 64
MAX_NAME = 1_000  # characters


def read_object(file: Path) -> dict[str, Any]:
    """Reads the object in a file.

    Raises:
        ValueError: The file is larger than `MAX_BYTES`, or see `parse_object`.
        OSError: The file cannot be read.
    """
    with file.open("rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > MAX_BYTES:
            raise ValueError(f"{file} is larger than {MAX_BYTES >> 20} MiB, which no such file is.")
        data = opened.read(size)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not JSON: byte {error.start} is not UTF-8.") from error
    return parse_object(text, str(file))


def parse_object(text: str, source: str) -> dict[str, Any]:
    """The object that a text is.

    Args:
        text: JSON.
        source: What an error calls it.

    Raises:
        ValueError: It is not JSON, not one object, nested deeper than `MAX_DEPTH`, or has a
            name twice, a name that cannot be printed or is longer than `MAX_NAME`, or a number
            that is not finite.
    """
    try:
        found = json.loads(
            text, object_pairs_hook=_names_checked, parse_float=_finite, parse_constant=_finite
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{source} must hold one JSON object, got {type(found).__name__}.")
    if _is_deep(found):
        raise ValueError(f"{source} is nested deeper than {MAX_DEPTH}.")
    return found


def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these names and values.

    Raises:
        ValueError: A name occurs twice.
    """
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r:.80} occurs twice")
        found[name] = value
    return found


def _names_checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, _ in pairs:
        if len(name) > MAX_NAME or not name.isprintable():
            raise ValueError(f"{name!r:.80} is no name of a field")
    return without_twins(pairs)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.80} is not a finite number")
    return number


def _is_deep(found: Any) -> bool:
    level = [found]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level if isinstance(outer, list | dict) for inner in _in(outer)]
        if not level:
            return False
    return True


def _in(outer: Any) -> Any:
    return outer.values() if isinstance(outer, dict) else outer
