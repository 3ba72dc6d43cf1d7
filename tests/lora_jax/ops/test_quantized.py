"""Quantised weights: how far values are off, what stays equal, what is held, what is refused."""

import dataclasses
import math
import statistics
from pathlib import Path

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import lora_jax
from lora_jax import LoraConfig
from lora_jax._paths import flatten
from lora_jax._quantized import matrices_of
from lora_jax.ops import dequantize, quantize, quantize_weight
from lora_jax.ops.quantized import SCHEMES, _nf4, _quantize, _tables
from lora_jax.testing import assert_trees_equal
from tests.lora_jax.ops import codes

REFERENCES = Path(__file__).parents[2] / "references" / "bitsandbytes"
STACKED = "stack in out"
OPTIONS = [
    pytest.param("nf4", {}, id="nf4"),
    pytest.param("nf4", {"double": False}, id="nf4-single"),
    pytest.param("nf4", {"block": 6}, id="nf4-block-6"),
    pytest.param("int8", {}, id="int8"),
    pytest.param("fp8", {}, id="fp8"),
]


def drawn(shape, dtype="float32", seed=0):
    """A normal weight of width 0.02."""
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.02, shape), dtype)


def error_bound(weight, scheme, *, block=64, double=True):
    """How far each value of a ``(out, in)`` matrix can be off, before it is rounded to a dtype."""
    matrix = np.abs(np.asarray(weight, np.float64))
    rows = matrix.max(1, keepdims=True) * np.ones_like(matrix)
    if scheme == "int8":
        return rows / 127 / 2
    if scheme == "fp8":  # three bits of mantissa, down to 2**-6; steps of 2**-9 below it
        return np.maximum(matrix * 2**-4, rows / 448 * 2**-10)
    flat = matrix.reshape(-1)
    starts = np.arange(0, flat.size, block)
    absmax = np.maximum.reduceat(flat, starts)
    off = np.zeros_like(absmax)
    if double:  # the nearest of 256 values, after 2**-16 for the step before it
        groups = np.abs(absmax - absmax.mean())
        scale = np.maximum.reduceat(groups, np.arange(0, absmax.size, 256)).repeat(256)
        gap = np.diff(_tables.DYNAMIC_MAP.astype(np.float64)).max() / 2 + 2**-16
        off = scale[: absmax.size] * gap
    gap = np.diff(_tables.NF4.astype(np.float64)).max() / 2
    bound = (absmax * gap + off).repeat(block)[: flat.size]
    return bound.reshape(matrix.shape)


def assert_near(plain, weight, scheme, **options):
    """Within the bound, half an ulp of the dtype and a few roundings of float32."""
    off = np.abs(np.asarray(plain, np.float64) - np.asarray(weight, np.float64)).T
    matrix = np.asarray(weight, np.float64).T
    rounding = (jnp.finfo(plain.dtype).eps / 2 + 8 * 2.0**-24) * np.abs(matrix).max()
    assert (off <= 1.001 * error_bound(matrix, scheme, **options) + rounding).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("scheme", "options"), OPTIONS)
def test_values_are_off_by_half_a_gap_at_most(scheme, options, dtype):
    weight = drawn((192, 160), dtype)
    plain = dequantize(quantize_weight(weight, "in out", scheme, **options))
    assert (plain.shape, plain.dtype) == (weight.shape, weight.dtype)
    assert_near(plain, weight, scheme, **options)


@hypothesis.given(
    weight=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=20),
        elements=st.floats(-8, 8, width=16),
    ),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    option=st.sampled_from([param.values for param in OPTIONS]),
)
@hypothesis.settings(max_examples=12)
def test_any_weight_comes_back_near(weight, dtype, option):
    scheme, options = option
    weight = jnp.asarray(weight, dtype)
    codes_of = quantize_weight(weight, ("in", "out"), scheme, **options)
    plain = dequantize(codes_of)
    assert (plain.shape, plain.dtype) == (codes_of.shape, codes_of.dtype)
    assert (plain.shape, plain.dtype) == (weight.shape, weight.dtype)
    assert_near(plain, weight, scheme, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("scheme", "options"), OPTIONS)
