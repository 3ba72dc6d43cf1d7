"""A weight that is cut over devices has the derivatives of a plain one, and is gathered early."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import lora_jax
from lora_jax import training
from lora_jax._gathered import gather_later

INS, OUTS, ROWS = 128, 64, 4


def weight() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (INS, OUTS)) / INS**0.5


def inputs() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (ROWS, INS))


def places(leaf: Any) -> Any:
    """Each array cut along its first axis that eight devices divide."""
    mesh = training.make_mesh(fsdp=8)

    def place(array: jax.Array) -> NamedSharding:
        divides = [axis for axis, size in enumerate(array.shape) if size % 8 == 0]
        names = [None] * divides[0] + ["fsdp"] if divides else []
        return NamedSharding(mesh, P(*names))

    return jax.tree.map(place, leaf)


def curved(params: Any, x: jax.Array) -> jax.Array:
    """Not linear in its input, which it compares too."""
    y = jnp.sin(x @ params["w"])
    return jnp.where(y > 0, y**2, jnp.tanh(y)).sum()


ADAPTED = lora_jax.adapt(curved, on_materialize="error")


def over_devices(leaf: Any, x: jax.Array) -> jax.Array:
    return ADAPTED({"w": gather_later(leaf, places(leaf), "fsdp", ("in", "out"))}, x)


def held(base: str) -> Any:
    if base == "plain":
        return weight()
    return lora_jax.quantize({"w": weight()}, base)["w"]


@pytest.mark.parametrize("base", ["plain", "nf4", "int8"])
def test_every_derivative_is_that_of_the_plain_weight(base):
    leaf = held(base)
    plain = {"w": leaf if base == "plain" else leaf.whole()}
    x, v = inputs(), inputs()[::-1]

    def both(of: Any) -> Any:
        """A derivative over devices, and on one."""
        cut = jax.device_put(leaf, places(leaf))
        return jax.jit(of(lambda x: over_devices(cut, x)))(x), of(lambda x: curved(plain, x))(x)

    def reverse(f: Any) -> Any:
        return jax.grad(f)

    def forward(f: Any) -> Any:
        return lambda x: jax.jvp(f, (x,), (v,))

    def twice(f: Any) -> Any:
        return lambda x: jax.jvp(jax.grad(f), (x,), (v,))

    def by_rows(f: Any) -> Any:
        return lambda x: jax.vmap(jax.grad(f))(x[:, None])

    for of in (reverse, forward, twice, by_rows):
        found, wanted = both(of)
        jax.tree.map(
            # Sums of 128 products in float32, in another order.
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            found,
            wanted,
        )


def barriers(jaxpr: Any) -> Iterator[list[Any]]:
    """What each barrier of a jaxpr holds, by its shape and dtype."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "optimization_barrier":
            yield [(v.aval.shape, v.aval.dtype) for v in eqn.invars]
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from barriers(inner)


def waiting(jaxpr: Any) -> bool:
    """Whether something that is rematerialised waits for a gradient as a whole."""
    return any(
        eqn.params.get("prevent_cse", False) or waiting(getattr(value, "jaxpr", value))
        for eqn in jaxpr.eqns
        for value in eqn.params.values()
        if hasattr(getattr(value, "jaxpr", value), "eqns")
    )


def test_the_backward_pass_gathers_a_weight_before_its_gradient_is_there():
    jaxpr = jax.make_jaxpr(jax.grad(over_devices, 1))(held("plain"), inputs()).jaxpr
    # The weight is told apart from the one of the forward pass, and nothing else is held with it.
    assert list(barriers(jaxpr)) == [[((INS, OUTS), jnp.float32)]]
    assert not waiting(jaxpr)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_codes_are_gathered_before_and_dequantised_once_they_are_needed(base):
    leaf = held(base)
    codes = sorted((str(a.shape), str(a.dtype)) for a in jax.tree.leaves(leaf))
    jaxpr = jax.make_jaxpr(jax.grad(over_devices, 1))(leaf, inputs()).jaxpr
    held_by = [sorted((str(shape), str(dtype)) for shape, dtype in one) for one in barriers(jaxpr)]
    other = (str((ROWS, INS)), "float32")
    assert not waiting(jaxpr)
    assert codes in held_by  # told apart, and gathered
    assert sorted([*codes, other]) in held_by  # dequantised with the input
