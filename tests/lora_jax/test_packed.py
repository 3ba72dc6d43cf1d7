"""What becomes of quantised weights inside adapted functions, split and merge."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

import lora_jax
from lora_jax.ops.quantized import quantize_weight
from lora_jax.testing import assert_trees_close, assert_trees_equal

LAYERS, WIDTH = 8, 128
LAYER = WIDTH * WIDTH * 4  # bytes of one layer in float32
STACKED = ("stack", "in", "out")
CONFIG = lora_jax.LoraConfig(rank=2, alpha=4, targets=("kernel",), layouts={"kernel": STACKED})


def scanned(params, x):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, params["kernel"])[0]


def unrolled(params, x):
    for w in params["kernel"]:
        x = jnp.tanh(x @ w)
    return x


@pytest.fixture(scope="module")
def params():
    w = jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH)) / WIDTH**0.5
    return {"kernel": w}


@pytest.fixture(scope="module")
def codes(params):
    return lora_jax.quantize(params, "nf4", targets="kernel", layouts={"kernel": STACKED})


@pytest.fixture(scope="module")
def halves(codes):
    frozen, trainable = lora_jax.split(codes, CONFIG, jax.random.key(1))
    return frozen, jax.tree.map(lambda leaf: leaf + 0.1, trainable)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(2), (4, WIDTH))


def loss(fn, frozen, x):
    adapted = lora_jax.adapt(fn, on_materialize="error")
    return lambda trainable: adapted(lora_jax.combine(frozen, trainable), x).sum()


def temporaries(fn, frozen, trainable, x):
    """Bytes that a gradient needs beside what goes in and out."""

    def gradient(trainable, frozen):
        return jax.grad(loss(fn, frozen, x))(trainable)

    compiled = jax.jit(gradient).lower(trainable, frozen).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("fn", [scanned, unrolled])
def test_no_residual_of_the_backward_pass_is_a_dequantised_weight(fn, halves, x):
    frozen, trainable = halves
    saved = jax.tree.leaves(jax.vjp(loss(fn, frozen, x), trainable)[1])
    floats = [leaf.size for leaf in saved if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert any(leaf.dtype == jnp.uint8 for leaf in saved)
    # The largest are `a` and `b` of the stack and its activations; one layer is 4 times those.
    assert max(floats) <= LAYERS * WIDTH * 4 < WIDTH * WIDTH


def test_a_scan_dequantises_one_layer_at_a_time(halves, x):
    # One layer, its float32 values before they are turned, and what is small beside them.
    assert temporaries(scanned, *halves, x) < 4 * LAYER < LAYERS * LAYER


def turned(params, x):
    """Layers on another axis, which Flax's scan moves first."""
    return scanned({"kernel": jnp.moveaxis(jnp.moveaxis(params["kernel"], 0, 1), 1, 0)}, x)


def backwards(params, x):
    return scanned({"kernel": params["kernel"][::-1]}, x)


def in_groups(params, x):
    for group in jnp.split(params["kernel"], 2):
        x = scanned({"kernel": group}, x)
    return x


def named(params, x):
    return scanned({"kernel": checkpoint_name(params["kernel"], "kernel")}, x)


@pytest.mark.parametrize("fn", [turned, backwards, in_groups, named])
def test_a_stack_that_is_rearranged_is_still_dequantised_by_layers(fn, halves, x):
    frozen, trainable = halves
    # As above, and the codes and factors once more, in their new order.
    assert temporaries(fn, frozen, trainable, x) < 5 * LAYER < LAYERS * LAYER
    apply = lora_jax.adapt(fn, on_materialize="error")
    found = jax.jit(apply)(lora_jax.combine(frozen, trainable), x)
    expected = jax.jit(fn)(lora_jax.merge(lora_jax.dequantize(frozen), trainable), x)
    assert_trees_close(found, expected, relative=1e-4)  # float32: 8 products of 128 terms


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_any_order_of_the_axes(scheme, order):
    w = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    codes = quantize_weight(w, "stack in out out", scheme)
    apply = lora_jax.adapt(lambda w: jnp.transpose(w, order), on_materialize="error")
    assert_trees_equal(apply(codes), jnp.transpose(codes.dequantize(), order))