def test_dequantised_values_have_the_same_codes(scheme, options, dtype):
    once = quantize_weight(drawn((64, 48), dtype), "in out", scheme, **options)
    twice = quantize_weight(dequantize(once), "in out", scheme, **options)
    np.testing.assert_array_equal(twice.codes, once.codes)
    if options.get("double") is False:
        assert_trees_equal(dequantize(twice), dequantize(once))


@pytest.mark.parametrize(("scheme", "options"), OPTIONS)
def test_a_stack_is_its_layers(scheme, options):
    weight = drawn((3, 34, 30), "bfloat16")
    stacked = quantize_weight(weight, STACKED, scheme, **options)
    layers = [quantize_weight(layer, "in out", scheme, **options) for layer in weight]
    for whole, *parts in zip(*map(jax.tree.leaves, (stacked, *layers)), strict=True):
        np.testing.assert_array_equal(whole, np.stack(parts))
    np.testing.assert_array_equal(
        dequantize(stacked), np.stack([dequantize(layer) for layer in layers])
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_eight_devices_compute_the_codes_of_one(scheme):
    mesh = jax.make_mesh((8,), ("shard",), axis_types=(AxisType.Auto,))
    weight = drawn((2, 64, 48), "bfloat16")
    spread = jax.device_put(weight, NamedSharding(mesh, P(None, "shard")))
    assert_trees_equal(
        jax.tree.leaves(quantize_weight(spread, STACKED, scheme)),
        jax.tree.leaves(quantize_weight(weight, STACKED, scheme)),
    )


LAYOUTS = {
    "heads": ("in out out", (40, 4, 8)),
    "heads-in": ("in in out", (4, 8, 40)),
    "transposed": ("out in", (40, 24)),
    "out-around-in": ("out in out", (3, 40, 5)),
    "stacked-heads": ("stack in out out", (2, 40, 4, 8)),
    "stack-inside": ("in stack out", (40, 3, 24)),
    "layers-of-experts": ("stack stack in out", (2, 3, 30, 20)),
}


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        *(("int8", name) for name in LAYOUTS),
        ("nf4", "stacked-heads"),
        ("nf4", "out-around-in"),
        ("fp8", "layers-of-experts"),
    ],
)
def test_a_layout_is_the_matrix_it_describes(scheme, name):
    layout, shape = LAYOUTS[name]
    weight, words = drawn(shape), tuple(layout.split())
    found = quantize_weight(weight, layout, scheme)
    assert found.shape == shape

    def kernels(weight):
        matrices = matrices_of(weight, words)
        return jnp.swapaxes(matrices.reshape((-1, *matrices.shape[-2:])), 1, 2)

    expected = quantize_weight(kernels(weight), STACKED, scheme)
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(leaf.reshape(wanted.shape), wanted)
    np.testing.assert_array_equal(kernels(dequantize(found)), dequantize(expected))


@pytest.mark.parametrize(
    ("scheme", "options", "bits"),
    [
        pytest.param("nf4", {}, 4 + 8 / 64 + 32 / (64 * 256), id="nf4"),
        pytest.param("nf4", {"double": False}, 4 + 32 / 64, id="nf4-single"),
        pytest.param("nf4", {"block": 128}, 4 + 8 / 128 + 32 / (128 * 256), id="nf4-block-128"),
        pytest.param("int8", {}, 8 + 32 / 1024, id="int8"),
        pytest.param("fp8", {}, 8 + 32 / 1024, id="fp8"),
    ],
)
def test_bits_an_entry(scheme, options, bits):
    found = quantize_weight(jnp.ones((2, 1024, 512), jnp.bfloat16), STACKED, scheme, **options)
    offsets = 2 * 4 if options.get("double", scheme == "nf4") else 0
    assert found.nbytes == found.size * bits / 8 + offsets
    assert bits < 4.13 or scheme != "nf4" or "double" in options


def test_padding_is_less_than_a_block():
    found = quantize_weight(drawn((7, 19)), "in out")  # 133 entries: two blocks, and one of 5
    assert (found.codes.shape, found.absmax.shape, found.scale.shape) == ((67,), (3,), (1,))
    # The last byte's second half is the code of 0.
    assert found.codes[-1] & 15 == 7


