"""NF4: four bits an entry, a scale for each block (arXiv 2305.14314, section 3).

    w = NF4[code] * absmax[block]        absmax[block] = DYNAMIC_MAP[code] * scale[group] + offset

The second equation is double quantisation: 8 bits for a block's absmax, and float32 for every 256
blocks. At 64 entries a block that makes 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits an entry.

Blocks run through the ``(out, in)`` matrix row by row, as in bitsandbytes, whose codes these are:
two a byte, the first one in the high half.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..._quantized import QuantizedWeight
from ._tables import DYNAMIC_BOUNDS, DYNAMIC_MAP, NF4, midpoints

GROUP = 256  # blocks that share a float32, as in bitsandbytes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Nf4Weight(QuantizedWeight):
    """A weight in NF4. ``codes`` are uint8, ``(*stack, ceil(out * in / 2))``.

    Attributes:
        absmax: ``(*stack, blocks)``: the largest magnitude in each block, float32, or its code in
            the dynamic map, uint8. The last block may be shorter than the others.
        scale: None, or with double quantisation float32 ``(*stack, ceil(blocks / 256))``.
        offset: None, or with double quantisation the mean absmax, float32 ``(*stack,)``.
        block: Entries a block, static.
    """

    axes: ClassVar[int] = 1

    absmax: jax.Array
    scale: jax.Array | None
    offset: jax.Array | None
    block: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def encode(cls, matrix: jax.Array, *, block: int, double: bool, **fields: Any) -> "Nf4Weight":
        """Quantises one matrix.

        Args:
            matrix: float32 ``(out, in)``.
            block: Entries a block, even.
            double: Whether each absmax gets 8 bits in place of 32.
            **fields: The static fields of `QuantizedWeight`.
        """
        codes, absmax = encode_blocks(matrix.reshape(-1), block)
        scale = offset = None
        if double:
            offset = mean(absmax)
            absmax, scale = encode_absmax(absmax, offset)
        return cls(codes=codes, absmax=absmax, scale=scale, offset=offset, block=block, **fields)

    def matrices(self, dtype: Any = jnp.float32) -> jax.Array:
        """The values, computed in float32 and rounded to ``dtype``: ``(*stack, out, in)``."""
        absmax = self.absmax
        if self.scale is not None and self.offset is not None:
            absmax = decode_absmax(absmax, self.scale, self.offset)
        kinds = [kind for kind in self.layout if kind != "stack"]
        n_out, n_in = (
            math.prod(n for n, kind in zip(self.sizes, kinds, strict=True) if kind == wanted)
            for wanted in ("out", "in")
        )
        values = decode_blocks(self.codes, absmax, self.block, dtype)
        return values[..., : n_out * n_in].reshape((*self.stack, n_out, n_in))


def encode_blocks(flat: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """The codes of float32 ``(n,)``, two a byte, and the absmax of each block."""
    blocks = _rows(flat, block)
    absmax = jnp.max(jnp.abs(blocks), axis=1)
    divisor = jnp.where(absmax == 0, 1.0, absmax)[:, None]
    scaled = (blocks * (1 / divisor)).reshape(-1)[: flat.size]
    if rest := flat.size % block:
        # bitsandbytes multiplies by the reciprocal, but divides in a block that is not full.
        scaled = jnp.concatenate([scaled[:-rest], flat[-rest:] / divisor[-1]])
    pairs = _rows(scaled, 2)
    codes = jnp.zeros(pairs.shape, jnp.uint8)
    for bound in midpoints(NF4):
        codes += (pairs > bound).astype(jnp.uint8)
    return codes[:, 0] << 4 | codes[:, 1], absmax


def decode_blocks(
    codes: jax.Array, absmax: jax.Array, block: int, dtype: Any = jnp.float32
) -> jax.Array:
    """The values, ``(*stack, blocks * block)``, zeros after the last one.

    Elementwise but for look-ups in 16 values, so it fuses into what reads it.

    Args:
        codes: uint8 ``(*stack, bytes)``.
        absmax: float32 ``(*stack, blocks)``.
        block: Entries a block.
        dtype: What the values, products in float32, are rounded to.
    """
    *stack, blocks = absmax.shape
    missing = blocks * block // 2 - codes.shape[-1]
    codes = jnp.pad(codes, [(0, 0)] * len(stack) + [(0, missing)])
    rows = codes.reshape((*stack, blocks, block // 2))
    halves = (_look_up(NF4, half) * absmax[..., None] for half in (rows >> 4, rows & 15))
    return _interleaved(*(half.astype(dtype) for half in halves)).reshape((*stack, -1))


def _interleaved(first: jax.Array, second: jax.Array) -> jax.Array:
    """One of each, in turns: ``(..., n)`` twice to ``(..., n, 2)``.

    A byte of codes becomes one word of two values of 16 bits, which a GPU writes at once: a
    product with the result took 5 % less on an H200 (benchmarks/NOTES.md).
    """
    if first.dtype.itemsize != 2:
        return jnp.stack([first, second], -1)
    low, high = (
        lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.uint32) for half in (first, second)
    )
    return lax.bitcast_convert_type(low | high << 16, first.dtype)


def encode_absmax(absmax: jax.Array, offset: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Double quantisation: codes of ``absmax - offset``, uint8, and a scale for each group.

    Args:
        absmax: float32 ``(blocks,)``.
        offset: float32 ``()``.
    """
    groups = _rows(absmax - offset, GROUP)
    scale = jnp.max(jnp.abs(groups), axis=1)
    divisor = jnp.where(scale == 0, 1.0, scale)[:, None]
    moved = jnp.clip(groups * (1 / divisor), -1, 1) + 1
    codes = jnp.sum(moved[..., None] >= DYNAMIC_BOUNDS.reshape(1, 1, -1), -1, dtype=jnp.uint8)
    codes = jnp.where(scale[:, None] == 0, jnp.uint8(0), codes)  # as in bitsandbytes
    return codes.reshape(-1)[: absmax.size], scale


