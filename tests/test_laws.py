"""The laws of `lora_jax`, each held by every function in the table of cases.

All in float64, where a wrong term cannot hide in rounding. Each case is compiled once through
`adapt` and once through `merge`, and the laws read the results.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import lora_jax
from lora_jax._paths import flatten
from lora_jax.ops.quantized import quantize_weight
from lora_jax.testing import assert_trees_close, assert_trees_equal
from tests.cases import CASES, mesh_of

# A lookup multiplies by nothing, so its gradient is cheap on either road.
WITHOUT_PRODUCT = ("linen_embed",)

# One row for each way in which a weight travels before something reads it.
QUANTIZED = (
    "linen_dense_general",
    "linen_scan_remat",
    "ragged_dot",
    "tied_lookup_and_head",
    "transposed",
    "split_into_three",
    "fused_in_part_and_scanned",
    "indexed",
    "indexed_by_value",
    "stacked_in_the_middle",
    "weight_in_the_carry",
    "shard_map_tensor_parallel",
)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(params=CASES)
def lifted(request):
    return _lifted(request.param)


@functools.lru_cache(maxsize=len(CASES))
def _lifted(name):
    with jax.enable_x64(True):
        return Lifted(name)


class Lifted:
    """One row of the table, split, with a ``b`` that is zero (``start``) and one that is not."""

    def __init__(self, name):
        case = CASES[name](128)
        self.name, self.fn, self.rounding = name, case.fn, case.rounding
        self.params, self.inputs = _float64_tree(case.params), _float64_tree(case.inputs)
        config = lora_jax.LoraConfig(
            rank=2, alpha=3, targets=case.targets, train=case.train, parts=case.parts
        )
        layouts = lora_jax.layouts(case.fn, self.params, *self.inputs)
        self.frozen, self.start = lora_jax.split(
            self.params, config, jax.random.key(1), layouts=layouts
        )
        self.trainable = _shaken(self.start)

    def adapted(self, trainable, frozen):
        lifted = lora_jax.adapt(self.fn, on_materialize="error")
        return lifted(lora_jax.combine(frozen, trainable), *self.inputs)

    def merged(self, trainable, frozen):
        return self.fn(lora_jax.merge(frozen, trainable), *self.inputs)

    @functools.cached_property
    def through_adapt(self):
        return self.compile(self.adapted, self.frozen)

    @functools.cached_property
    def through_merge(self):
        return self.compile(self.merged, self.frozen)

    def compile(self, forward, frozen):
        def loss(trainable, frozen):
            outputs = forward(trainable, frozen)
            return sum(map(_uneven_sum, jax.tree.leaves(outputs))), outputs

        gradient = jax.jit(jax.grad(loss, has_aux=True))
        return gradient.lower(self.trainable, frozen).compile()


def _float64_tree(tree):
    def widen(x):
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(widen, tree)


def _shaken(trainable):
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape)), trainable)


def _uneven_sum(y):
    """A scalar whose gradient differs from place to place."""
    return jnp.sum(jnp.sin(y) * jnp.arange(1.0, 1 + y.size).reshape(y.shape))


def test_at_step_0_merged_weights_are_the_base_weights_bit_for_bit(lifted):
    assert_trees_equal(lora_jax.merge(lifted.frozen, lifted.start), lifted.params)


def test_at_step_0_the_adapted_function_is_the_function_op_by_op(lifted):
    with jax.disable_jit():
        expected = lifted.fn(lifted.params, *lifted.inputs)
        assert_trees_equal(lifted.adapted(lifted.start, lifted.frozen), expected)


def test_adapting_equals_merging_in_outputs_and_gradients(lifted):
    gradients, outputs = lifted.through_adapt(lifted.trainable, lifted.frozen)
    wanted_gradients, wanted = lifted.through_merge(lifted.trainable, lifted.frozen)
    assert_trees_close(outputs, wanted, relative=lifted.rounding)
    assert_trees_close(gradients, wanted_gradients, relative=100 * lifted.rounding)


def test_a_step_moves_what_trains_and_nothing_else(lifted):
    before = jax.tree.map(jnp.copy, lifted.frozen)
    tx = optax.adam(1e-2)
    trainable, state = lifted.trainable, tx.init(lifted.trainable)
    sizes = [x.size for x in jax.tree.leaves(trainable)]
    assert sorted(x.size for x in jax.tree.leaves(state)) == sorted([1, *sizes, *sizes])
    gradients, _ = lifted.through_adapt(trainable, lifted.frozen)
    assert jax.tree.structure(gradients) == jax.tree.structure(trainable)
    stepped = optax.apply_updates(trainable, tx.update(gradients, state)[0])
    assert_trees_equal(lifted.frozen, before)
    still = jax.tree.map(lambda x, y: bool((x == y).all()), stepped, trainable)
    assert not any(jax.tree.leaves(still))


def test_unmerge_undoes_merge(lifted):
    merged = lora_jax.merge(lifted.frozen, lifted.trainable)
    back = lora_jax.unmerge(merged, lifted.trainable)
    assert_trees_close(back, lifted.frozen, relative=1e-15)


def test_eager_equals_jit(lifted):
    _, jitted = lifted.through_adapt(lifted.trainable, lifted.frozen)
    eager = lifted.adapted(lifted.trainable, lifted.frozen)
    assert_trees_close(eager, jitted, relative=lifted.rounding)


def test_eight_devices_equal_one(lifted):
    spread = NamedSharding(mesh_of("all", shape=(8,)), P("all"))

    def shard(x):
        return jax.device_put(x, spread) if x.ndim and x.shape[0] % 8 == 0 else x

    halves = jax.tree.map(shard, (lifted.trainable, lifted.frozen))
    _, expected = lifted.through_adapt(lifted.trainable, lifted.frozen)
    assert_trees_close(jax.jit(lifted.adapted)(*halves), expected, relative=lifted.rounding)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantised_base_is_its_dequantised_values(name):
    lifted = _lifted(name)
    layouts = {
        path: factors.layout
        for path, factors in lifted.trainable.items()
        if isinstance(factors, lora_jax.Factors)
    }
    codes = _quantized(lifted.frozen, layouts)
    expected = lifted.through_adapt(lifted.trainable, lora_jax.dequantize(codes))
    gradients, outputs = lifted.compile(lifted.adapted, codes)(lifted.trainable, codes)
    assert_trees_close(outputs, expected[1], relative=lifted.rounding)
    assert_trees_close(gradients, expected[0], relative=100 * lifted.rounding)


def _quantized(frozen, layouts):
    leaves, treedef = flatten(frozen, is_leaf=lambda leaf: leaf is None)
    for path, layout in layouts.items():
        leaves[path] = quantize_weight(leaves[path], layout, "nf4")
    return treedef.unflatten(leaves.values())


def test_gradient_flops_are_at_most_0_72_of_those_through_merging(lifted):
    if lifted.name in WITHOUT_PRODUCT:
        pytest.skip("a lookup has no product")
    adapted, merged = (
        c.cost_analysis()["flops"] for c in (lifted.through_adapt, lifted.through_merge)
    )
    print(f"gradient flops, adapted / merged: {adapted / merged:.2f}")
    assert adapted / merged <= 0.72
