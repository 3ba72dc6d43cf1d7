"""One product in place of two: the same values, gradients and tangents as its plain twin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lora_jax
from lora_jax import _joined
from lora_jax._joined import joined, pays
from lora_jax.testing import assert_trees_close

ROWS, INS, OUTS, RANK = 64, 16, 96, 3
CONFIG = lora_jax.LoraConfig(rank=RANK, alpha=6, targets=("w",), layouts={"w": "in out"})
ROUNDING = float(np.finfo(np.float64).eps) * (INS + RANK)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def here(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(_joined, "BACKENDS", (jax.default_backend(),))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def matrices(spent):
    """``x, t, w, b``, summed over these axes."""
    x, t = (jnp.moveaxis(normal(n, 4, 5, size), -1, spent[0]) for n, size in ((0, INS), (1, RANK)))
    w, b = (jnp.moveaxis(normal(n, size, OUTS), 0, spent[1]) for n, size in ((2, INS), (3, RANK)))
    return x, t, w, b


def twin(x, t, w, b, spent):
    numbers = (((spent[0],), (spent[1],)), ((), ()))
    return jax.lax.dot_general(x, w, numbers) + jax.lax.dot_general(t, b, numbers)


@pytest.mark.parametrize("spent", [(2, 0), (2, 1), (0, 0), (1, 1)])
@pytest.mark.parametrize("moving", [(0, 1, 3), (0,), (1,), (2,), (3,), (0, 1, 2, 3)])
def test_joined_is_its_twin(spent, moving):
    given = matrices(spent)
    tangents = tuple(normal(10 + i, *leaf.shape) for i, leaf in enumerate(given))

    def over(fn):
        def some(*moved):
            whole = list(given)
            for i, leaf in zip(moving, moved, strict=True):
                whole[i] = leaf
            return fn(*whole, spent)

        start = [given[i] for i in moving]
        value, tangent = jax.jvp(some, start, [tangents[i] for i in moving])
        gradient = jax.grad(lambda *m: jnp.sin(some(*m)).sum(), range(len(moving)))(*start)
        return value, tangent, gradient

    assert_trees_close(over(joined), over(twin), relative=100 * ROUNDING)


def test_it_batches():
    x, t, w, b = (jnp.stack([leaf, 2 * leaf]) for leaf in matrices((2, 0)))
    one, other = (jax.vmap(functools.partial(fn, spent=(2, 0))) for fn in (joined, twin))
    assert_trees_close(one(x, t, w, b), other(x, t, w, b), relative=100 * ROUNDING)


@pytest.mark.usefixtures("here")
def test_it_pays_where_the_output_is_wide():
    assert pays(16384, 2048, 8192)  # up in a Llama of 1B, 8 x 2048
    assert not pays(16384, 8192, 2048)  # down
    assert not pays(16384, 2048, 2048)  # query
    assert not pays(4096, 4096, 14336)  # up in a Llama of 8B, 2 x 2048


def test_only_on_a_gpu():
    assert not pays(16384, 2048, 8192)


def wide(params, x):
    return jnp.tanh(x @ params["w"])


def transposed(params, x):
    return jnp.tanh(jnp.einsum("...i,oi->...o", x, params["w"]))


def rematerialised(params, x):
    return jax.checkpoint(wide)(params, x)


def scanned(params, x):
    return jax.lax.map(lambda row: wide(params, row), x)


def halves_of(shape, layout, **options):
    config = lora_jax.LoraConfig(rank=RANK, alpha=6, targets=("w",), layouts={"w": layout})
    frozen, start = lora_jax.split({"w": normal(0, *shape)}, config, jax.random.key(1), **options)
    return frozen, jax.tree.map(lambda leaf: leaf + 0.1, start)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("fn", [wide, transposed, rematerialised, scanned])
def test_an_adapted_function_is_the_merged_one(fn):
    turned = fn is transposed
    shape, layout = ((OUTS, INS), "out in") if turned else ((INS, OUTS), "in out")
    frozen, trainable = halves_of(shape, layout)
    x = normal(5, 2, ROWS, INS)
    adapted = lora_jax.adapt(fn, on_materialize="error")

    def through_adapt(trainable, x):
        return adapted(lora_jax.combine(frozen, trainable), x)

    def through_merge(trainable, x):
        return fn(lora_jax.merge(frozen, trainable), x)

    assert "_joined" in str(jax.make_jaxpr(through_adapt)(trainable, x))
    found, wanted = (
        (f(trainable, x), jax.grad(lambda *args, f=f: f(*args).sum(), (0, 1))(trainable, x))
        for f in (through_adapt, through_merge)
    )
    assert_trees_close(found, wanted, relative=1000 * ROUNDING)


@pytest.mark.usefixtures("here")
def test_a_weight_that_is_known_to_be_sharded_is_left_alone():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Explicit,))
    frozen, trainable = halves_of((INS, OUTS), "in out")
    x = normal(5, ROWS, INS)

    def through_adapt(trainable, frozen, x):
        return lora_jax.adapt(wide)(lora_jax.combine(frozen, trainable), x)

    wanted = through_adapt(trainable, frozen, x)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(frozen, NamedSharding(mesh, P(None, "fsdp")))
        x, trainable = jax.device_put((x, trainable), NamedSharding(mesh, P()))
        assert "_joined" not in str(jax.make_jaxpr(through_adapt)(trainable, sharded, x))
        found = jax.jit(through_adapt)(trainable, sharded, x)
    assert_trees_close(found, wanted, relative=100 * ROUNDING)


@pytest.mark.usefixtures("here")
def test_nothing_is_joined_where_gspmd_chooses():
    """There a weight may be sharded, and JAX does not say."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    frozen, trainable = halves_of((INS, OUTS), "in out")
    sharded = jax.device_put(frozen, NamedSharding(mesh, P("fsdp")))
    traced = []

    def through_adapt(trainable, frozen, x):
        def apply(*args):
            return lora_jax.adapt(wide)(lora_jax.combine(*args[:2]), args[2])

        traced.append(str(jax.make_jaxpr(apply)(frozen, trainable, x)))
        return apply(frozen, trainable, x)

    for given in (frozen, sharded):
        jax.jit(through_adapt)(trainable, given, normal(5, ROWS, INS))
    assert ["_joined" in text for text in traced] == [True, False]


