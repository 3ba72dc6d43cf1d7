"""A weight that is cut over devices has the derivatives of a plain one, and is gathered early."""

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


def backward(leaf: Any) -> Any:
    """What the backward pass of one product does, as a jaxpr, and whether a barrier holds it."""
    jaxpr = jax.make_jaxpr(jax.grad(over_devices, 1))(leaf, inputs()).jaxpr
    (eqn,) = [eqn for eqn in jaxpr.eqns if "prevent_cse" in eqn.params]
    return eqn.params["jaxpr"], eqn.params["prevent_cse"]


@pytest.mark.parametrize("base", ["plain", "nf4", "int8"])
def test_the_backward_pass_gathers_a_weight_before_its_gradient_is_there(base):
    body, waits = backward(held(base))
    assert not waits
    first, *rest = body.eqns
    assert first.primitive.name == "optimization_barrier"
    # It tells the weight apart from that of the forward pass, holds nothing else, and all that
    # comes after begins with what it gives.
    cut = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(held(base))]
    assert [(v.aval.shape, v.aval.dtype) for v in first.invars] == cut
    assert not {id(v) for v in first.invars} & {id(v) for eqn in rest for v in eqn.invars}


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_codes_are_dequantised_once_the_gradient_is_there(base):
    body, _ = backward(held(base))
    (spent,) = [eqn for eqn in body.eqns if eqn.params.get("prevent_cse")]
    read = {id(v) for v in spent.invars}
    gathers = [eqn for eqn in body.eqns if eqn.primitive.name == "sharding_constraint"]
    assert gathers
    assert all(id(eqn.outvars[0]) in read for eqn in gathers)
    assert id(body.invars[-1]) in read


LAYERS, WIDTH = 16, 128


def layered(params: Any, x: jax.Array) -> jax.Array:
    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jnp.tanh(x @ w), None

    if isinstance(params, list):
        for w in params:
            x, _ = layer(x, w)
        return x.sum()
    return jax.lax.scan(layer, x, params)[0].sum()


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("base", ["plain", "nf4"])
def test_no_layer_stays_whole_between_the_passes(base, stacked):
    stack = jax.random.normal(jax.random.key(0), (LAYERS, WIDTH, WIDTH)) / WIDTH**0.5
    tree = {"w": stack} if stacked else {f"w{i}": w for i, w in enumerate(stack)}
    layout = ("stack", "in", "out") if stacked else ("in", "out")
    if base != "plain":
        tree = lora_jax.quantize(tree, base, layouts=dict.fromkeys(tree, layout))
    mesh, axis = training.make_mesh(fsdp=8), int(stacked)
    place = NamedSharding(mesh, P(*[None] * axis, "fsdp"))
    cut = jax.device_put(tree, jax.tree.map(lambda leaf: whole_or(place, leaf), tree))

    def loss(x: jax.Array, cut: Any) -> jax.Array:
        leaves = [
            gather_later(leaf, jax.tree.map(lambda a: whole_or(place, a), leaf), "fsdp", layout)
            for leaf in cut.values()
        ]
        return lora_jax.adapt(layered, on_materialize="error")(leaves[0] if stacked else leaves, x)

    x = jax.random.normal(jax.random.key(1), (8, WIDTH))
    compiled = jax.jit(jax.grad(loss)).lower(x, cut).compile()
    gathers = compiled.as_text().count(" all-gather(")
    assert gathers >= (2 if stacked else 2 * LAYERS - 1)  # the last layer's passes are neighbours
    if stacked:  # unrolled, a CPU gathers all layers at once: it schedules for threads
        # A layer, what it is dequantised from and by, its part; and what is small beside them.
        assert compiled.memory_analysis().temp_size_in_bytes < LAYERS // 2 * WIDTH * WIDTH * 4


def whole_or(place: NamedSharding, leaf: jax.Array) -> NamedSharding:
    """A place, or that of an array which it does not divide: whole on each device."""
    axis = len(place.spec) - 1
    divides = leaf.ndim > axis and leaf.shape[axis] % 8 == 0
    return place if divides else NamedSharding(place.mesh, P())


def test_what_has_a_derivative_of_its_own_may_be_mapped_and_differentiated():
    @jax.custom_vjp
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    product.defvjp(lambda x, w: (x @ w, w), lambda w, dy: (2 * dy @ w.T, jnp.zeros_like(w)))
    leaf, x = weight(), inputs()
    held = gather_later(leaf, places(leaf), "fsdp", ("in", "out"))
    adapted = lora_jax.adapt(lambda params, x: jnp.sin(product(x, params["w"])))

    def loss(x: jax.Array, w: Any) -> jax.Array:
        return jax.vmap(lambda row: adapted({"w": w}, row[None]))(x).sum()

    found = jax.jit(lambda x: jax.grad(loss)(x, held))(x)
    np.testing.assert_allclose(found, jax.grad(loss)(x, leaf), rtol=1e-4, atol=1e-5)
