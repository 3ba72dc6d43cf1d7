"""The sweep's benchmark: both sides are measured, and they learn the same."""

import dataclasses

from benchmarks import sweep
from benchmarks.claims.shapes import SHAPES


def test_both_sides_are_measured_and_learn_the_same():
    tiny = SHAPES["tiny-roberta"]
    shape = dataclasses.replace(tiny, fields={**tiny.fields, "num_hidden_layers": 1})
    found = sweep.measure(members=2, steps=2, batch=4, length=16, shape=shape)
    assert min(*found["steps"], *found["compiling"], *found["memory"]) > 0
    assert found["apart"] < 1e-5
    assert len(found["table"].splitlines()) == 6
