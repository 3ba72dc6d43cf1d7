"""The loss that is trained on: mean cross-entropy through the adapted model.

A decoder's logits exist a chunk of tokens at a time, and their gradient is formed with them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import lora_jax
from lora_jax import models, ops
from train.losses import cross_entropy, next_tokens

Loss = Callable[..., jax.Array]
_lift = functools.partial(lora_jax.adapt, on_materialize="error")


def make_loss(model: models.Pretrained, chunk: int) -> Loss:
    """``(trainable, frozen, batch, keys) -> ()``.

    Args:
        model: A decoder, or an encoder with a classifier.
        chunk: Tokens of the batch whose logits exist at a time; 0 is all.
    """
    loss_of = _of_decoder(model, chunk) if model.task == "causal-lm" else _of_classifier(model)

    def loss(trainable: Any, frozen: Any, batch: Any, keys: Any = None) -> jax.Array:
        return loss_of(lora_jax.combine(frozen, trainable), batch)

    return loss


def _of_decoder(model: models.Pretrained, chunk: int) -> Loss:
    hidden_of, logits_of = _lift(model.hidden), _lift(model.logits)

    def loss(params: Any, batch: Any) -> jax.Array:
        ids = batch["input_ids"]
        hidden = hidden_of(params, ids)
        narrow = functools.partial(logits_of, dtype=hidden.dtype)
        logits = ops.with_gradient_of(logits_of, narrow)

        def of_chunk(head: Any, rows: Any) -> tuple[jax.Array, jax.Array]:
            hidden, targets, weights = rows
            losses = cross_entropy(logits(head, hidden), targets)
            return (losses * weights).sum(), weights.sum()

        marks = {"input_ids": ids, "loss_mask": jnp.ones_like(ids)}
        rows = (hidden, *next_tokens(marks))
        positions = max(1, chunk // len(ids)) if chunk else ids.shape[1]
        total, count = ops.sum_in_chunks(of_chunk, model.head(params), rows, chunk=positions)
        return total / count

    return loss


def _of_classifier(model: models.Pretrained) -> Loss:
    apply = _lift(model.apply)

    def loss(params: Any, batch: Any) -> jax.Array:
        return cross_entropy(apply(params, batch["input_ids"]), batch["labels"]).mean()

    return loss
