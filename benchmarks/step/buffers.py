"""Where the memory goes: the buffers that are alive when the program holds the most.

Read from what XLA writes of a compiled program: ``*-live-range.txt``, and the program's own text
for where each comes from.
"""

import collections
import re
from pathlib import Path
from typing import NamedTuple

from .program import names_of, shapes_of

MIB = 2**20
_PEAK = re.compile(r"Live ranges at (\d+) \(peak\):\n((?:    \S.*\n)*)")
_BUFFER = re.compile(r"^    (\S+?)(\{[\d,]*\}): (\d+) bytes", re.MULTILINE)


class Buffer(NamedTuple):
    """Something alive at the peak: the operation that made it, which of its outputs, bytes."""

    name: str
    index: str
    size: int


def table(dump: Path, program: str, count: int) -> str:
    """Markdown: the largest buffers at the peak, and how much those of one shape come to.

    Args:
        dump: The directory of XLA's dumps.
        program: The text of the compiled program.
        count: How many rows a table has.
    """
    found = at_peak(_report(dump))
    names, shapes = names_of(program), shapes_of(program)
    whole = sum(buffer.size for buffer in found)
    lines = [f"## Buffers at the peak: {len(found)}, {whole / MIB:,.0f} MiB", ""]
    lines += ["| MiB | of | shape | from |", "| ---: | --- | --- | --- |"]
    for buffer in found[:count]:
        shape = _part(shapes.get(buffer.name, ""), buffer.index)
        cells = (f"{buffer.size / MIB:,.1f}", buffer.name + buffer.index, shape)
        lines.append("| " + " | ".join((*cells, names.get(buffer.name, ""))) + " |")
    lines += ["", "| MiB in all | buffers | shape |", "| ---: | ---: | --- |"]
    for shape, size, number in by_shape(found, shapes)[:count]:
        lines.append(f"| {size / MIB:,.1f} | {number} | {shape} |")
    return "\n".join(lines)


def at_peak(report: str) -> list[Buffer]:
    """The buffers alive at the peak, the largest first.

    >>> at_peak('''
    ...   Live ranges at 4 (peak):
    ...     w.1{}: 8 bytes (cumulative: 8 bytes)
    ...     fusion.2{0}: 16 bytes (cumulative: 24 bytes)
    ... ''')
    [Buffer(name='fusion.2', index='{0}', size=16), Buffer(name='w.1', index='{}', size=8)]
    """
    found = _PEAK.search(report)
    if found is None:
        raise ValueError("XLA's report of live ranges does not say what is alive at the peak.")
    buffers = [Buffer(name, at, int(size)) for name, at, size in _BUFFER.findall(found[2])]
    return sorted(buffers, key=lambda buffer: -buffer.size)


def by_shape(found: list[Buffer], shapes: dict[str, str]) -> list[tuple[str, int, int]]:
    """Shape, bytes in all and how many, the most bytes first."""
    sizes, counts = collections.Counter(), collections.Counter()
    for buffer in found:
        shape = _part(shapes.get(buffer.name, "?"), buffer.index)
        sizes[shape] += buffer.size
        counts[shape] += 1
    return [(shape, size, counts[shape]) for shape, size in sizes.most_common()]


def _part(shape: str, index: str) -> str:
    """The shape of one output, without its layout."""
    parts = re.findall(r"[a-z]\w*\[[\d,]*\]", shape)
    at = index.strip("{}").split(",")[0]
    return parts[int(at)] if at and int(at) < len(parts) else (parts[0] if parts else shape)


def _report(dump: Path) -> str:
    """The largest report of live ranges: the train step's, whatever else was compiled."""
    paths = sorted(dump.glob("*live-range.txt"), key=lambda path: path.stat().st_size)
    if not paths:
        raise ValueError(f"XLA wrote no report of live ranges into {dump}.")
    return paths[-1].read_text(encoding="utf-8")