@pytest.mark.usefixtures("here")
def test_a_batch_may_be_sharded():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    frozen, trainable = halves_of((INS, OUTS), "in out")
    x = normal(5, 8 * ROWS, INS)

    def through_adapt(trainable, frozen, x):
        return lora_jax.adapt(wide)(lora_jax.combine(frozen, trainable), x)

    wanted = through_adapt(trainable, frozen, x)
    with jax.set_mesh(mesh):
        frozen, trainable = jax.device_put((frozen, trainable), NamedSharding(mesh, P()))
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        assert "_joined" in str(jax.make_jaxpr(through_adapt)(trainable, frozen, x))
        found = jax.jit(through_adapt)(trainable, frozen, x)
    assert_trees_close(found, wanted, relative=100 * ROUNDING)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("rows", "joins"), [(ROWS, False), (8 * ROWS, True)])
def test_it_is_a_devices_rows_that_count(rows, joins):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    frozen, trainable = halves_of((INS, OUTS), "in out")
    assert pays(rows, INS, OUTS)

    def through_adapt(trainable, frozen, x):
        return lora_jax.adapt(wide)(lora_jax.combine(frozen, trainable), x)

    with jax.set_mesh(mesh):
        frozen, trainable = jax.device_put((frozen, trainable), NamedSharding(mesh, P()))
        x = jax.device_put(normal(5, rows, INS), NamedSharding(mesh, P("data")))
        assert ("_joined" in str(jax.make_jaxpr(through_adapt)(trainable, frozen, x))) == joins


@pytest.mark.usefixtures("here")
def test_an_input_without_a_gradient_costs_none():
    x, t, w, b = matrices((2, 0))
    gradient = jax.make_jaxpr(jax.grad(lambda t: joined(x, t, w, b, (2, 0)).sum()))(t)
    # `t` and `b` alone: a product with `w` would be as wide as `x`.
    assert f"f64[4,5,{INS + RANK}] = dot_general" not in str(gradient)
    assert f"f64[4,5,{RANK}] = dot_general" in str(gradient)
