"""The law of the factored weight's rules, for shapes, axes and dtypes that hypothesis draws.

For every primitive: materialising after the rule equals the primitive after materialising.
"""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lora_jax._compat import open_jaxpr
from lora_jax._factored import Factored, factor
from lora_jax._interpret import Walk
from lora_jax._weights import LoraFactors, LoraWeight, factor_shapes

# Products of at most 4^4 terms near 1, in the precision of each dtype.
ROUNDING = {np.dtype("float64"): 1e-12, np.dtype("float32"): 1e-4, np.dtype(jnp.bfloat16): 0.06}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@st.composite
def weights(draw, *, layouts=None, max_size=4, dtypes=("float64", "bfloat16")):
    """An adapted weight of any layout: two to four axes, sizes of 1 included."""
    some = st.permutations(["in", "out"]).flatmap(
        lambda ends: st.lists(st.sampled_from(["stack", "in", "out"]), max_size=2).flatmap(
            lambda more: st.permutations([*ends, *more])
        )
    )
    layout = tuple(draw(some if layouts is None else layouts))
    shape = tuple(draw(st.integers(1, max_size)) for _ in layout)
    dtype = jnp.dtype(draw(st.sampled_from(dtypes)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    a, b = factor_shapes(shape, layout, draw(st.integers(1, 3)))
    factor_dtype = jnp.promote_types(jnp.float32, dtype)
    factors = LoraFactors(
        jnp.asarray(rng.normal(size=a), factor_dtype),
        jnp.asarray(rng.normal(size=b), factor_dtype),
        scale=draw(st.sampled_from([1.0, 0.5, -2.0])),
        layout=layout,
    )
    return LoraWeight(jnp.asarray(rng.normal(size=shape), dtype), factors, path="w")


def hold(fn, weight, *inputs, stays=True):
    """Checks the law for ``fn(w, *inputs)``; returns whether the weight stayed factored."""
    kept = []

    @jax.jit  # one compilation for an example
    def both_ways(weight):
        tracked = factor(weight)
        jaxpr = jax.make_jaxpr(lambda w: fn(w, *inputs))(weight.w)
        walk = Walk("error" if stays else "allow", keep_jit=False)
        outputs = walk.evaluate(*open_jaxpr(jaxpr), [tracked])
        kept.extend(isinstance(output, Factored) for output in outputs)
        plain = [v.materialize() if isinstance(v, Factored) else v for v in outputs]
        return plain, jax.tree.leaves(fn(tracked.materialize(), *inputs))

    for plain, wanted in zip(*both_ways(weight), strict=True):
        assert (plain.shape, plain.dtype) == (wanted.shape, wanted.dtype)
        tolerance = max(ROUNDING[np.dtype(plain.dtype)], ROUNDING[np.dtype(weight.w.dtype)])
        wanted = np.asarray(wanted, np.float64)
        scale = max(1.0, np.abs(wanted).max(initial=0.0))
        np.testing.assert_allclose(
            np.asarray(plain, np.float64), wanted, rtol=0, atol=tolerance * scale
        )
    return all(kept)


def law(test):
    return hypothesis.settings(max_examples=25)(hypothesis.given(st.data())(test))


def normal(data, *shape):
    seed = data.draw(st.integers(0, 2**32))
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


@law
def test_transpose(data):
    weight = data.draw(weights())
    order = data.draw(st.permutations(range(weight.w.ndim)))
    assert hold(lambda w: w.transpose(order), weight)


@law
def test_reshape(data):
    """Any regrouping of the flattened axes; it stays factored where no group mixes kinds."""
    weight = data.draw(weights())
    sizes = [p for n in weight.w.shape for p in ([2, 2] if n == 4 else [n])]
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(sizes) - 1)))))
    shape = [math.prod(sizes[i:j]) for i, j in zip([0, *cuts], [*cuts, len(sizes)], strict=True)]
    hold(lambda w: w.reshape(shape), weight, stays=False)


@law
def test_reshape_within_a_kind(data):
    """Splitting axes and adding axes of size 1 mixes nothing."""
    weight = data.draw(weights())
    shape = [p for n in weight.w.shape for p in data.draw(st.permutations([n, 1]))]
    assert hold(lambda w: w.reshape(shape), weight)
    split = [p for n in weight.w.shape for p in ([2, 2] if n == 4 else [n])]
    assert hold(lambda w: w.reshape(split), weight)


@law
def test_squeeze_and_expand_dims(data):
    weight = data.draw(weights(max_size=2))
    lone = [axis for axis, n in enumerate(weight.w.shape) if n == 1]
    assert hold(lambda w: lax.squeeze(w, lone), weight)
    place = data.draw(st.integers(0, weight.w.ndim))
    assert hold(lambda w: jnp.expand_dims(w, place), weight)


@law
def test_broadcast_in_dim(data):
    weight = data.draw(weights())
    ndim = weight.w.ndim + 2
    places = sorted(data.draw(st.permutations(range(ndim)))[: weight.w.ndim])
    shape = [data.draw(st.integers(1, 3)) for _ in range(ndim)]
    for place, n in zip(places, weight.w.shape, strict=True):
        shape[place] = n if n > 1 else shape[place]
    assert hold(lambda w: lax.broadcast_in_dim(w, shape, places), weight)


@law
def test_slice(data):
    weight = data.draw(weights())
    bounds = [
        sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in weight.w.shape
    ]
    hypothesis.assume(all(start < stop for start, stop in bounds))
    step = data.draw(st.integers(1, 2))
    cut = tuple(slice(start, stop, step) for start, stop in bounds)
    assert hold(lambda w: w[cut], weight)


