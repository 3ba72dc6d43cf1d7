"""What XLA plans for devices that are not there is what it plans for those that are."""

import importlib.util

import jax
import pytest

from benchmarks import plan
from benchmarks.scaling import ours
from lora_jax import _joined, _ranks
from lora_jax.models import _attention


def test_the_plan_of_a_step_is_that_of_the_benchmark(tmp_path):
    point = plan.point_of("tiny", "fsdp", 2, "scanned")
    found = plan.plan(point, jax.devices()[:2], {})
    once = point.replace(start_only=True, cache=str(tmp_path))
    measured = ours.measure(once)
    assert found["wire"] == measured["wire"]
    # The benchmark's batches have labels too, which this loss does not read.
    assert found["planned"]["total"] == pytest.approx(measured["planned"]["total"], rel=0.02)
    words = plan.line(point, found).split(" | ")
    assert words[:3] == ["| tiny", "fsdp", "2"]
    assert float(words[5]) == pytest.approx(found["planned"]["total"] / 2**30, rel=1e-3)


def test_while_it_lasts_it_is_a_gpu():
    before = _joined.BACKENDS, _ranks.BACKENDS, _attention.default_device
    with plan.as_on_a_gpu():
        assert _joined.pays(16384, 2048, 8192)
        assert _attention.default_device().compute_capability == "9.0"
    assert (_joined.BACKENDS, _ranks.BACKENDS, _attention.default_device) == before


PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")


@pytest.mark.skipif(any(map(importlib.util.find_spec, PLUGINS)), reason="CUDA's plugin is here")
def test_without_the_plugin_it_says_so():
    with pytest.raises(SystemExit, match=r"jax\[cuda13\]"):
        plan.cards(2)
