"""Where the time goes: a trace, summed by kernel, by operation, and by where that comes from.

On an accelerator an event is a kernel on a stream, on a CPU an operation on a thread; both carry
the name of the program's operation that they belong to.
"""

import collections
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jax.profiler import ProfileData

from .program import names_of, place

_SAID = re.compile(r"hlo_op=([\w.\-]+)")
WIDTH = 110  # of a kernel's name: those of templates go on for pages


class Event(NamedTuple):
    """Something that ran.

    Attributes:
        kernel: Its own name.
        operation: The program's operation, empty if the trace does not say.
        nanoseconds: How long.
        begun: When, in nanoseconds.
    """

    kernel: str
    operation: str
    nanoseconds: float
    begun: float = 0.0


def tables(trace: Path, program: str, steps: int, count: int) -> str:
    """Markdown: the longest kernels, operations and kinds of operations.

    Args:
        trace: The directory of the trace.
        program: The text of the compiled program.
        steps: How many steps were traced; times are of one.
        count: How many rows a table has.
    """
    found = list(events(trace))
    names = names_of(program)
    whole = sum(event.nanoseconds for event in found)
    if not whole:
        raise ValueError(f"The trace in {trace} has no kernels of a device.")
    parts = [f"{len(found) // steps} kernels and {whole / steps / 1e6:.2f} ms a step, all streams"]
    for title, name_of in {
        "Places in the model": lambda e: place(names.get(e.operation, "")) or "(none)",
        "Kinds of operations": lambda e: re.sub(r"[.\d]+$", "", e.operation) or "(none)",
        "Operations": lambda e: e.operation or "(none)",
        "Kernels": lambda e: e.kernel,
    }.items():
        rows = summed([(name_of(event), event) for event in found])[:count]
        parts.append(_table(title, rows, names if title == "Operations" else {}, steps, whole))
    return "\n\n".join(parts)


def timeline(trace: Path, program: str, steps: int) -> str:
    """The last step, a kernel a line: when (ms), how long (ms), operation, place, kernel.

    Args:
        trace: The directory of the trace.
        program: The text of the compiled program.
        steps: How many steps were traced.
    """
    found = sorted(events(trace), key=lambda event: event.begun)
    last, names = found[-(len(found) // steps) :], names_of(program)
    lines = ["begun\tms\toperation\tplace\tkernel"]
    for event in last:
        times = f"{(event.begun - last[0].begun) / 1e6:.3f}", f"{event.nanoseconds / 1e6:.4f}"
        said = event.operation, names.get(event.operation, ""), event.kernel[:WIDTH]
        lines.append("\t".join((*times, *said)))
    return "\n".join(lines) + "\n"


def summed(named: list[tuple[str, Event]]) -> list[tuple[str, float, int]]:
    """Name, nanoseconds and count, the longest first.

    >>> one = Event("kernel", "dot.1", 2.0)
    >>> summed([("a", one), ("b", one), ("b", one)])
    [('b', 4.0, 2), ('a', 2.0, 1)]
    """
    times, counts = collections.Counter(), collections.Counter()
    for name, event in named:
        times[name] += event.nanoseconds  # pyright: ignore
        counts[name] += 1
    return [(name, time, counts[name]) for name, time in times.most_common()]


def events(trace: Path) -> Iterator[Event]:
    """What ran on the device: on the streams of an accelerator, else the operations on the host."""
    paths = sorted(trace.rglob("*.xplane.pb"))
    if not paths:
        raise ValueError(f"There is no trace in {trace}.")
    planes = list(ProfileData.from_file(str(paths[-1])).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in devices or planes:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue  # sums that the profiler makes of the streams
            for event in line.events:
                operation = _operation(event)
                if devices or (operation and event.name == operation):
                    yield Event(event.name, operation, event.duration_ns, event.start_ns)


def _operation(event: object) -> str:
    """The program's operation that an event belongs to: a field of it, or said in another one."""
    with warnings.catch_warnings():
        # The extension's types have no module, which Python 3.13 warns of.
        warnings.simplefilter("ignore", DeprecationWarning)
        stats = dict(event.stats)  # pyright: ignore
    if "hlo_op" in stats:
        return str(stats["hlo_op"])
    said = _SAID.search(" ".join(map(str, stats.values())))
    return said[1] if said else ""


def _table(
    title: str, rows: list[tuple[str, float, int]], names: dict[str, str], steps: int, whole: float
) -> str:
    lines = [
        f"## {title}",
        "",
        "| name | ms a step | share | times a step | from |",
        "| --- | ---: | ---: | ---: | --- |",
    ]
    for name, time, times in rows:
        numbers = (f"{time / steps / 1e6:.3f}", f"{time / whole:.1%}", f"{times / steps:.0f}")
        lines.append("| " + " | ".join((name[:WIDTH], *numbers, names.get(name, ""))) + " |")
    return "\n".join(lines)
