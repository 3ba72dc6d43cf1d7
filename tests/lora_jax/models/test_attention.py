"""Positions, masks, the cache's slots, and which kernel attention calls."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models._attention import (
    attend,
    causal_mask,
    count_positions,
    default_device,
    explicit_mask,
    fits_cudnn,
    place,
)
from lora_jax.models._cache import init_cache, reserve, store

CONFIG = SimpleNamespace(num_hidden_layers=2, num_key_value_heads=1, head_dim=4, max_length=8)


def placed(length=5, mask=None, positions=None, segment_ids=None, cache=None, rows=1):
    given = (None if x is None else jnp.asarray([x]) for x in (mask, positions, segment_ids))
    ids = jnp.zeros((rows, length), jnp.int32)
    return place(ids, *given, cache, max_length=CONFIG.max_length)


@pytest.mark.parametrize(
    ("kept", "segment_ids", "expected"),
    [
        pytest.param([1, 1, 1, 1], None, [0, 1, 2, 3], id="plain"),
        pytest.param([0, 0, 1, 1], None, [0, 0, 0, 1], id="left-padding"),
        pytest.param([1, 1, 0, 0], None, [0, 1, 2, 2], id="right-padding"),
        pytest.param([1, 1, 1, 1], [5, 5, 2, 2], [0, 1, 0, 1], id="segments"),
        pytest.param([1, 1, 1, 1], [1, 2, 2, 1], [0, 0, 1, 0], id="a-run-is-a-segment"),
        pytest.param([1, 0, 1, 1], [1, 1, 1, 2], [0, 1, 1, 0], id="padding-in-a-segment"),
    ],
)
def test_positions_count_what_is_kept(kept, segment_ids, expected):
    segments = None if segment_ids is None else jnp.asarray([segment_ids])
    positions = count_positions(jnp.asarray([kept], bool), segments)
    np.testing.assert_array_equal(positions, [expected])


@pytest.mark.parametrize(
    ("given", "window", "expected"),
    [
        pytest.param({}, None, ["x", "xx", "xxx", "xxxx", "xxxxx"], id="causal"),
        pytest.param({}, 2, ["x", "xx", ".xx", "..xx", "...xx"], id="window"),
        pytest.param(
            {"mask": [0, 0, 1, 1, 1]}, None, ["", "", "..x", "..xx", "..xxx"], id="left-padding"
        ),
        pytest.param(
            {"mask": [1, 1, 1, 0, 0]}, None, ["x", "xx", "xxx", "xxx", "xxx"], id="right-padding"
        ),
        pytest.param(
            {"segment_ids": [1, 1, 2, 2, 0]}, None, ["x", "xx", "..x", "..xx", ""], id="segments"
        ),
        pytest.param(
            {"segment_ids": [1, 1, 1, 2, 2], "mask": [0, 1, 1, 1, 1]},
            None,
            ["", ".x", ".xx", "...x", "...xx"],
            id="segments-and-mask",
        ),
        pytest.param(
            {"positions": [0, 1, 4, 5, 6]},
            3,
            ["x", "xx", "..x", "..xx", "..xxx"],
            id="window-by-position",
        ),
    ],
)
def test_mask_spelt_out(given, window, expected):
    rows = [[c == "x" for c in row.ljust(5, ".")] for row in expected]
    np.testing.assert_array_equal(explicit_mask(placed(**given), window)[0, 0], rows)


@pytest.mark.parametrize(
    ("given", "window", "plain"),
    [
        pytest.param({}, None, True, id="nothing"),
        pytest.param({}, 5, True, id="window-as-long-as-the-row"),
        pytest.param({}, 4, False, id="window"),
        pytest.param({"positions": [0, 1, 2, 3, 4]}, None, True, id="positions"),
        pytest.param({"positions": [0, 9, 20, 30, 40]}, 5, False, id="positions-and-window"),
        pytest.param({"mask": [1, 1, 1, 1, 1]}, None, False, id="mask"),
        pytest.param({"segment_ids": [1, 1, 1, 1, 1]}, None, False, id="segments"),
        pytest.param({"cache": init_cache(CONFIG, 1, 5)}, None, False, id="cache"),
    ],
)
def test_no_mask_where_the_kernel_is_causal_by_itself(given, window, plain):
    assert (causal_mask(placed(**given), window) is None) == plain


def test_rows_without_padding_share_one_mask():
    assert causal_mask(placed(rows=3), 2).shape == (1, 1, 5, 5)


def test_cache_continues_each_row_where_it_stands():
    cache = init_cache(CONFIG, 2, 6)
    mask = jnp.asarray([[1, 1, 1], [0, 0, 1]])
    one = place(jnp.zeros((2, 3), jnp.int32), mask, None, None, cache, max_length=8)
    two = place(jnp.zeros((2, 2), jnp.int32), None, None, None, one.cache, max_length=8)
    np.testing.assert_array_equal(two.positions, [[3, 4], [1, 2]])
    np.testing.assert_array_equal(two.cache.positions, [[0, 1, 2, 3, 4, 0], [0, 0, 0, 1, 2, 0]])
    seen = ["xxxx..", "xxxxx.", "..xx..", "..xxx."]
    expected = np.array([[c == "x" for c in row] for row in seen]).reshape(2, 1, 2, 6)
    np.testing.assert_array_equal(explicit_mask(two), expected)
    near = explicit_mask(two, 2)  # the padding of the second row takes no part of its window
    expected = np.array([[c == "x" for c in row] for row in ("..xx..", "...xx.")])
    np.testing.assert_array_equal(near[0, 0], expected)
    np.testing.assert_array_equal(near[1, 0], expected)


def test_store_writes_one_layer_at_the_reserved_slots():
    cache = reserve(init_cache(CONFIG, 1, 4), jnp.ones((1, 1), bool), jnp.zeros((1, 1), jnp.int32))
    new = jnp.ones((1, 2, 1, 4))
    cache = reserve(cache, jnp.ones((1, 2), bool), jnp.asarray([[1, 2]], jnp.int32))
    cache, key, value = store(cache, 1, new, 2 * new)
    np.testing.assert_array_equal(cache.key[:, 0, :, 0, 0], [[0, 0, 0, 0], [0, 1, 1, 0]])
    np.testing.assert_array_equal(key[0, :, 0, 0], [0, 1, 1, 0])
    np.testing.assert_array_equal(value[0, :, 0, 0], [0, 2, 2, 0])
    assert int(cache.length) == 3


def test_store_keeps_the_dtypes_of_cache_and_arithmetic():
    cache = init_cache(CONFIG, 1, 2, jnp.bfloat16)
    cache = reserve(cache, jnp.ones((1, 1), bool), jnp.zeros((1, 1), jnp.int32))
    cache, key, _ = store(cache, 0, jnp.ones((1, 1, 1, 4)), jnp.ones((1, 1, 1, 4)))
    assert (cache.key.dtype, key.dtype) == (jnp.bfloat16, jnp.float32)


def test_a_cache_that_overflows_says_so():
    kept, positions = jnp.ones((1, 3), bool), jnp.zeros((1, 3), jnp.int32)
    cache = reserve(init_cache(CONFIG, 1, 4), kept, positions)
    with pytest.raises(ValueError, match="3 tokens do not fit into a cache of 4 slots, 3 of them"):
        reserve(cache, kept, positions)

    @jax.jit  # the length is not known while this is traced
    def step(cache):
        new = jnp.ones((1, 3, 1, 4))
        return store(reserve(cache, kept, positions), 0, new, new)[2]

    assert np.isnan(step(cache)).any()


@pytest.mark.parametrize("length", [0, 9])
def test_init_cache_refuses_what_the_model_has_no_positions_for(length):
    with pytest.raises(ValueError, match=f"between 1 and 8 slots.*got {length}"):
        init_cache(CONFIG, 1, length)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        pytest.param({"length": 9}, "9 tokens long.*positions for 8", id="too-long"),
        pytest.param({"mask": [1, 1]}, "`attention_mask` must have the shape", id="mask"),
        pytest.param({"positions": [1, 1]}, "`positions` must have the shape", id="positions"),
        pytest.param({"segment_ids": [1]}, "`segment_ids` must have the shape", id="segments"),
        pytest.param({"positions": [0.0] * 5}, "`positions` must be integers", id="floats"),
        pytest.param(
            {"segment_ids": [1] * 5, "cache": init_cache(CONFIG, 1, 5)}, "exclude", id="packed"
        ),
        pytest.param({"cache": init_cache(CONFIG, 2, 5)}, "`cache` has 2 rows", id="rows"),
    ],
)
def test_place_refuses(given, match):
    with pytest.raises(ValueError, match=match):
        placed(**given)


@pytest.mark.parametrize("ids", [jnp.zeros(4, jnp.int32), jnp.zeros((1, 4))], ids=["axis", "float"])
def test_place_refuses_ids(ids):
    with pytest.raises(ValueError, match="`input_ids` must be integers of shape"):
        place(ids, None, None, None, None, max_length=8)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attend_is_softmax_attention(kv_heads, masked):
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 5, 4, 8)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, 5, kv_heads, 8)).astype(np.float32)
    mask = np.tril(np.ones((5, 5), bool))[None, None].repeat(2, 0)
    if masked:
        mask[1, :, :, 0] = False
        mask[1, :, 0, 0] = True  # so that every query sees something
    wide_key, wide_value = (x.repeat(4 // kv_heads, axis=2) for x in (key, value))
    scores = np.einsum("bqhd,bkhd->bhqk", query, wide_key) * 0.3
    weights = np.exp(scores) * mask
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, wide_value)
    given = jnp.asarray(mask) if masked else None
    found = attend(jnp.asarray(query), jnp.asarray(key), jnp.asarray(value), given, scale=0.3)
    # sums of five products of numbers about 1: a few roundings of 2**-24 each
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "masked", "expected"),
    [
        pytest.param("9.0", jnp.bfloat16, 64, None, True, id="h100"),
        pytest.param("9.0", jnp.bfloat16, 256, None, True, id="h100-gemma"),
        pytest.param("8.0", jnp.float16, 128, None, True, id="a100"),
        pytest.param("8.0", jnp.bfloat16, 256, None, False, id="a100-gemma"),
        pytest.param("7.5", jnp.float16, 64, None, False, id="too-old"),
        pytest.param("12.0", jnp.bfloat16, 128, None, True, id="two-digits"),
        pytest.param("9.0", jnp.float32, 64, None, False, id="float32"),
        pytest.param("9.0", jnp.bfloat16, 60, None, False, id="head-size"),
        pytest.param("9.0", jnp.bfloat16, 64, (512, 512), True, id="mask"),
        pytest.param("9.0", jnp.bfloat16, 64, (1, 512), False, id="mask-odd-queries"),
        pytest.param("9.0", jnp.bfloat16, 64, (512, 513), False, id="mask-odd-keys"),
        pytest.param("gfx90a", jnp.bfloat16, 64, None, False, id="amd"),
        pytest.param("", jnp.bfloat16, 64, None, False, id="cpu"),
    ],
)
def test_which_shapes_go_to_cudnn(capability, dtype, head_dim, masked, expected):
    assert fits_cudnn(capability, dtype, head_dim, masked) == expected


@pytest.mark.parametrize(
    ("chosen", "index"),
    [
        pytest.param(None, 0, id="none"),
        pytest.param("cpu", 0, id="platform"),
        pytest.param(jax.devices()[3], 3, id="device"),
    ],
)
def test_default_device_is_where_unplaced_arrays_go(chosen, index):
    with jax.default_device(chosen):
        assert default_device() == jax.devices()[index]
        assert jnp.ones(2).devices() == {default_device()}