@pytest.mark.parametrize("file", sorted(REFERENCES.glob("*.npz")), ids=lambda file: file.stem)
def test_codes_and_values_are_those_of_bitsandbytes(file):
    theirs = dict(np.load(file))
    weight, dtype = theirs["weight"], str(theirs["dtype"])
    if file.stem.startswith("int8"):
        codes.assert_int8(weight, dtype, theirs)
    else:
        codes.assert_nf4(weight, dtype, int(theirs["block"]), theirs)


def test_references_are_there():
    assert len(list(REFERENCES.glob("nf4-*.npz"))) == 4
    assert len(list(REFERENCES.glob("int8-*.npz"))) == 3


def test_nf4_is_the_quantiles_of_the_paper():
    # Section 3: even steps of probability from either end to 1/2, over the largest quantile. The
    # end is the mean of 1 - 1/32 and 1 - 1/30, to the digits that they computed with.
    quantile = statistics.NormalDist().inv_cdf
    above = [quantile(p) for p in np.linspace(0.5, 0.9677083, 9)]
    below = [quantile(p) for p in np.linspace(1 - 0.9677083, 0.5, 8)]
    # Their probabilities were float32: 2**-24, over the least density there, 0.07.
    expected = np.array(below + above[1:]) / above[-1]
    np.testing.assert_allclose(_tables.NF4, expected, rtol=0, atol=2**-24 / 0.07)


def test_every_value_of_the_dynamic_map_has_the_code_it_stands_for():
    # Below 1e-4 they are closer to each other than the steps of 2**-15 that are counted in.
    values = _tables.DYNAMIC_MAP
    apart = np.abs(values) > 1e-4
    group = jnp.asarray(np.where(apart, values, 1))
    found, scale = _nf4.encode_absmax(group, jnp.float32(0))
    assert scale == 1
    np.testing.assert_array_equal(found[apart], np.arange(256)[apart])


