"""One real LoRA training step, on a model small enough for any machine."""

import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from .._config import LoraConfig
from .._interpret import adapt
from .._partition import combine, split

WIDTH, CLASSES, BATCH, STEPS = 256, 4, 32, 5


class Step(NamedTuple):
    """What the steps showed.

    Attributes:
        losses: Loss before each step, and after the last.
        seconds: Time of one step, compiled.
        compile_seconds: Time until the first step was done.
        trained: Parameters that trained.
        total: Parameters of the model.
    """

    losses: list[float]
    seconds: float
    compile_seconds: float
    trained: int
    total: int


def training_step() -> Step:
    """Trains a two-layer model with LoRA for a few steps on random data.

    Raises:
        ArithmeticError: The loss is not finite, or did not fall.
    """
    model = nn.Sequential([nn.Dense(WIDTH), nn.tanh, nn.Dense(CLASSES)])
    x = jax.random.normal(jax.random.key(0), (BATCH, WIDTH))
    labels = jnp.arange(BATCH) % CLASSES
    params = model.init(jax.random.key(1), x)
    config = LoraConfig(rank=8, alpha=16, targets=("layers_0",), train=("layers_2/.*",))
    frozen, trainable = split(params, config, jax.random.key(2))
    optimizer = optax.adamw(1e-2)
    apply = adapt(model.apply, on_materialize="error")

    def loss_of(trainable: Any) -> jax.Array:
        logits: Any = apply(combine(frozen, trainable), x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(trainable: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(loss_of)(trainable)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, loss

    start = time.perf_counter()
    state = optimizer.init(trainable)
    trainable, state, loss = step(trainable, state)
    losses = [float(loss)]
    compiled = time.perf_counter()
    for _ in range(STEPS):
        trainable, state, loss = step(trainable, state)
        losses.append(float(loss))
    done = time.perf_counter()
    if not np.isfinite(losses).all() or losses[-1] >= losses[0]:
        raise ArithmeticError(f"the loss did not fall: {losses}")
    return Step(
        losses, (done - compiled) / STEPS, compiled - start, _size(trainable), _size(params)
    )


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
