"""Adapted functions over several devices: on meshes whose axes JAX follows, and in `shard_map`."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec as P

import lora_jax
from lora_jax.testing import assert_trees_close

CONFIG = lora_jax.LoraConfig(rank=2, alpha=4, targets=("w",), dropout=0.5)
BASES = ("plain", "nf4", "int8", "fp8")
ROUNDING = 1e-5  # of float32 sums of 64 terms, in another order


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def trained(frozen):
    """Factors of a weight, with an update that is not zero."""
    _, start = lora_jax.split(frozen, CONFIG, jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf + 0.1, start)


EXPLICIT = {
    "out-sharded": (P(None, "tensor"), P("data"), lambda w, x: x @ w),
    "in-sharded": (
        P("tensor", None), P("data"),
        lambda w, x: jnp.einsum("bi,io->bo", x, w, out_sharding=P("data", None)),
    ),
    "both-in-sharded": (
        P("tensor", None), P("data", "tensor"),
        lambda w, x: jnp.einsum("bi,io->bo", x, w, out_sharding=P("data", None)),
    ),
    "scattered": (
        P("tensor", None), P("data", "tensor"),
        lambda w, x: jnp.einsum("bi,io->bo", x, w, out_sharding=P("data", "tensor")),
    ),
    "free-of-its-own-cut": (
        P(None, "data"), P("data"),
        lambda w, x: jnp.einsum("bi,io->bo", x, w, out_sharding=P("data", None)),
    ),
    "gathered-first": (
        P("tensor", None), P("data"),
        lambda w, x: x @ jax.sharding.reshard(w, P(None, None)),
    ),
    "in-turn": (
        P(None, "tensor"), P("data"),
        lambda w, x: jax.lax.scan(lambda h, _: (2 * h, None), x @ w, length=2)[0],
    ),
}  # fmt: skip


def explicit_mesh():
    shape, kinds = (2, 4), (AxisType.Explicit, AxisType.Explicit)
    return jax.set_mesh(jax.make_mesh(shape, ("data", "tensor"), axis_types=kinds))


def run(fn, frozen, trainable, x, key=None):
    """``fn`` adapted and jitted."""
    lifted = lora_jax.adapt(lambda params, x: fn(params["w"], x), on_materialize="error")

    def of_halves(frozen, trainable, x):
        return lifted(lora_jax.combine(frozen, trainable, dropout_key=key), x)

    return jax.jit(of_halves)(frozen, trainable, x)


@pytest.mark.parametrize(("spec", "rows", "fn"), EXPLICIT.values(), ids=EXPLICIT.keys())
@pytest.mark.parametrize("base", ["plain", "int8", "fp8"])
def test_explicit_axes(base, spec, rows, fn):
    with explicit_mesh():
        params = {"w": jax.device_put(normal(7, 16, 8), spec)}
        x = jax.device_put(normal(8, 4, 16), rows)
        if base != "plain":
            params = lora_jax.quantize(params, base, targets=("w",))
        trainable = trained({"w": jnp.ones((16, 8))})
        actual = run(fn, params, trainable, x)
        merged = lora_jax.merge(lora_jax.dequantize(params), trainable)
        expected = jax.jit(fn)(jax.sharding.reshard(merged["w"], spec), x)
        dropped = run(fn, params, trainable, x, jax.random.key(1))
    assert actual.sharding.spec == expected.sharding.spec == dropped.sharding.spec
    assert_trees_close(actual, expected, relative=ROUNDING)


def test_blocks_do_not_follow_explicit_axes():
    with explicit_mesh():
        params = {"w": jax.device_put(normal(7, 16, 8), P(None, "tensor"))}
        with pytest.raises(ValueError, match=r"w.*P\(None, 'tensor'\).*jax.sharding.reshard"):
            lora_jax.quantize(params, "nf4", targets=("w",))
        whole = jax.sharding.reshard(params["w"], P())
        codes = lora_jax.quantize({"w": whole}, "nf4", targets=("w",))
        trainable = trained({"w": jnp.ones((16, 8))})
        x = jax.device_put(normal(8, 4, 16), P("data"))
        actual = run(lambda w, x: x @ w, codes, trainable, x)
        expected = x @ lora_jax.merge(lora_jax.dequantize(codes), trainable)["w"]
    assert actual.sharding.spec == expected.sharding.spec
    assert_trees_close(actual, expected, relative=ROUNDING)


def product(w, x):
    return jnp.tanh(x @ w)


def in_a_loop(w, x):
    return jax.lax.fori_loop(0, 2, lambda _, h: product(w, h), x)


@pytest.mark.parametrize("fn", [product, in_a_loop, jax.checkpoint(product)])
@pytest.mark.parametrize("base", BASES)
def test_inside_a_shard_map(base, fn):
    """JAX checks there which arrays differ from shard to shard: weights do not, their inputs do."""
    params, x = {"w": normal(7, 16, 16)}, normal(8, 8, 16)
    if base != "plain":
        params = lora_jax.quantize(params, base, targets=("w",))
    trainable = trained({"w": jnp.ones((16, 16))})
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    lifted = lora_jax.adapt(lambda params, x: fn(params["w"], x), on_materialize="error")

    def shard(trainable, x):
        return lifted(lora_jax.combine(params, trainable), x)

    sharded = jax.shard_map(shard, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))
    found, wanted = (
        jax.jit(jax.value_and_grad(lambda t, x, f=f: f(t, x).sum(), (0, 1)))(trainable, x)
        for f in (sharded, shard)
    )
    assert_trees_close(found, wanted, relative=ROUNDING)
