"""One policy: what is kept, what the arithmetic sees, and what stays float32 whatever it says."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lora_jax
from lora_jax import training

CONFIG = lora_jax.LoraConfig(rank=2, alpha=4.0, targets=("up",), train=("head",))


def apply(params, x):
    return jnp.tanh(x @ params["up"]) @ params["head"]


def halves(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "up": jax.random.normal(keys[0], (6, 8), dtype),
        "head": jax.random.normal(keys[1], (8, 2), dtype),
    }
    frozen, trainable = lora_jax.split(params, CONFIG, keys[2])
    return frozen, jax.tree.map(lambda leaf: leaf + 0.1, trainable)


@pytest.mark.parametrize("scheme", [None, "int8"])
def test_a_step_computes_in_one_dtype_and_keeps_another(scheme):
    precision = training.Precision(base="bfloat16", trained="float32")
    frozen, trainable = precision.keep(*halves())
    assert frozen["up"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    if scheme:
        frozen = lora_jax.quantize(frozen, scheme, layouts={"up": "in out"})
    seen = {}
    adapted = lora_jax.adapt(apply, on_materialize="error")

    def loss_fn(trainable, frozen, batch, keys):
        x = precision.for_arithmetic(batch["x"])
        outputs = adapted(lora_jax.combine(frozen, trainable), x)
        seen.update(outputs=outputs.dtype, head=trainable["head"].dtype, x=batch["x"].dtype)
        return (outputs**2).mean()

    tx = optax.adamw(1e-2)
    state = training.init_state(trainable, tx, jax.random.key(1))
    mesh = training.make_mesh(devices=jax.devices()[:2])
    step = training.make_train_step(loss_fn, tx, mesh, precision=precision)
    batch = {"x": jnp.ones((4, 6))}
    state, metrics = step(*training.replicate((state, frozen), mesh), batch)
    assert seen == {"outputs": jnp.bfloat16, "head": jnp.bfloat16, "x": jnp.float32}
    assert {metrics[name].dtype for name in ("loss", "grad_norm")} == {jnp.dtype("float32")}
    moments = [leaf for leaf in jax.tree.leaves((state.trainable, state.opt_state)) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}


def test_norms_of_gradients_are_float32_where_what_trains_is_not():
    precision = training.Precision(base="bfloat16", trained="bfloat16")
    _, trainable = precision.keep(*halves())

    def loss_fn(trainable, frozen, batch, keys):
        return (trainable["head"].sum() + 0 * batch["x"].sum()) * jnp.bfloat16(1)

    tx = optax.sgd(0.0)
    state = training.init_state({"head": trainable["head"]}, tx, jax.random.key(1))
    mesh = training.make_mesh(devices=jax.devices()[:1])
    step = training.make_train_step(loss_fn, tx, mesh, precision=precision)
    _, metrics = step(*training.replicate((state, {}), mesh), {"x": jnp.ones((1, 6))})
    assert metrics["grad_norm"].dtype == jnp.float32
    assert float(metrics["grad_norm"]) == 4.0  # of 16 ones


def test_the_whole_model_in_one_dtype_equals_no_policy():
    frozen, trainable = halves()
    adapted = lora_jax.adapt(apply, on_materialize="error")
    mesh = training.make_mesh(devices=jax.devices()[:1])

    def outputs(trainable, frozen, batch):
        return adapted(lora_jax.combine(frozen, trainable), batch)

    x = jnp.ones((2, 6))
    plain = training.make_eval_step(outputs, mesh)(trainable, frozen, x)
    policy = training.Precision()
    same = training.make_eval_step(outputs, mesh, precision=policy)(trainable, frozen, x)
    assert (plain == same).all()


def test_only_floating_dtypes():
    with pytest.raises(ValueError, match="`compute` must be a floating dtype, got int8"):
        training.Precision(compute="int8")


def test_a_sum_over_many_is_differentiated_in_float16():
    # 2**17 tokens whose gradients are 1 each: their sum is beyond 65,504, their mean is not.
    def loss_fn(trainable, frozen, batch, keys):
        rows = batch["x"] * trainable["head"]
        return rows.astype(jnp.float32).sum(), jnp.float32(rows.size)

    tx = optax.sgd(1.0)
    state = training.init_state({"head": jnp.ones(1)}, tx, jax.random.key(1))
    mesh = training.make_mesh(devices=jax.devices()[:1])
    precision = training.Precision(base="float16")
    step = training.make_train_step(loss_fn, tx, mesh, precision=precision)
    batch = {"x": jnp.ones(2**17, jnp.float16)}
    state, metrics = step(*training.replicate((state, {}), mesh), batch)
    assert float(metrics["loss"]) == 1.0
    assert float(metrics["grad_norm"]) == pytest.approx(1.0, rel=2**-9)
