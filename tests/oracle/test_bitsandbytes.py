"""Codes, scales and dequantised values are those of bitsandbytes, bit for bit."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed (make test-oracle)")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (make test-oracle)")

from lora_jax.ops.quantized import _tables
from lora_jax.ops.quantized._nf4 import encode_absmax
from tests.lora_jax.ops import codes
from tests.oracle import bitsandbytes_cases as cases

DTYPES = ["float32", "bfloat16", "float16"]
# Not columns that 16 divides and the block does not: with AVX-512, bitsandbytes then reads the
# scale of another block.
SHAPES = [
    pytest.param((128, 256), id="whole-blocks"),
    pytest.param((300, 64), id="two-groups"),
    pytest.param((50, 90), id="last-block-short"),
    pytest.param((11, 35), id="odd"),
    pytest.param((3, 5), id="less-than-a-block"),
    pytest.param((1, 64), id="one-block"),
]


def assert_nf4_is_theirs(weight: np.ndarray, dtype: str, block: int = 64) -> None:
    for double in (False, True):
        codes.assert_nf4(weight, dtype, block, cases.nf4(weight, dtype, block, double))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_theirs(shape, dtype):
    assert_nf4_is_theirs(cases.drawn(shape, dtype), dtype)


@pytest.mark.parametrize(
    ("block", "width"),
    [
        pytest.param(32, 0.02, id="block-32"),
        pytest.param(1024, 0.02, id="block-1024"),
        pytest.param(64, 1e-6, id="tiny"),
        pytest.param(64, 1e3, id="huge"),
    ],
)
def test_nf4_of_other_blocks_and_widths_is_theirs(block, width):
    weight = cases.drawn((70, 1024), "bfloat16", width)
    assert_nf4_is_theirs(weight, "bfloat16", block)


@hypothesis.given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 15)),
    dtype=st.sampled_from(DTYPES),
    width=st.sampled_from([1e-4, 1e-2, 1.0]),
    seed=st.integers(0, 9),
)
@hypothesis.settings(max_examples=10)
def test_nf4_of_any_shape_is_theirs(shape, dtype, width, seed):
    assert_nf4_is_theirs(cases.drawn(shape, dtype, width, seed), dtype)


def test_nf4_of_zeros_is_theirs():
    zeros = np.zeros((4, 64), np.float32)
    codes.assert_nf4(zeros, "float32", 64, cases.nf4(zeros, "float32", double=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_theirs(shape, dtype):
    weight = cases.drawn(shape, dtype)
    weight[~weight.any(1)] = 2**-9  # they divide by the absmax of an output, and may not by 0
    codes.assert_int8(weight, dtype, cases.int8(weight, dtype))


def test_tables_are_theirs():
    nf4 = cases.functional.get_4bit_type("nf4", device="cpu").numpy()
    np.testing.assert_array_equal(_tables.NF4, nf4)
    dynamic_map = cases.functional.create_dynamic_map().numpy()
    np.testing.assert_array_equal(_tables.DYNAMIC_MAP, dynamic_map)


def around(bounds: np.ndarray, ulps: int = 40) -> np.ndarray:
    """Every float within some ulps of each bound, cut to [-1, 1]."""
    steps = np.arange(-ulps, ulps + 1, dtype=np.int32)[:, None]
    near = (bounds.astype(np.float32).view(np.int32) + steps).view(np.float32)
    return near[np.isfinite(near)].clip(-1, 1)


def led_by_one(numbers: np.ndarray, length: int) -> np.ndarray:
    """The numbers in rows of ``length``, each led by a 1, so that its scale is 1."""
    padded = np.concatenate([numbers, np.zeros(-numbers.size % (length - 1), np.float32)])
    rows = padded.reshape(-1, length - 1)
    return np.concatenate([np.ones((len(rows), 1), np.float32), rows], axis=1)


def test_codes_change_where_theirs_do():
    weight = led_by_one(around(_tables.midpoints(_tables.NF4)), 64)
    assert_nf4_is_theirs(weight, "float32")


def test_codes_of_absmax_change_where_theirs_do():
    near = around(_tables.DYNAMIC_BOUNDS.astype(np.float64) - 1)
    even = np.linspace(-1, 1, 100_001, dtype=np.float32)
    numbers = led_by_one(np.concatenate([near, even]), 256).reshape(-1)
    ours, scale = jax.jit(encode_absmax)(numbers, jnp.float32(0))
    theirs, wanted_scale = cases.absmax_codes(numbers)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(scale, wanted_scale)
