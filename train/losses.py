"""The cross-entropy of both tasks, with label smoothing.

    loss = (1 - e) * -log p(target)  +  e * mean over all classes of -log p

as the code of the paper has it for GPT-2 (microsoft/LoRA, examples/NLG). Szegedy et al.,
arXiv 1512.00567, section 7, with the uniform distribution.
"""

from typing import Any

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """The loss of each prediction, in nats.

    Args:
        logits: ``(..., classes)``; computed in float32, or in float64 if they are.
        targets: ``(...)`` integers.
        smoothing: ``e``, in ``[0, 1)``.

    Returns:
        ``(...)``, of the dtype of the computation.
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    normaliser = log_normaliser(logits)
    classes = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    # A sum that picks one term needs no scatter of the logits' size in the backward pass.
    chosen = jnp.where(classes == targets[..., None], logits, 0).sum(axis=-1)
    if not smoothing:
        return normaliser - chosen
    # -log p is normaliser - logit, for the target as for the mean over classes.
    return normaliser - (1 - smoothing) * chosen - smoothing * logits.mean(axis=-1)


@jax.custom_jvp
def log_normaliser(logits: jax.Array) -> jax.Array:
    """``log(sum(exp(logits)))`` over the last axis.

    Its derivative, ``exp(logits - result)``, is computed from the logits, which are there anyway;
    the derivative of its parts would keep the exponentials as well, another array of that size.
    """
    return jax.nn.logsumexp(logits, axis=-1)


@log_normaliser.defjvp
def _log_normaliser_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
    (logits,), (tangent,) = primals, tangents
    value = log_normaliser(logits)
    return value, (jnp.exp(logits - value[..., None]) * tangent).sum(axis=-1)


def mean(total: jax.Array, weight: jax.Array) -> jax.Array:
    """A loss from its sum and what it is divided by; 0 where nothing counts."""
    return total / jnp.where(weight == 0, 1, weight)


def next_tokens(batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """What each position of a batch predicts, and whether that is learned.

    The shift by one is here: position ``t`` predicts token ``t + 1``, whose own mark counts. The
    last position predicts nothing.

    Args:
        batch: ``input_ids`` and ``loss_mask``, ``(B, T)``; the mask is 1 for learned tokens.

    Returns:
        Targets ``(B, T)`` int32 and weights ``(B, T)`` float32.

    >>> batch = {"input_ids": jnp.array([[5, 6, 7]]), "loss_mask": jnp.array([[0, 0, 1]])}
    >>> [array.tolist() for array in next_tokens(batch)]
    [[[6, 7, 0]], [[0.0, 1.0, 0.0]]]
    """
    targets, marks = (
        jnp.pad(batch[name][:, 1:], ((0, 0), (0, 1))) for name in ("input_ids", "loss_mask")
    )
    return targets, marks.astype(jnp.float32)
