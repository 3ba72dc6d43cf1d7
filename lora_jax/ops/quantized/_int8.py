"""Int8: steps of one size, a scale for each output (arXiv 2208.07339, section 3).

    w = code * absmax[out] / 127

These are the weights of LLM.int8() as bitsandbytes keeps them, codes and row statistics alike.
Its inputs are not quantised here: products are of dequantised weights.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..._quantized import QuantizedWeight

_STEP = 7.874015718698502e-3  # 1 / 127 in float32, as bitsandbytes has it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Weight(QuantizedWeight):
    """A weight in int8. ``codes`` are int8 from -127 to 127, ``(*stack, out, in)``.

    Attributes:
        absmax: The largest magnitude among the weights of each output, float32 ``(*stack, out)``.
    """

    absmax: jax.Array

    @classmethod
    def encode(cls, matrix: jax.Array, **fields: Any) -> "Int8Weight":
        """Quantises one matrix.

        Args:
            matrix: float32 ``(out, in)``.
            **fields: The static fields of `QuantizedWeight`.
        """
        absmax = jnp.max(jnp.abs(matrix), axis=1)
        divisor = jnp.where(absmax == 0, 1.0, absmax)[:, None]
        # Not `127 / divisor`, which PyTorch computes like this too.
        codes = jnp.round(matrix * (127 * (1 / divisor))).astype(jnp.int8)
        return cls(codes=codes, absmax=absmax, **fields)

    def matrices(self, dtype: Any = jnp.float32) -> jax.Array:
        """The values, computed in float32 and rounded to ``dtype``: ``(*stack, out, in)``."""
        return (self.codes.astype(jnp.float32) * self.absmax[..., None] * _STEP).astype(dtype)