@pytest.mark.parametrize("size", [1, 7, 100, 4096, 100_000])
def test_mean_is_exact_to_two_ulps_in_any_order(size):
    values = np.abs(np.random.default_rng(size).normal(0.05, 0.02, size)).astype(np.float32)
    found = jax.jit(_nf4.mean)(values)
    exact = np.float32(math.fsum(values.astype(float)) / size)
    np.testing.assert_array_max_ulp(np.asarray(found), exact, maxulp=2)
    assert found == jax.jit(_nf4.mean)(np.sort(values))
    assert found == jax.jit(_nf4.mean)(values[::-1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zeros(scheme):
    weight = drawn((96, 8)).at[:, 3].set(0)
    plain = dequantize(quantize_weight(weight, "in out", scheme))
    assert not plain[:, 3].any()
    zeros = jnp.zeros((9, 5))
    assert_trees_equal(dequantize(quantize_weight(zeros, "in out", scheme)), zeros)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_jit_equals_eager(scheme):
    weight = drawn((2, 30, 20), "bfloat16")
    eager = quantize_weight(weight, STACKED, scheme)
    jitted = jax.jit(lambda w: quantize_weight(w, STACKED, scheme))(weight)
    assert_trees_equal(jax.tree.leaves(jitted), jax.tree.leaves(eager))
    assert_trees_equal(dequantize(eager), eager.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shapes_are_known_without_values(scheme):
    shape = jax.ShapeDtypeStruct((2, 31, 5), jnp.bfloat16)
    found = jax.eval_shape(lambda w: quantize_weight(w, STACKED, scheme), shape)
    assert (found.shape, found.dtype) == (shape.shape, shape.dtype)
    made = quantize_weight(drawn(shape.shape, shape.dtype), STACKED, scheme)
    described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made)
    assert jax.tree.leaves(described) == jax.tree.leaves(found)
    plain = jax.eval_shape(dequantize, found)
    assert (plain.shape, plain.dtype) == (shape.shape, shape.dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scan_slices_the_codes(scheme):
    stacked = quantize_weight(drawn((4, 24, 24)), STACKED, scheme)
    x = drawn((3, 24), seed=1)

    def layer(x, one):
        return x @ dataclasses.replace(one, layout=one.layout[1:]).dequantize(), None

    found, _ = jax.lax.scan(layer, x, stacked)
    expected = x
    for one in dequantize(stacked):
        expected = expected @ one
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_float64_comes_back_as_float64_with_float32_values():
    with jax.enable_x64(True):
        weight = drawn((20, 10), "float64")
        found = quantize_weight(weight, "in out")
        assert (weight.dtype, dequantize(found).dtype) == (jnp.float64, jnp.float64)
        narrow = quantize_weight(weight.astype(jnp.float32), "in out")
        np.testing.assert_array_equal(dequantize(found), dequantize(narrow))
        assert {leaf.dtype.itemsize for leaf in jax.tree.leaves(found)} == {1, 4}


def test_another_dtype_is_another_rounding_of_the_same_values():
    found = quantize_weight(drawn((20, 10), "bfloat16"), "in out")
    wide = dequantize(found.astype(jnp.float32))
    np.testing.assert_array_equal(wide.astype(jnp.bfloat16), dequantize(found))


def test_numpy_weights_are_taken_as_they_are():
    weight = drawn((20, 10))
    assert_trees_equal(
        jax.tree.leaves(quantize_weight(np.asarray(weight), "in out")),
        jax.tree.leaves(quantize_weight(weight, "in out")),
    )


def test_a_stack_needs_the_memory_of_one_layer():
    layers, size = 16, 256 * 256  # float32: of bfloat16 a CPU slices no array, but casts all of it
    shape = jax.ShapeDtypeStruct((layers, 256, 256), jnp.float32)
    lowered = _quantize._encode_stack.lower(shape, tuple(STACKED.split()), "nf4", 64, True)
    needed = lowered.compile().memory_analysis().temp_size_in_bytes
    # One layer's float32 a few times over, which is a sixteenth of the stack's.
    assert needed < 4 * 4 * size, needed


PARAMS = {
    "embed": {"embedding": drawn((11, 8))},
    "layers": [
        {
            "query": {"kernel": drawn((8, 8)), "bias": drawn((8,))},
            "out": {"kernel": drawn((2, 4, 8))},
            "norm": {"scale": drawn((8,))},
        }
        for _ in range(2)
    ],
    "lm_head": {"kernel": drawn((8, 11), "bfloat16")},
    "steps": jnp.array([[1, 2], [3, 4]]),
}
WORDS = {"out": "in in out"}


def quantized_paths(tree):
    leaves, _ = flatten(tree)
    return [path for path, leaf in leaves.items() if isinstance(leaf, tuple(SCHEMES.values()))]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        pytest.param(
            {"layouts": WORDS},
            [f"layers/{i}/{name}/kernel" for i in (0, 1) for name in ("out", "query")],
            id="all-linear",
        ),
        pytest.param({"targets": "query"}, [f"layers/{i}/query/kernel" for i in (0, 1)], id="one"),
        pytest.param(
            {"targets": ("query", "lm_head"), "exclude": ("1/query",)},
            ["layers/0/query/kernel", "lm_head/kernel"],
            id="excluded",
        ),
        pytest.param(
            {"targets": ("0/out",), "layouts": {"layers/0/out/kernel": ("in", "in", "out")}},
            ["layers/0/out/kernel"],
            id="measured-layout",
        ),
    ],
)
def test_targets_are_those_of_a_config(options, expected):
    found = quantize(PARAMS, "int8", **options)
    assert quantized_paths(found) == expected
    assert found["layers"][0]["query"]["bias"] is PARAMS["layers"][0]["query"]["bias"]
    assert found["steps"] is PARAMS["steps"]
    plain = dequantize(found)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), plain) == jax.tree.map(
        lambda x: (x.shape, x.dtype), PARAMS
    )
    assert plain["embed"]["embedding"] is PARAMS["embed"]["embedding"]


def test_words_win_over_a_measured_layout():
    measured = {"layers/0/out/kernel": ("in", "out", "out")}
    found = quantize(PARAMS, targets="0/out", layouts=measured | {"out": "in in out"})
    assert found["layers"][0]["out"]["kernel"].layout == ("in", "in", "out")


def test_schemes_mix_in_one_tree():
    codes_of = quantize(quantize(PARAMS, "int8", targets="query"), "fp8", targets="lm_head")
    leaves, _ = flatten(codes_of)
    assert type(leaves["layers/0/query/kernel"]) is SCHEMES["int8"]
    assert type(leaves["lm_head/kernel"]) is SCHEMES["fp8"]


def test_a_tree_of_shapes():
    shapes = jax.eval_shape(lambda: PARAMS)
    found = jax.eval_shape(lambda p: quantize(p, targets="query"), shapes)
    assert jax.tree.leaves(jax.eval_shape(dequantize, found)) == jax.tree.leaves(shapes)