@law
def test_dynamic_slice(data):
    weight = data.draw(weights())
    starts = [jnp.int32(data.draw(st.integers(-1, n))) for n in weight.w.shape]
    sizes = [data.draw(st.integers(1, n)) for n in weight.w.shape]

    def fn(w):
        return lax.dynamic_slice(w, starts, sizes, allow_negative_indices=False)

    assert hold(fn, weight)


@law
def test_split(data):
    weight = data.draw(weights())
    axis = data.draw(st.integers(0, weight.w.ndim - 1))
    at = data.draw(st.integers(1, weight.w.shape[axis]))
    hypothesis.assume(at < weight.w.shape[axis])
    assert hold(lambda w: jnp.split(w, [at], axis), weight)


@law
def test_rev(data):
    weight = data.draw(weights())
    axes = data.draw(st.sets(st.integers(0, weight.w.ndim - 1)))
    assert hold(lambda w: lax.rev(w, tuple(axes)), weight)


@law
def test_convert_element_type(data):
    weight = data.draw(weights())
    dtype = data.draw(st.sampled_from(["float32", "bfloat16", "float64"]))
    assert hold(lambda w: w.astype(dtype), weight)


@law
def test_scaling_by_a_scalar(data):
    weight = data.draw(weights())
    by = jnp.asarray(data.draw(st.sampled_from([0.5, -3.0])), weight.w.dtype)
    assert hold(lambda w: -(w * by) / by * 2.0, weight)


@law
def test_scaling_along_the_axes_of_one_factor(data):
    weight = data.draw(weights(dtypes=("float64",)))
    kind = data.draw(st.sampled_from(["in", "out"]))
    sizes = [
        n if label in (kind, "stack") else 1
        for n, label in zip(weight.w.shape, weight.factors.layout, strict=True)
    ]
    hypothesis.assume(tuple(sizes) != weight.w.shape)
    by = 2.0 + normal(data, *sizes) ** 2
    assert hold(lambda w: jnp.broadcast_to(by, w.shape) * w / jnp.broadcast_to(by, w.shape), weight)


@law
def test_taking_rows(data):
    """A stacked axis stays factored; an in or out axis is a lookup, which spends the weight."""
    weight = data.draw(weights())
    axis = data.draw(st.integers(0, weight.w.ndim - 1))
    ids = np.array(
        data.draw(st.lists(st.integers(0, weight.w.shape[axis] - 1), min_size=1, max_size=3))
    )
    kept = hold(lambda w: jnp.take(w, ids.reshape(1, -1), axis), weight)
    assert kept == (weight.factors.layout[axis] == "stack")


@law
def test_dot_general(data):
    """Any contraction and batch axes, the weight on either side; at least one axis that shrinks."""
    weight = data.draw(weights())
    axes = data.draw(st.permutations(range(weight.w.ndim)))
    n_contract = data.draw(st.integers(1, len(axes)))
    n_batch = data.draw(st.integers(0, len(axes) - n_contract))
    contract, batch = axes[:n_contract], axes[n_contract : n_contract + n_batch]
    hypothesis.assume(any(weight.factors.layout[axis] != "stack" for axis in contract))
    shared = data.draw(st.permutations([*contract, *batch]))
    x = normal(data, *(weight.w.shape[axis] for axis in shared), 3).astype(weight.w.dtype)
    theirs = [shared.index(axis) for axis in contract], [shared.index(axis) for axis in batch]
    if data.draw(st.booleans()):
        dims = ((theirs[0], contract), (theirs[1], batch))
        hold(lambda w: lax.dot_general(x, w, dims), weight)
    else:
        dims = ((contract, theirs[0]), (batch, theirs[1]))
        hold(lambda w: lax.dot_general(w, x, dims), weight)


@law
def test_ragged_dot(data):
    layout = data.draw(st.sampled_from([("stack", "in", "out"), ("stack", "out", "in")]))
    weight = data.draw(weights(layouts=st.just(layout), dtypes=("float64",)))
    sizes = jnp.array([data.draw(st.integers(0, 2)) for _ in range(weight.w.shape[0])], jnp.int32)
    x = normal(data, max(1, int(sizes.sum())), weight.w.shape[1])
    hypothesis.assume(int(sizes.sum()) == len(x))
    hold(lambda w: lax.ragged_dot(x, w, sizes), weight)


@law
def test_conv(data):
    weight = data.draw(weights(layouts=st.just(("in", "in", "out")), dtypes=("float64",)))
    _width, features, out = weight.w.shape
    groups = data.draw(st.sampled_from([g for g in (1, 2, 3) if out % g == 0]))
    x = normal(data, 2, 6, features * groups)
    stride, dilation = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))

    def fn(w):
        return lax.conv_general_dilated(
            x, w, (stride,), "SAME", rhs_dilation=(dilation,), feature_group_count=groups,
            dimension_numbers=("NHC", "HIO", "NHC"),
        )  # fmt: skip

    hold(fn, weight)


@law
def test_a_chain_of_rearrangements_before_the_product(data):
    weight = data.draw(weights(layouts=st.permutations(["in", "out", "stack"])))
    order = data.draw(st.permutations(range(3)))
    index = data.draw(st.integers(0, weight.w.shape[weight.factors.layout.index("stack")] - 1))

    def fn(w):
        w = w.transpose(order) * 2
        axis = [weight.factors.layout[i] for i in order].index("stack")
        w = lax.index_in_dim(w, index, axis, keepdims=False)
        kinds = [weight.factors.layout[i] for i in order if weight.factors.layout[i] != "stack"]
        w = w if kinds == ["in", "out"] else w.T
        return jnp.ones((3, w.shape[0]), w.dtype) @ w

    hold(fn, weight)
