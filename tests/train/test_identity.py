"""A base model is known by its weights: whatever changes in them changes the fingerprint."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from train.identity import fingerprint_of_weights


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda w: -w, id="all-signs"),
        pytest.param(lambda w: w.at[3, 1].add(1), id="one-entry"),
        pytest.param(lambda w: w[::-1], id="order"),
        pytest.param(lambda w: w.T, id="shape"),
        pytest.param(lambda w: w.at[0].multiply(-1).at[1].multiply(-1), id="two-rows"),
    ],
)
def test_every_change_shows(dtype, change):
    w = (4 * jax.random.normal(jax.random.key(0), (8, 6))).astype(dtype)
    params = {"layer": {"kernel": w, "bias": jnp.ones(6)}}
    same = fingerprint_of_weights(jax.tree.map(jnp.array, params))
    assert fingerprint_of_weights(params) == same
    assert (
        fingerprint_of_weights({**params, "layer": {**params["layer"], "kernel": change(w)}})
        != same
    )


def test_codes_are_known_too():
    params = {"w": jax.random.normal(jax.random.key(0), (64, 32))}
    one, other = (lora_jax.quantize(params, scheme) for scheme in ("nf4", "int8"))
    assert len({fingerprint_of_weights(tree) for tree in (params, one, other)}) == 3
