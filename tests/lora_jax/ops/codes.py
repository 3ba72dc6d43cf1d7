"""What codes of bitsandbytes are to us: equal, wherever they come from."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.ops import quantize_weight
from lora_jax.ops.quantized._nf4 import encode_absmax


def assert_nf4(weight: np.ndarray, dtype: str, block: int, theirs: Mapping[str, np.ndarray]):
    """Codes, scales and values of a ``(out, in)`` weight of theirs are ours of its transpose.

    Args:
        weight: float32, of values that ``dtype`` has.
        dtype: The weight's.
        block: Entries a block.
        theirs: ``codes``, ``absmax``, float32 ``values``; ``scale`` and ``offset`` if they
            quantised twice.
    """
    kernel = jnp.asarray(weight, dtype).T
    single = quantize_weight(kernel, "in out", block=block, double=False)
    np.testing.assert_array_equal(single.codes, theirs["codes"])
    if "offset" not in theirs:
        # Of zeros in a last block that is short they keep 1e-38, which XLA takes for 0.
        absmax = np.where(theirs["absmax"] == np.float32(1e-38), 0, theirs["absmax"])
        np.testing.assert_array_equal(single.absmax, absmax)
        np.testing.assert_array_equal(values(single), theirs["values"])
        return
    # The one number that may differ is the mean that they take from each absmax, since it depends
    # on the order in which a processor adds. What follows from it is equal, given theirs. Ours is
    # within 2 ulps of the exact mean. So was theirs in 200 means of up to a million terms, though
    # what bounds it is wider: chains of some 64 additions, rounded at random.
    double = quantize_weight(kernel, "in out", block=block)
    np.testing.assert_array_max_ulp(np.asarray(double.offset), theirs["offset"], maxulp=4)
    offset = jnp.asarray(theirs["offset"])
    codes, scale = jax.jit(encode_absmax)(single.absmax, offset)
    np.testing.assert_array_equal(codes, theirs["absmax"])
    np.testing.assert_array_equal(scale, theirs["scale"])
    same = dataclasses.replace(double, absmax=codes, scale=scale, offset=offset)
    np.testing.assert_array_equal(same.codes, theirs["codes"])
    np.testing.assert_array_equal(values(same), theirs["values"])
    if double.offset == offset:
        np.testing.assert_array_equal(double.absmax, theirs["absmax"])
        np.testing.assert_array_equal(double.scale, theirs["scale"])


def assert_int8(weight: np.ndarray, dtype: str, theirs: Mapping[str, np.ndarray]):
    """Codes, row statistics and values of a ``(out, in)`` weight are ours of its transpose.

    Args:
        weight: float32, of values that ``dtype`` has.
        dtype: The weight's.
        theirs: ``codes``, ``absmax`` and float32 ``values``.
    """
    ours = quantize_weight(jnp.asarray(weight, dtype).T, "in out", "int8")
    np.testing.assert_array_equal(ours.codes, theirs["codes"])
    np.testing.assert_array_equal(ours.absmax, theirs["absmax"])
    np.testing.assert_array_equal(values(ours), theirs["values"])


def values(weight) -> np.ndarray:
    """Dequantised under jit, where a compiler may fuse, and turned as theirs: ``(out, in)``."""
    plain = jax.jit(lambda w: w.dequantize())(weight)
    assert plain.dtype == weight.dtype
    return np.asarray(plain.T, np.float32)
