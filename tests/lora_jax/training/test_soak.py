"""Twenty thousand steps: one program, and no memory that grows."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import training

STEPS, SETTLED = 20_000, 4_000
GROWTH = 4 * 2**20  # bytes: a leak of one float32 state a step would be 16 times this


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells of memory on Linux alone")
def test_memory_is_flat_and_nothing_compiles_again():
    config = lora_jax.LoraConfig(rank=4, alpha=8.0, targets=("w",), dropout=0.1)
    params = {"w": jax.random.normal(jax.random.key(0), (64, 32))}
    frozen, trainable = lora_jax.split(params, config, jax.random.key(1))
    adapted = lora_jax.adapt(lambda params, x: x @ params["w"], on_materialize="error")

    def loss_fn(trainable, frozen, batch, keys):
        weights = lora_jax.combine(frozen, trainable, dropout_key=keys.lora)
        return jnp.mean((adapted(weights, batch["x"]) - batch["y"]) ** 2)

    tx = optax.adamw(1e-3)
    mesh = training.make_mesh(devices=jax.devices()[:1])
    step = training.make_train_step(loss_fn, tx, mesh)
    state = training.init_state(trainable, tx, jax.random.key(2))
    state, frozen = training.replicate((state, frozen), mesh)
    source = np.random.default_rng(0)
    compiled, before = [], 0

    def count(event: str, seconds: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(count)
    for number in range(STEPS):
        batch = {"x": source.normal(size=(4, 64)), "y": source.normal(size=(4, 32))}
        batch = training.shard_batch(jax.tree.map(np.float32, batch), mesh)
        state, metrics = step(state, frozen, batch)
        if number % 1000 == 0:
            float(metrics["loss"])
        if number == SETTLED:
            before, programs = resident(), len(compiled)
    assert int(state.step) == STEPS
    assert resident() - before < GROWTH
    assert programs > 0
    assert len(compiled) == programs
    assert step._cache_size() == 1
