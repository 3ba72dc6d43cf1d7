"""Fp8: a float of four exponent and three mantissa bits, a scale for each output.

    w = code * scale[out]        scale[out] = absmax[out] / 448

448 is the largest float8_e4m3fn (arXiv 2209.05433, section 3).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..._quantized import QuantizedWeight

LARGEST = 448.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fp8Weight(QuantizedWeight):
    """A weight in fp8. ``codes`` are float8_e4m3fn, ``(*stack, out, in)``.

    Attributes:
        scale: What the codes of each output are multiplied by, float32 ``(*stack, out)``.
    """

    scale: jax.Array

    @classmethod
    def encode(cls, matrix: jax.Array, **fields: Any) -> "Fp8Weight":
        """Quantises one matrix.

        Args:
            matrix: float32 ``(out, in)``.
            **fields: The static fields of `QuantizedWeight`.
        """
        scale = jnp.max(jnp.abs(matrix), axis=1) / LARGEST
        divisor = jnp.where(scale == 0, 1.0, scale)[:, None]
        return cls(codes=(matrix / divisor).astype(jnp.float8_e4m3fn), scale=scale, **fields)

    def matrices(self, dtype: Any = jnp.float32) -> jax.Array:
        """The values, computed in float32 and rounded to ``dtype``: ``(*stack, out, in)``."""
        return (self.codes.astype(jnp.float32) * self.scale[..., None]).astype(dtype)