@pytest.mark.parametrize("half", ["bare", "adapted"])
def test_a_weight_that_a_loop_outside_has_sliced_is_refused(codes, halves, half, x):
    weights = codes if half == "bare" else lora_jax.combine(*halves)
    apply = lora_jax.adapt(lambda params, x: x @ params["kernel"])
    with pytest.raises(ValueError, match=r"layout (is )?'stack in out'.*scan"):
        jax.lax.scan(lambda x, params: (apply(params, x), None), x, weights)


def test_casts_round_as_they_do_on_the_plain_weight():
    w = jax.random.normal(jax.random.key(0), (64, 64), jnp.bfloat16)
    codes = {"w": quantize_weight(w, ("in", "out"))}

    def there_and_back(params):
        return jnp.eye(64) @ params["w"].astype(jnp.float16).astype(jnp.float32)

    expected = there_and_back(lora_jax.dequantize(codes))
    assert_trees_equal(lora_jax.adapt(there_and_back)(codes), expected)


def test_a_base_without_adapters_runs(codes, x):
    expected = scanned(lora_jax.dequantize(codes), x)
    assert_trees_equal(jax.jit(lora_jax.adapt(scanned))(codes, x), jax.jit(lambda: expected)())


def test_merging_says_that_it_merges_into_dequantised_weights(codes, halves):
    frozen, trainable = halves
    with pytest.warns(lora_jax.DequantizedMergeWarning, match="'kernel' first: merging into"):
        merged = lora_jax.merge(frozen, trainable)
    plain = lora_jax.dequantize(codes)
    assert_trees_equal(merged, lora_jax.merge(plain, trainable))


def test_merging_into_the_original_weights(params, halves):
    frozen, trainable = halves
    merged = lora_jax.merge(frozen, trainable, base=params)
    assert_trees_equal(merged, lora_jax.merge(params, trainable))


def test_a_bfloat16_weight_is_merged_in_float32_and_rounded_once():
    w = jax.random.normal(jax.random.key(0), (64, 64), jnp.bfloat16)
    codes = {"w": quantize_weight(w, ("in", "out"))}
    config = lora_jax.LoraConfig(rank=2, alpha=4, targets=("w",))
    frozen, trainable = lora_jax.split(codes, config, jax.random.key(1))
    trainable = jax.tree.map(lambda leaf: leaf + 0.1, trainable)
    with pytest.warns(lora_jax.DequantizedMergeWarning):
        merged = lora_jax.merge(frozen, trainable)
    factors = trainable["w"]
    update = factors.scale * jnp.matmul(factors.a, factors.b, precision="highest")
    wide = codes["w"].astype(jnp.float32).dequantize() + update
    assert_trees_equal(merged["w"], wide.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        pytest.param({}, "`base` has no such weight", id="absent"),
        pytest.param({"kernel": jnp.ones((2, 3))}, r"of shape \(2, 3\)", id="shape"),
        pytest.param({"kernel": jnp.ones((8, 128, 128), jnp.int8)}, "has it as int8", id="ints"),
        pytest.param({"kernel": 1.0}, "has it as a float", id="number"),
    ],
)
def test_merging_refuses_another_base(halves, base, message):
    with pytest.raises(ValueError, match=message):
        lora_jax.merge(*halves, base=base)


def test_merging_refuses_a_quantised_base(codes, halves):
    with pytest.raises(ValueError, match="quantised too"):
        lora_jax.merge(*halves, base=codes)


def test_a_quantised_weight_does_not_train_in_full(codes):
    config = lora_jax.LoraConfig(rank=2, alpha=4, targets=("other",), train=("kernel",))
    params = {**codes, "other": jnp.ones((4, 4))}
    with pytest.raises(ValueError, match="quantised and cannot be trained in full"):
        lora_jax.split(params, config, jax.random.key(0))


def test_layouts_read_a_quantised_model_as_a_plain_one(params, codes, x):
    assert lora_jax.layouts(scanned, codes, x) == lora_jax.layouts(scanned, params, x)
