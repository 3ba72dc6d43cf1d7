"""What a step sends between devices, read from its compiled program.

    %ag = bf16[4096,1024]{1,0} all-gather(%w), replica_groups=[1,8]<=[8], dimensions={0}

Two numbers stand for it. ``results`` is the bytes of what a collective leaves on each device, by
kind: 8 MiB above. ``sent`` is what each device sends in a ring of g devices:

    all-gather            (g - 1) / g  of the result
    reduce-scatter        (g - 1)      of the result, a part of what went in
    all-reduce          2 (g - 1) / g  of the result: a reduce-scatter and an all-gather
    all-to-all            (g - 1) / g  of the result
    collective-permute      1          of the result

What stands in a loop's body counts as often as the loop runs.
"""

import collections
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(rf"= (\S.*?) ({'|'.join(KINDS)})(-start)?\(")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|\w+_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch|called)_computations=\{(.*?)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_PARTITIONS = re.compile(r"\bnum_partitions=(\d+)")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
        kind: One of `KINDS`.
        nbytes: Of what it leaves on each device.
        group: How many devices take part together.
        times: How often it runs in a step.
    """

    kind: str
    nbytes: int
    group: int
    times: int = 1

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time, in a ring."""
        part = (self.group - 1) / self.group
        factors = {
            "all-reduce": 2 * part,
            "reduce-scatter": self.group - 1,
            "collective-permute": 1.0,
        }
        return self.nbytes * factors.get(self.kind, part)


def collectives(program: str) -> tuple[list[Collective], int]:
    """All collectives of a compiled program, and how many loops of unknown length hold some.

    A loop of unknown length counts once. So does each branch of a condition.

    Args:
        program: The text of the compiled program.
    """
    found = _PARTITIONS.search(program)
    devices = int(found[1]) if found else 1
    bodies, entry = _computations(program)
    own = {
        name: [one for line in lines if (one := _collective(line, devices))]
        for name, lines in bodies.items()
    }
    calls = {name: list(_calls(lines)) for name, lines in bodies.items()}

    def within(name: str) -> Iterator[tuple[Collective, int]]:
        """Of a computation and of all that it calls, with the loops of unknown length around."""
        for one in own.get(name, ()):
            yield one, 0
        for called, trips in calls.get(name, ()):
            for one, unknown in within(called):
                yield one._replace(times=one.times * (trips or 1)), unknown + (trips is None)

    pairs = list(within(entry))
    return [one for one, _ in pairs], sum(unknown > 0 for _, unknown in pairs)


def moved(program: str) -> dict[str, Any]:
    """What a step moves: ``results`` by kind and ``sent``, in bytes; ``count`` by kind.

    Args:
        program: The text of the compiled program.
    """
    found, unknown = collectives(program)
    results, count = collections.Counter(), collections.Counter()
    for one in found:
        results[one.kind] += one.nbytes * one.times
        count[one.kind] += one.times
    sent = round(sum(one.sent * one.times for one in found))
    return {
        "results": dict(results),
        "count": dict(count),
        "sent": sent,
        "in_loops_of_unknown_length": unknown,
    }


def _computations(program: str) -> tuple[dict[str, list[str]], str]:
    """Name -> lines, and the name of the one that is entered."""
    bodies: dict[str, list[str]] = {}
    entry = inside = ""
    for line in program.splitlines():
        if opened := _COMPUTATION.match(line):
            inside = opened[2]
            bodies[inside] = []
            entry = inside if opened[1] else entry
        elif inside:
            bodies[inside].append(line)
    return bodies, entry


def _calls(lines: Sequence[str]) -> Iterator[tuple[str, int | None]]:
    """Each computation that is called, and how often; None where a loop does not say."""
    for line in lines:
        names = [found[1] for found in _CALLED.finditer(line)]
        for group in _BRANCHES.findall(line):
            names += re.findall(r"[\w.\-]+", group)
        if names:
            trips = _TRIPS.search(line)
            once = None if " while(" in line else 1
            yield from ((name, int(trips[1]) if trips else once) for name in names)


def _collective(line: str, devices: int) -> Collective | None:
    found = _COLLECTIVE.search(line)
    if found is None:
        return None
    shape = _result(found[1], found[2]) if found[3] else found[1]
    return Collective(found[2], _nbytes(shape), _group(line, devices))


def _result(shape: str, kind: str) -> str:
    """The result among what an asynchronous start gives: ``(operands, results, ...)``.

    >>> _result("(bf16[2]{0}, bf16[8]{0})", "all-gather")
    'bf16[8]{0}'
    >>> _result("(f32[2]{0}, f32[8]{0})", "all-reduce")
    '(f32[2]{0}, f32[8]{0})'
    """
    parts = _parts(shape)
    if len(parts) < 2 or (kind == "all-reduce" and not parts[0].startswith("(")):
        return shape
    return parts[1]


def _parts(shape: str) -> list[str]:
    """The elements of a tuple; none of an array."""
    if not shape.startswith("("):
        return []
    depth, parts = 0, [""]
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _nbytes(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple.

    >>> _nbytes("(bf16[2,3]{1,0}, pred[], u4[8]{0})")
    17
    """
    total = 0
    for kind, bits, sizes in _ARRAY.findall(shape):
        count = math.prod(int(size) for size in sizes.split(",") if size)
        total += math.ceil(count * (8 if kind == "pred" else int(bits)) / 8)
    return total


def _group(line: str, devices: int) -> int:
    """How many devices a group has, from any of the ways in which groups are written.

    >>> _group("all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%add", 4)
    2
    >>> _group("all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add", 8)
    4
    >>> _group("all-reduce(%x), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, to_apply=%add", 8)
    4
    """
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(found[1].split(","))
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices
