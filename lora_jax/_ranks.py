"""Factors of few columns, filled up with zeros to as many as a GPU multiplies fast.

    (x @ a) @ b   ==   (x @ [a 0]) @ [b; 0]

Products of fewer columns than 16 run in slower kernels: a step of a Llama of 1B takes 239 ms with
rank 4 on an H200, and 203 ms so (benchmarks/NOTES.md). The zeros exist inside the step alone.
An entry of x that is infinite gives NaN there, where without it might give an infinity.
"""

import jax
import jax.numpy as jnp

BACKENDS = ("gpu",)
WIDTH = 16


def filled(factor: jax.Array) -> jax.Array:
    """The factor with at least `WIDTH` columns, where that is faster.

    Args:
        factor: ``(..., rank)``.
    """
    missing = WIDTH - factor.shape[-1]
    if missing <= 0 or jax.default_backend() not in BACKENDS:
        return factor
    return jnp.pad(factor, [(0, 0)] * (factor.ndim - 1) + [(0, missing)])
