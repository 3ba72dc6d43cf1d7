"""Checkpoints: saving and restoring is the identity, and the latest and the best stay."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax import training
from lora_jax.io import checkpoints


def state_of(seed, width=3):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    key = jax.random.key(seed)
    trainable = {
        "head/kernel": jax.random.normal(key, (4, width)),
        "norm/scale": jnp.ones(width, jnp.bfloat16),
    }
    return training.init_state(trainable, tx, key)


def equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("devices", [1, 8])
def test_restore_is_the_identity_in_a_new_process_of_the_manager(tmp_path, devices):
    mesh = training.make_mesh(devices=jax.devices()[:devices])
    state = training.replicate(state_of(5), mesh)
    manager = checkpoints.open_checkpoints(tmp_path)
    checkpoints.save(manager, 3, state, notes={"position": 96}, score=0.5)
    manager.close()
    manager = checkpoints.open_checkpoints(tmp_path)
    restored = checkpoints.restore(manager, training.replicate(state_of(6), mesh))
    equal(restored.state, state)
    assert (restored.step, restored.notes) == (3, {"position": 96})
    for leaf in jax.tree.leaves(restored.state.trainable):
        assert leaf.sharding.device_set == set(mesh.devices.flat)


@pytest.mark.parametrize(
    ("keep", "best", "scores", "kept", "best_step"),
    [
        pytest.param(1, "max", [0.1, 0.9, 0.5, 0.4], [2, 4], 2, id="highest"),
        pytest.param(1, "min", [0.1, 0.9, 0.5, 0.4], [1, 4], 1, id="lowest"),
        pytest.param(2, "max", [0.1, 0.2, 0.3, 0.4], [3, 4], 4, id="best-among-the-latest"),
        pytest.param(1, "max", [0.1, 0.3, 0.2, None], [2, 4], 2, id="one-without-a-score"),
        pytest.param(1, "max", [None, 0.1, None, None], [2, 4], 2, id="most-without-a-score"),
        pytest.param(1, "max", [0.1, math.nan, 0.0, 0.0], [1, 4], 1, id="not-a-number"),
        pytest.param(1, "max", [0.1, 0.3, 0.3, 0.1], [3, 4], 3, id="the-later-of-two"),
    ],
)
def test_latest_and_best_are_kept(tmp_path, keep, best, scores, kept, best_step):
    manager = checkpoints.open_checkpoints(tmp_path, keep=keep, best=best)
    for step, score in enumerate(scores, start=1):
        checkpoints.save(manager, step, state_of(step), score=score)
    manager.close()
    manager = checkpoints.open_checkpoints(tmp_path, keep=keep, best=best)
    assert manager.all_steps() == kept
    assert manager.best_step() == best_step
    equal(checkpoints.restore(manager, state_of(0), best_step).state, state_of(best_step))


@pytest.mark.parametrize(
    ("width", "step", "message"),
    [
        pytest.param(3, 7, r"has no checkpoint 7\. It has \[2\]", id="no-such-step"),
        pytest.param(
            5, 2, r"another state:\n.*mu/head/kernel: stored \(\(4, 3\)", id="another-shape"
        ),
    ],
)
def test_restore_refuses(tmp_path, width, step, message):
    manager = checkpoints.open_checkpoints(tmp_path)
    checkpoints.save(manager, 2, state_of(0))
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(manager, state_of(0, width), step)


def test_restore_names_missing_and_extra_arrays(tmp_path):
    manager = checkpoints.open_checkpoints(tmp_path)
    checkpoints.save(manager, 2, {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"a: stored .* asked for nothing\n  b: stored nothing"):
        checkpoints.restore(manager, {"b": jnp.ones(2)})


def test_an_empty_directory_has_none(tmp_path):
    manager = checkpoints.open_checkpoints(tmp_path / "new")
    with pytest.raises(ValueError, match=r"has no checkpoint\. It has none"):
        checkpoints.restore(manager, state_of(0))


def test_a_step_is_saved_once(tmp_path):
    manager = checkpoints.open_checkpoints(tmp_path)
    checkpoints.save(manager, 2, state_of(0))
    with pytest.raises(ValueError, match="Step 2 is saved already"):
        checkpoints.save(manager, 2, state_of(1))


def test_steps_are_saved_in_order(tmp_path):
    manager = checkpoints.open_checkpoints(tmp_path)
    checkpoints.save(manager, 2, state_of(0))
    with pytest.raises(ValueError, match="Step 1 is older than step 2"):
        checkpoints.save(manager, 1, state_of(1))


def test_without_scores_the_latest_alone_are_kept(tmp_path):
    manager = checkpoints.open_checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(manager, step, state_of(step))
    assert (manager.all_steps(), manager.best_step()) == ([3, 4], None)
