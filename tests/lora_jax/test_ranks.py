"""Factors filled up with zeros: the same values, gradients and tangents as without."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import _joined, _ranks
from lora_jax.testing import assert_trees_close

ROWS, INS, OUTS = 64, 24, 200
ROUNDING = float(np.finfo(np.float64).eps) * (INS + _ranks.WIDTH)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


def plain(params, x):
    return jnp.tanh(x @ params["w"])


def turned(params, x):
    return jnp.einsum("...i,oi->...o", x, params["w"])


def by_heads(params, x):
    return jnp.einsum("...i,ihd->...hd", x, params["w"].reshape(INS, 8, -1))


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (x, x @ w), x, params["w"])[1]


FUNCTIONS = {
    plain: ((INS, OUTS), "in out"),
    turned: ((OUTS, INS), "out in"),
    by_heads: ((INS, OUTS), "in out"),
    scanned: ((3, INS, OUTS), "stack in out"),
}


def figures(fn, rank, dropout=0.0):
    """Outputs, tangents, gradients and the program of an adapted function."""
    shape, layout = FUNCTIONS[fn]
    config = lora_jax.LoraConfig(
        rank=rank, alpha=6, targets=("w",), layouts={"w": layout}, dropout=dropout
    )
    frozen, trainable = lora_jax.split({"w": normal(0, *shape)}, config, jax.random.key(1))
    trainable = jax.tree.map(lambda leaf: leaf + 0.1, trainable)
    x, key = normal(2, ROWS, INS), jax.random.key(3) if dropout else None

    def through(trainable, x):
        return lora_jax.adapt(fn)(lora_jax.combine(frozen, trainable, dropout_key=key), x)

    @jax.jit
    def derived(*given):
        value, tangent = jax.jvp(through, given, given)
        gradient = jax.grad(lambda *args: jnp.sin(through(*args)).sum(), (0, 1))(*given)
        return value, tangent, gradient

    return derived(trainable, x), str(jax.make_jaxpr(through)(trainable, x))


@pytest.mark.parametrize(
    ("fn", "joins", "rank"),
    [
        *((fn, False, 4) for fn in FUNCTIONS),
        (plain, True, 1),
        (turned, True, 4),
        (plain, False, 16),
        (plain, True, 20),
    ],
)
def test_it_changes_nothing_but_the_program(monkeypatch, fn, joins, rank):
    if joins:
        monkeypatch.setattr(_joined, "BACKENDS", (jax.default_backend(),))
    wanted, without = figures(fn, rank)
    assert ("_joined" in without) == joins
    monkeypatch.setattr(_ranks, "BACKENDS", (jax.default_backend(),))
    found, program = figures(fn, rank)
    assert_trees_close(found, wanted, relative=100 * ROUNDING)
    narrow = f"{INS},{_ranks.WIDTH}]"
    assert (narrow in program, program == without) == (rank <= 16, rank >= 16)


def test_dropout_is_the_same(monkeypatch):
    wanted, _ = figures(plain, 4, dropout=0.5)
    monkeypatch.setattr(_ranks, "BACKENDS", (jax.default_backend(),))
    assert_trees_close(figures(plain, 4, dropout=0.5)[0], wanted, relative=100 * ROUNDING)
