"""The loss of a batch and its gradient, from batches that it is taken apart into.

loss = sum_i sum_i(batch_i) / sum_i weight_i        gradient likewise, summed in float32
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class StepKeys(NamedTuple):
    """The randomness of one step: a key for LoRA dropout and one for the model's own."""

    lora: jax.Array
    model: jax.Array


Loss = jax.Array | tuple[jax.Array, jax.Array]
LossFn = Callable[[Any, Any, Any, StepKeys], Loss]
"""``(trainable, frozen, batch, keys)`` -> the mean over the batch, or its sum and weight."""


def mean_gradient(
    loss_fn: LossFn, trainable: Any, frozen: Any, batch: Any, keys: StepKeys, parts: int
) -> tuple[jax.Array, Any]:
    """The loss, ``()`` float32, and its gradient, of the trainable leaves' dtypes.

    Args:
        loss_fn: The loss of a batch.
        trainable: What is differentiated.
        frozen: What is not.
        batch: A tree of arrays ``(examples, ...)``; ``parts`` divides the examples.
        keys: Of the step.
        parts: How many batches it is taken apart into.
    """
    return mean(*summed_gradient(loss_fn, trainable, frozen, batch, keys, parts), trainable)


def mean(total: jax.Array, weight: jax.Array, grads: Any, trainable: Any) -> tuple[jax.Array, Any]:
    """Loss and gradient from their sums; 0 of a batch in which nothing counts."""
    weight = jnp.where(weight == 0, 1, weight)
    grads = jax.tree.map(lambda g, leaf: (g / weight).astype(leaf.dtype), grads, trainable)
    return total / weight, grads


def summed_gradient(
    loss_fn: LossFn, trainable: Any, frozen: Any, batch: Any, keys: StepKeys, parts: int
) -> tuple[jax.Array, jax.Array, Any]:
    """The sum of the losses, their weight, and the gradient of the sum, at least float32.

    What is differentiated is a mean, of a size that float16 holds; it is multiplied by its weight
    again in float32.
    """

    def value(trainable: Any, batch: Any, keys: StepKeys) -> tuple[jax.Array, Any]:
        loss = loss_fn(trainable, frozen, batch, keys)
        total, weight = map(jnp.asarray, loss if isinstance(loss, tuple) else (loss, 1.0))
        total, weight = total.astype(_wide(total)), weight.astype(jnp.float32)
        return total / jnp.where(weight == 0, 1, weight), (total, weight)

    def gradient(trainable: Any, batch: Any, keys: StepKeys) -> tuple[jax.Array, jax.Array, Any]:
        grads, (total, weight) = jax.grad(value, has_aux=True)(trainable, batch, keys)
        return total, weight, jax.tree.map(lambda g: weight * g.astype(_wide(g)), grads)

    if parts == 1:
        return gradient(trainable, batch, keys)

    # Neighbours go into different parts, so that what a device has of the batch stays there.
    rows = jax.tree.map(lambda leaf: leaf.reshape((-1, parts, *leaf.shape[1:])), batch)

    def add(sums: Any, part: jax.Array) -> tuple[Any, None]:
        some = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, part, 1, False), rows)
        own = jax.tree.map(lambda key: jax.random.fold_in(key, part), keys)
        found = gradient(trainable, some, own)
        return jax.tree.map(lambda s, t: s + t.astype(s.dtype), sums, found), None

    zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, _wide(leaf)), trainable)
    begin = (jnp.float32(0), jnp.float32(0), zeros)
    sums, _ = lax.scan(add, begin, jnp.arange(parts, dtype=jnp.int32))
    return sums


def _wide(leaf: jax.Array) -> Any:
    return jnp.promote_types(leaf.dtype, jnp.float32)
