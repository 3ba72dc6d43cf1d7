"""Steps: one device equals eight, only the trainable half moves, and keys follow the step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import training

CONFIG = lora_jax.LoraConfig(
    rank=2, alpha=4.0, targets=("hidden",), train=("head", "bias"), dropout=0.5
)


def apply(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return hidden @ params["head"]["kernel"]


ADAPTED = lora_jax.adapt(apply, on_materialize="error")


def loss_fn(trainable, frozen, batch, keys):
    params = lora_jax.combine(frozen, trainable, dropout_key=keys.lora)
    noise = jax.random.normal(keys.model, (2,))
    outputs = ADAPTED(params, batch["x"]) + 0.1 * noise[None]
    return jnp.mean((outputs - batch["y"]) ** 2)


@pytest.fixture
def start():
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "hidden": {"kernel": jax.random.normal(keys[0], (6, 4)), "bias": jnp.zeros(4)},
        "head": {"kernel": jax.random.normal(keys[1], (4, 2))},
    }
    frozen, trainable = lora_jax.split(params, CONFIG, keys[2])
    batch = {
        "x": np.asarray(jax.random.normal(keys[3], (16, 6))),
        "y": np.asarray(jax.random.normal(keys[4], (16, 2))),
    }
    tx = optax.adamw(1e-2)
    return frozen, trainable, batch, tx


def train(start, devices, steps=3):
    frozen, trainable, batch, tx = start
    state = training.init_state(trainable, tx, jax.random.key(7))
    mesh = training.make_mesh(devices=jax.devices()[:devices])
    step = training.make_train_step(loss_fn, tx, mesh)
    state, frozen = training.replicate((state, frozen), mesh)
    losses = []
    for _ in range(steps):
        state, metrics = step(state, frozen, training.shard_batch(batch, mesh))
        losses.append(float(metrics["loss"]))
    return state, losses


def test_one_device_equals_eight(start):
    one, losses_one = train(start, 1)
    eight, losses_eight = train(start, 8)
    np.testing.assert_allclose(losses_one, losses_eight, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        one.trainable,
        eight.trainable,
    )
    leaf = eight.trainable["hidden/kernel"].a
    assert leaf.sharding.is_fully_replicated
    assert len(leaf.sharding.device_set) == 8


def test_a_step_moves_everything_that_trains_and_takes_no_optimizer_state_for_the_rest(start):
    frozen, before, _, _ = start
    after, _ = train(start, 8, steps=2)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after.trainable)
    assert all(jax.tree.leaves(moved))
    assert int(after.step) == 2
    count = sum(leaf.size for leaf in jax.tree.leaves(after.trainable))
    moments = [leaf for leaf in jax.tree.leaves(after.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * count
    assert frozen["head"]["kernel"] is None


def test_the_state_that_goes_in_is_consumed_and_the_frozen_half_is_not(start):
    frozen, trainable, batch, tx = start
    state = training.init_state(trainable, tx, jax.random.key(7))
    mesh = training.make_mesh()
    step = training.make_train_step(loss_fn, tx, mesh)
    state, frozen = training.replicate((state, frozen), mesh)
    step(state, frozen, training.shard_batch(batch, mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.trainable))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))


def test_init_state_leaves_the_weights_it_was_given(start):
    frozen, _, batch, tx = start
    weight = jnp.ones((4, 2))
    state = training.init_state({"head/kernel": weight}, tx, jax.random.key(0))
    mesh = training.make_mesh(devices=jax.devices()[:1])

    def loss(trainable, frozen, batch, keys):
        return jnp.mean((batch["x"][:, :4] @ trainable["head/kernel"]) ** 2)

    training.make_train_step(loss, tx, mesh)(state, frozen, batch)
    assert state.trainable["head/kernel"].is_deleted()
    assert not weight.is_deleted()


def test_step_keys_differ_between_steps_and_uses_and_depend_on_nothing_else():
    key = jax.random.key(3)
    rows = [jax.random.key_data(k) for step in range(5) for k in training.step_keys(key, step)]
    assert len({tuple(row.tolist()) for row in rows}) == 10
    again = training.step_keys(key, jnp.int32(4))
    np.testing.assert_array_equal(jax.random.key_data(again.model), rows[-1])


@pytest.mark.parametrize(
    ("call", "size", "nearest"),
    [
        pytest.param("shard", 12, 16, id="shard-batch"),
        pytest.param("train", 12, 16, id="train-step"),
        pytest.param("eval", 3, 8, id="eval-step"),
    ],
)
def test_a_batch_must_divide_over_the_devices(start, call, size, nearest):
    frozen, trainable, batch, tx = start
    state = training.init_state(trainable, tx, jax.random.key(7))
    mesh = training.make_mesh()
    batch = {name: array[:size] for name, array in batch.items()}
    calls = {
        "shard": lambda: training.shard_batch(batch, mesh),
        "train": lambda: training.make_train_step(loss_fn, tx, mesh)(state, frozen, batch),
        "eval": lambda: training.make_eval_step(lambda *_: 0, mesh)(state.trainable, frozen, batch),
    }
    message = rf"batch of {size} examples .* over 8 devices.*that does is {nearest}\."
    with pytest.raises(ValueError, match=message):
        calls[call]()


def test_eval_outputs_stand_whole_on_every_device(start):
    frozen, trainable, batch, _ = start
    mesh = training.make_mesh()

    def outputs(trainable, frozen, batch):
        return ADAPTED(lora_jax.combine(frozen, trainable), batch["x"])

    step = training.make_eval_step(outputs, mesh)
    result = step(*training.replicate((trainable, frozen), mesh), batch)
    assert result.sharding.is_fully_replicated
    plain = apply(lora_jax.merge(frozen, trainable), batch["x"])
    np.testing.assert_allclose(result, plain, rtol=1e-5, atol=1e-6)
