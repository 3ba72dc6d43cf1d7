"""The value of one function, the gradient of its twin, and nothing of what is frozen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lora_jax
from lora_jax.ops import with_gradient_of


def product(params, x, dtype=jnp.float32):
    """``x @ kernel`` of bfloat16, summed in ``dtype``."""
    return lax.dot_general(x, params["kernel"], (((1,), (0,)), ((), ())), None, dtype)


NARROW = functools.partial(product, dtype=jnp.bfloat16)


@pytest.fixture(scope="module")
def given():
    source = np.random.default_rng(0)
    kernel, x = (
        jnp.asarray(source.normal(size=shape), jnp.bfloat16) for shape in ((64, 48), (8, 64))
    )
    return {"kernel": kernel}, x


def gradients(fn, *args):
    """Of all arguments; the cotangent differs from entry to entry."""
    return jax.grad(lambda *args: jnp.sum(jnp.sin(fn(*args))), argnums=(0, 1))(*args)


def test_value_of_one_and_gradient_of_the_other(given):
    params, x = given
    both = with_gradient_of(product, NARROW)
    np.testing.assert_array_equal(both(params, x), product(params, x))

    def by_hand(params, x):  # the cotangent of the wide value, rounded
        value, pullback = jax.vjp(NARROW, params, x)
        return pullback(jnp.cos(product(params, x)).astype(value.dtype))

    for leaf, expected in zip(
        jax.tree.leaves(gradients(both, params, x)),
        jax.tree.leaves(by_hand(params, x)),
        strict=True,
    ):
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(leaf, expected)


def test_products_of_the_backward_pass_are_of_bfloat16(given):
    params, x = given

    def operands(fn):
        jaxpr = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(jnp.sin(fn(params, x)))))(x)
        return [
            {str(atom.aval.dtype) for atom in eqn.invars}
            for eqn in jaxpr.eqns
            if eqn.primitive.name == "dot_general"
        ]

    assert operands(product) == [{"bfloat16"}, {"float32", "bfloat16"}]
    # The twin's own value is the one in the middle, which nothing reads.
    assert operands(with_gradient_of(product, NARROW)) == [{"bfloat16"}] * 3


def test_the_value_of_the_twin_is_not_computed(given):
    params, x = given

    def total(x):
        return jnp.sum(jnp.sin(with_gradient_of(product, NARROW)(params, x)))

    program = jax.jit(jax.grad(total)).lower(x).compile()
    assert program.cost_analysis()["flops"] < 3 * 2 * 8 * 64 * 48


def test_adapted_weights_whole_numbers_and_keys_are_arguments_too(given):
    params, x = given
    config = lora_jax.LoraConfig(rank=2, alpha=4.0, targets=("kernel",), dropout=0.5)
    frozen, trainable = lora_jax.split({**params, "count": jnp.int32(3)}, config, jax.random.key(0))
    trainable = jax.tree.map(lambda leaf: leaf + 0.1, trainable)

    def counted(params, x, dtype=jnp.float32):
        return product(params, x * params["count"].astype(x.dtype), dtype)

    lifted = lora_jax.adapt(counted, on_materialize="error")
    both = with_gradient_of(lifted, functools.partial(lifted, dtype=jnp.bfloat16))

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(trainable, fn):
        def total(trainable):
            params = lora_jax.combine(frozen, trainable, dropout_key=jax.random.key(1))
            return jnp.sum(jnp.sin(fn(params, x)))

        return jax.grad(total)(trainable)

    found, expected = gradient(trainable, both), gradient(trainable, lifted)
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Cotangents and sums of 8 and 64 terms, each rounded at 2**-9.
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=2**-7 * np.abs(wanted).max())
