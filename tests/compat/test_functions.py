"""`adapt` on functions that we did not write: every target low-rank, and equal to merging.

`make test-compat` makes the environment: transformers 4.57 is the last with Flax classes.
"""

import functools

import jax
import pytest

import lora_jax
from benchmarks import flops
from benchmarks.functions import THEIRS, Function
from lora_jax.testing import assert_trees_close

pytest.importorskip("haiku", reason="needs the environment of `make test-compat`")
pytest.importorskip("equinox", reason="needs the environment of `make test-compat`")

CASES = [pytest.param(name, id=name) for name in THEIRS]


@functools.cache
def build(name: str) -> Function:
    return THEIRS[name]()


@pytest.fixture(autouse=True)
def their_own_rank_promotion():
    """Ranks promote in code that is not ours; our own tests forbid it."""
    with jax.numpy_rank_promotion("allow"):
        yield


assert_close = functools.partial(assert_trees_close, relative=2e-5)


@pytest.mark.parametrize("name", CASES)
def test_targets_match_every_matrix(name):
    function = build(name)
    _, trainable = flops.halves(function)
    assert len(trainable) == function.count


@pytest.mark.parametrize("name", CASES)
def test_adapted_equals_base_at_step_0(name):
    function = build(name)
    frozen, trainable = flops.halves(function, noise=0.0)
    adapted = lora_jax.adapt(function.fn, on_materialize="error")
    actual = function.call(adapted, lora_jax.combine(frozen, trainable))
    assert_close(actual, function.call(function.fn, function.params))


@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_those_of_merged_weights(name):
    function = build(name)
    frozen, trainable = flops.halves(function)
    adapted = lora_jax.adapt(function.fn, on_materialize="error")
    actual = function.call(adapted, lora_jax.combine(frozen, trainable))
    expected = function.call(function.fn, lora_jax.merge(frozen, trainable))
    assert_close(actual, expected)
    base = function.call(function.fn, function.params)
    with pytest.raises(AssertionError):
        assert_close(actual, base)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_through_merge(name):
    function = build(name)
    frozen, trainable = flops.halves(function)
    through_adapt, through_merge = flops.losses(function)
    actual = jax.jit(jax.grad(through_adapt))(trainable, frozen)
    expected = jax.jit(jax.grad(through_merge))(trainable, frozen)
    assert_close(actual, expected)


@pytest.mark.parametrize("name", CASES)
def test_gradient_takes_the_low_rank_path(name):
    function = build(name)
    counted = flops.count(function)
    print(f"\n{name}: {counted.adapted / counted.merged:.3f} of the flops through merge")
    assert counted.adapted <= function.limit * counted.merged
