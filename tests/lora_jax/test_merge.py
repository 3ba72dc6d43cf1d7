"""`merge` and `unmerge`: one rounding, every dtype, and no infinity that goes unseen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import LoraConfig, LoraFactors
from lora_jax.testing import assert_trees_close, assert_trees_equal

CONFIG = LoraConfig(rank=2, alpha=3, targets=("w",))


def halves(dtype="float32", shape=(6, 4), scale=1.0):
    w = jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)
    frozen, trainable = lora_jax.split({"w": w}, CONFIG, jax.random.key(1))
    return frozen, jax.tree.map(lambda x: scale * (x + 0.1), trainable)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merging_rounds_once(dtype):
    frozen, trainable = halves(dtype)
    w, factors = np.float64(frozen["w"]), trainable["w"]
    exact = w + factors.scale * np.float64(factors.a) @ np.float64(factors.b)
    merged = lora_jax.merge(frozen, trainable)["w"]
    assert merged.dtype == dtype
    spacing = np.float64(jnp.finfo(dtype).eps) * np.abs(exact)
    assert (np.abs(np.float64(merged) - exact) <= 0.51 * spacing + 1e-6).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_bfloat16_base_merged_into_another_dtype_is_rounded_once(dtype):
    frozen, trainable = halves("bfloat16", scale=0.01)
    w, factors = np.float64(frozen["w"]), trainable["w"]
    update = factors.scale * np.float64(factors.a) @ np.float64(factors.b)
    merged = lora_jax.merge(frozen, trainable, dtype=dtype)["w"]
    assert merged.dtype == dtype
    # Half a unit in the last place of the result, and before it the roundings of the float32
    # sum: two products, their sum, the scale and the sum with the weight.
    bound = 0.5 * np.float64(jnp.finfo(dtype).eps) * np.abs(w + update)
    bound += 5 * np.float64(jnp.finfo("float32").eps) * (np.abs(w) + np.abs(update))
    assert (np.abs(np.float64(merged) - (w + update)) <= bound).all()
    lost = np.float64(lora_jax.merge(frozen, trainable)["w"]) == w
    assert lost.any()  # in bfloat16 these would not have moved
    assert (np.float64(merged) != w)[lost & (np.abs(update) > bound)].all()


def test_a_dtype_is_that_of_every_float_weight():
    config = LoraConfig(rank=2, alpha=3, targets=("w",), train=("bias",))
    params = {"w": jnp.ones((6, 4)), "bias": jnp.zeros(4), "other": jnp.ones(3)}
    params |= {"steps": jnp.arange(3), "name": "a string"}
    halves = lora_jax.split(params, config, jax.random.key(0))
    merged = lora_jax.merge(*halves, dtype="bfloat16")
    dtypes = {path: str(getattr(leaf, "dtype", None)) for path, leaf in merged.items()}
    assert dtypes == dict.fromkeys(("w", "bias", "other"), "bfloat16") | {
        "steps": "int32",
        "name": "None",
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_factors_held_in_bfloat16_are_summed_in_float32(dtype):
    frozen, trainable = halves(dtype)
    half = jax.tree.map(lambda factor: factor.astype("bfloat16"), trainable)
    wide = jax.tree.map(lambda factor: factor.astype("float32"), half)
    assert_trees_equal(lora_jax.merge(frozen, half), lora_jax.merge(frozen, wide))
    nothing = jax.tree.map(jnp.zeros_like, half)
    assert_trees_equal(lora_jax.merge(frozen, nothing), frozen)


@pytest.mark.parametrize(
    ("dtype", "match"),
    [
        pytest.param("int8", "must be a float dtype .*, got 'int8'", id="integers"),
        pytest.param("half-baked", "must be a float dtype .*, got 'half-baked'", id="unknown"),
        pytest.param("float64", "float64 needs jax_enable_x64", id="narrowed"),
    ],
)
def test_a_dtype_that_weights_cannot_have_is_refused(dtype, match):
    with pytest.raises(ValueError, match=match):
        lora_jax.merge(*halves(), dtype=dtype)


def test_fully_trained_weights_take_their_place():
    config = LoraConfig(rank=2, alpha=3, targets=("w",), train=("bias",))
    params = {"w": jnp.ones((6, 4)), "bias": jnp.zeros(4), "other": jnp.ones(3)}
    frozen, trainable = lora_jax.split(params, config, jax.random.key(0))
    trainable["bias"] = trainable["bias"] + 5
    merged = lora_jax.merge(frozen, trainable)
    assert_trees_equal(merged, {**params, "bias": params["bias"] + 5})
    assert lora_jax.unmerge(merged, trainable)["bias"] is None


def test_negative_zero_survives_a_zero_update():
    w = jnp.full((3, 3), -0.0)
    halves = lora_jax.split({"w": w}, CONFIG, jax.random.key(0))
    assert np.signbit(lora_jax.merge(*halves)["w"]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unmerge_undoes_merge_to_two_roundings(dtype):
    frozen, trainable = halves(dtype)
    back = lora_jax.unmerge(lora_jax.merge(frozen, trainable), trainable)
    assert_trees_close(back, frozen, relative=2 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        pytest.param("float16", 1e3, id="out-of-range"),
        pytest.param("float32", float("nan"), id="nan"),
        pytest.param("float32", 1e30, id="overflow"),
    ],
)
def test_a_merged_weight_that_is_not_finite_is_named(dtype, scale):
    frozen, trainable = halves(dtype, scale=scale)
    with pytest.raises(ValueError, match=f"'w' is not finite after merging in {dtype}"):
        lora_jax.merge(frozen, trainable)


def test_merging_runs_under_jit_and_grad():
    frozen, trainable = halves()
    eager = lora_jax.merge(frozen, trainable)
    assert_trees_close(jax.jit(lora_jax.merge)(frozen, trainable), eager, relative=1e-6)
    gradient = jax.grad(lambda t: lora_jax.merge(frozen, t)["w"].sum())(trainable)
    assert isinstance(gradient["w"], LoraFactors)


def test_training_through_merge_starts_at_a_zero_b():
    frozen, trainable = lora_jax.split({"w": jnp.ones((6, 4))}, CONFIG, jax.random.key(0))
    gradient = jax.grad(lambda t: lora_jax.merge(frozen, t)["w"].sum())(trainable)
    expected = trainable["w"].scale * trainable["w"].a.sum(0)[:, None] * jnp.ones((2, 4))
    assert_trees_close(gradient["w"].b, expected, relative=1e-6)


def test_factors_of_another_shape_are_refused():
    frozen, trainable = halves(shape=(6, 4))
    with pytest.raises(ValueError, match=r"'w' has shape \(1, 4\), and its factors of layout"):
        lora_jax.merge({"w": frozen["w"][:1]}, trainable)


def test_unmerge_refuses_another_tree():
    frozen, trainable = halves()
    with pytest.raises(ValueError, match="'w' trains, but the merged tree has no such weight"):
        lora_jax.unmerge({"v": frozen["w"]}, trainable)
