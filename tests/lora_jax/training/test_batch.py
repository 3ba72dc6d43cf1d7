"""Batches: their size from either number, filled up so that every example counts once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import training


@pytest.mark.parametrize(
    ("axes", "given", "size"),
    [
        pytest.param({}, {"total": 32}, 32, id="total"),
        pytest.param({}, {"per_device": 4}, 32, id="each"),
        pytest.param({}, {"per_device": 2, "accumulate": 3}, 48, id="each-of-three-passes"),
        pytest.param({"tensor": 2, "fsdp": 2}, {"per_device": 3}, 12, id="tensor-shares-rows"),
        pytest.param({}, {"total": 48, "per_device": 2, "accumulate": 3}, 48, id="both"),
    ],
)
def test_size_from_either_number(axes, given, size):
    assert training.batch_size(training.make_mesh(**axes), **given) == size


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "Give a batch size"),
        ({"total": 0}, "`total` must be at least 1, got 0"),
        ({"per_device": -1}, "`per_device` must be at least 1, got -1"),
        ({"total": 12}, r"12 examples does not divide over 8 devices\. .* is 16\."),
        ({"total": 24, "accumulate": 2}, r"8 devices, 2 times each\. .* is 32\."),
        (
            {"total": 32, "per_device": 8, "accumulate": 2},
            r"are 2 for each of 8 devices in each of 2 passes, not 8: 8 each would be 128",
        ),
    ],
)
def test_sizes_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        training.batch_size(training.make_mesh(), **given)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_every_example_counts_once_on_every_number_of_devices(devices):
    rows = {"x": np.arange(13, dtype=np.float32), "label": np.arange(13) % 3}
    mesh = training.make_mesh(devices=jax.devices()[:devices])

    def outputs(trainable, frozen, batch):
        return (batch["x"] * trainable["w"], batch["label"] == 0)

    step = training.make_eval_step(outputs, mesh)
    batch, weights = training.pad_batch(rows, mesh)
    assert len(weights) % devices == 0
    assert len(weights) - 13 < devices
    halves = training.replicate(({"w": jnp.float32(2)}, {}), mesh)
    values, hits = jax.device_get(step(*halves, training.shard_batch(batch, mesh)))
    assert (values * weights).sum() == 2 * sum(range(13))
    assert (hits * weights).sum() == 5
    np.testing.assert_array_equal(training.own_rows(len(weights), mesh), np.arange(len(weights)))
