"""Checks of what a model is called with, before anything compiles.

input_ids (B, T) of integers, T at most the model's positions; all else of the same shape
"""

import jax
import jax.numpy as jnp


def check_ids(input_ids: jax.Array) -> None:
    """Refuses what is not a batch of tokens.

    Raises:
        ValueError: It has not two axes, or is not of integers.
    """
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise ValueError(
            "`input_ids` must be integers of shape (batch, length), got "
            f"{input_ids.dtype}{input_ids.shape}."
        )


def check_length(input_ids: jax.Array, max_length: int) -> None:
    """Refuses rows of more tokens than the model has positions for.

    Raises:
        ValueError: They are longer than ``max_length``.
    """
    if input_ids.shape[1] > max_length:
        raise ValueError(
            f"`input_ids` are {input_ids.shape[1]} tokens long and the model has positions for "
            f"{max_length}: truncate to that."
        )


def check_shapes(input_ids: jax.Array, **others: jax.Array | None) -> None:
    """Refuses what does not say one thing of each token; None says nothing.

    Raises:
        ValueError: Another input, named by its keyword, is not of the shape of ``input_ids``.
    """
    for name, other in others.items():
        if other is not None and other.shape != input_ids.shape:
            raise ValueError(
                f"`{name}` must have the shape of `input_ids`, {input_ids.shape}, "
                f"got {other.shape}."
            )
