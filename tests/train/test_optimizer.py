"""The optimizer: the schedule's shape, and what decays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoraFactors
from train import optimizer
from train.config import TrainingSection


def rates(steps, **settings):
    section = TrainingSection(learning_rate=1.0, **settings)
    schedule = optimizer.learning_rate_schedule(section, steps)
    return [np.asarray(schedule(step)).item() for step in range(steps)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param(
            {"schedule": "linear", "warmup": 2.0},
            [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25],
            id="linear-warmup-in-steps",
        ),
        pytest.param(
            {"schedule": "linear", "warmup": 0.34},
            [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25],
            id="linear-warmup-as-a-share",
        ),
        pytest.param(
            {"schedule": "linear", "warmup": 0.0},
            [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
            id="linear-without-warmup",
        ),
        pytest.param(
            {"schedule": "cosine", "warmup": 2.0},
            [1 / 3, 2 / 3, *(0.5 + 0.5 * np.cos(np.pi * np.arange(4) / 4))],
            id="cosine",
        ),
        pytest.param(
            {"schedule": "constant", "warmup": 2.0}, [1 / 3, 2 / 3, 1, 1, 1, 1], id="constant"
        ),
    ],
)
def test_schedules(settings, expected):
    np.testing.assert_allclose(rates(6, **settings), expected, rtol=1e-6)


def test_biases_and_norms_do_not_decay():
    factors = LoraFactors(jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0, ("in", "out"))
    decays = optimizer.decay_mask(
        {
            "encoder/layers/0/attention/query/kernel": factors,
            "encoder/layers/0/attention/query/bias": jnp.ones(2),
            "encoder/layers/0/attention/norm/scale": jnp.ones(2),
            "embeddings/LayerNorm/weight": jnp.ones(2),
            "classifier/kernel": jnp.ones((2, 2)),
        }
    )
    assert [jax.tree.leaves(marks) for marks in decays.values()] == [
        [True, True],
        [False],
        [False],
        [False],
        [True],
    ]


def test_weight_decay_alone_shrinks_only_what_decays():
    section = TrainingSection(weight_decay=0.5, learning_rate=0.1, warmup=0.0, schedule="constant")
    tx = optimizer.make_optimizer(section, 10)
    weights = {"head/kernel": jnp.ones((2, 2)), "head/bias": jnp.ones(2)}
    updates: Any = tx.update(jax.tree.map(jnp.zeros_like, weights), tx.init(weights), weights)[0]
    np.testing.assert_allclose(updates["head/kernel"], -0.05 * np.ones((2, 2)), rtol=1e-6)
    np.testing.assert_array_equal(updates["head/bias"], np.zeros(2))


@pytest.mark.parametrize("clip", [1.0, None])
def test_clipping_bounds_the_gradient_that_adam_sees(clip):
    tx = optimizer.make_optimizer(TrainingSection(clip_norm=clip), 10)
    weights = {"head/kernel": jnp.zeros(4)}
    _, state = tx.update({"head/kernel": jnp.full(4, 50.0)}, tx.init(weights), weights)
    first = next(leaf for leaf in jax.tree.leaves(state) if leaf.ndim)  # (1 - 0.9) * gradient
    np.testing.assert_allclose(first, 0.1 * (0.5 if clip else 50.0) * np.ones(4), rtol=1e-6)