def test_an_nnx_state():
    model = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    state = nnx.state(model)
    found = quantize(state)
    assert quantized_paths(found) == ["kernel"]
    nnx.update(model, dequantize(found))
    assert_near(model.kernel[...], state["kernel"][...], "nf4")


def split_halves():
    config = LoraConfig(rank=2, alpha=4, targets=("query",))
    return lora_jax.split(PARAMS, config, jax.random.key(0))


PLAIN = drawn((8, 8))


def of(weight, *scheme, **options):
    return lambda: quantize({"query": {"kernel": weight}}, *scheme, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(
            lambda: quantize(PARAMS, targets="qeury"),
            "Target 'qeury' matches none of the 11 weights. The nearest is 'layers/0/query/kernel'",
            id="no-match",
        ),
        pytest.param(
            lambda: quantize(PARAMS, targets="query", exclude="que.y"),
            "leaves none of the 2 weights",
            id="nothing-left",
        ),
        pytest.param(lambda: quantize(PARAMS, targets=()), "`targets` is empty", id="no-targets"),
        pytest.param(lambda: quantize(PARAMS, targets="("), "not a regular expression", id="regex"),
        pytest.param(
            lambda: quantize(PARAMS),
            r"'layers/0/out/kernel' of shape \(2, 4, 8\) has 3 axes.*`layouts=",
            id="no-layout",
        ),
        pytest.param(
            lambda: quantize(PARAMS, layouts={"ou": "in in out"}),
            "`layouts` key 'ou' matches none",
            id="layout-of-nothing",
        ),
        pytest.param(
            lambda: quantize(PARAMS, targets="out", layouts={"out": "in out"}),
            "has 3 axes, but its layout 'in out' names 2",
            id="layout-too-short",
        ),
        pytest.param(
            lambda: quantize(PARAMS, targets="embed", layouts={"embed/embedding": ("out", "out")}),
            "never multiplies its input by it",
            id="not-multiplied-by",
        ),
        pytest.param(
            lambda: quantize(PARAMS, targets="bias"), r"of shape \(8,\) cannot be", id="vector"
        ),
        pytest.param(
            lambda: quantize(PARAMS, targets="steps"), "holds int32 and cannot be", id="integers"
        ),
        pytest.param(
            lambda: quantize(quantize(PARAMS, targets="query"), targets="query"),
            "'layers/0/query/kernel' is quantised already",
            id="twice",
        ),
        pytest.param(
            lambda: quantize(lora_jax.combine(*split_halves())),
            "'layers/0/query/kernel' is adapted already",
            id="combined",
        ),
        pytest.param(lambda: quantize(split_halves()[1]), "is adapted already", id="factors"),
        pytest.param(of(PLAIN.at[2, 3].set(jnp.nan)), "'query/kernel' has.*finite", id="nan"),
        pytest.param(of(PLAIN.at[2, 3].set(-jnp.inf)), "not finite", id="infinite"),
        pytest.param(of(jnp.full((8, 8), 3e38, jnp.bfloat16)), "beyond ±1e\\+30", id="huge"),
        pytest.param(of(drawn((8, 0))), "none of size 0", id="empty"),
        pytest.param(of(PLAIN, "nf5"), "one of nf4, int8, fp8, got 'nf5'", id="scheme"),
        pytest.param(of(PLAIN, block=63), "even number of at least 2, got 63", id="odd-block"),
        pytest.param(of(PLAIN, block=64.0), "even number", id="float-block"),
        pytest.param(of(PLAIN, double=1), "`double` must be True or False", id="double"),
        pytest.param(of(PLAIN, "int8", block=32), "int8 has one scale.*32", id="int8-block"),
        pytest.param(of(PLAIN, "fp8", double=False), "fp8 has one scale", id="fp8-double"),
        pytest.param(
            lambda: quantize_weight(PLAIN, "in"), "at least one 'in' and one", id="no-out"
        ),
        pytest.param(
            lambda: quantize_weight(PLAIN, STACKED),
            r"The weight of shape \(8, 8\).*'stack in out'",
            id="weight-of-too-few-axes",
        ),
        pytest.param(
            lambda: quantize_weight([[1.0]], "in out"), "holds list and cannot", id="list"
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