def decode_absmax(codes: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
    """The absmax of each block, float32 ``(*stack, blocks)``: rounded after each operation.

    Args:
        codes: uint8 ``(*stack, blocks)``.
        scale: float32 ``(*stack, groups)``.
        offset: float32 ``(*stack,)``.
    """
    each = jnp.repeat(scale, GROUP, axis=-1)[..., : codes.shape[-1]]
    # No product is below `-each`. Without the maximum, a compiler rounds product and sum at once.
    product = jnp.maximum(_look_up(DYNAMIC_MAP, codes) * each, -each)
    return product + offset[..., None]


def mean(values: jax.Array) -> jax.Array:
    """The mean of float32 ``(n,)``, none of them negative: the same in whatever order it is added.

    Each value is cut in two. The upper parts are multiples of one number, and so few bits long
    that any sum of them is exact; the lower parts are too small for their order to matter. It is
    within 2 ulps, one of them from multiplying by a rounded ``1 / n``.
    """
    largest = jnp.max(values)
    power = lax.bitcast_convert_type(values.size * largest, jnp.int32) & 0x7F800000
    above = 2 * lax.bitcast_convert_type(power, jnp.float32)  # a power of two above any sum
    upper = (values + above) - above
    total = jnp.sum(upper) + jnp.sum(values - upper)
    # No mean is above the largest. Without the minimum, a compiler that subtracts it from something
    # rounds product and difference at once.
    return jnp.minimum(total / values.size, largest)


def _rows(flat: jax.Array, length: int) -> jax.Array:
    """``(n,)`` as ``(ceil(n / length), length)``, zeros at the end."""
    return jnp.pad(flat, (0, -flat.size % length)).reshape(-1, length)


def _look_up(table: np.ndarray, codes: jax.Array) -> jax.Array:
    return jnp.asarray(table).at[codes].get(mode="promise_in_bounds")
