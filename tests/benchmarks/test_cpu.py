"""The CPU's targets: both measurements report, and a verdict is what its ratio says."""

import dataclasses

import pytest

from benchmarks import cpu
from benchmarks.claims.shapes import SHAPES


@pytest.fixture(scope="module")
def found():
    tiny = SHAPES["tiny-roberta"]
    shape = dataclasses.replace(tiny, fields={**tiny.fields, "num_hidden_layers": 1})
    return cpu.measure(seconds=0.05, lengths=(16,), repeats=1, shape=shape)


def test_both_sides_are_measured(found):
    (step,) = found["steps"]
    assert (step["batch"], step["length"]) == (32, 16)
    assert min(step[side]["low"] for side in cpu.SIDES) > 0
    compiling = found["compiling"]
    for side in ("adapted", "plain"):
        parts = compiling[side]
        total = parts["trace"]["median"] + parts["compile"]["median"]
        assert total == pytest.approx(parts["total"]["median"])


def test_the_tables_end_with_both_verdicts(found):
    assert len(found["tables"]) == 4
    assert [line[2:] for line in found["tables"][-1].splitlines()] == found["verdicts"]


@pytest.mark.parametrize(
    ("median", "least", "ending"),
    [
        pytest.param(1.3, True, "asked for at least 1.25: met", id="fast-enough"),
        pytest.param(1.2, True, "asked for at least 1.25: MISSED", id="too-slow"),
        pytest.param(1.2, False, "asked for at most 1.25: met", id="cheap-enough"),
        pytest.param(1.3, False, "asked for at most 1.25: MISSED", id="too-dear"),
    ],
)
def test_verdict(median, least, ending):
    ratio = {"median": median, "low": median, "high": median}
    assert cpu.verdict("ratio", ratio, 1.25, least=least).endswith(ending)
