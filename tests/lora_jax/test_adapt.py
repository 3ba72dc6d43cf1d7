"""`adapt`: what it passes through, what it composes with, and what it says when it materialises."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, PartitionSpec as P

import lora_jax
from lora_jax import LoraConfig, MaterializeWarning
from lora_jax.testing import assert_trees_close, assert_trees_equal

CONFIG = LoraConfig(rank=2, alpha=4, targets=("w",))


def adapted_params(w, seed=0, config=CONFIG):
    """``{"w": LoraWeight}`` with a ``b`` that is not zero, and the merged parameters."""
    frozen, trainable = lora_jax.split({"w": w}, config, jax.random.key(seed))
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    return lora_jax.combine(frozen, trainable), lora_jax.merge(frozen, trainable)


@pytest.fixture
def w():
    return jax.random.normal(jax.random.key(7), (6, 6))


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(8), (4, 6))


def forward(params, x):
    return jnp.tanh(x @ params["w"])


OUTSIDE = {
    "jit": lambda fn, params, x: jax.jit(fn)(params, x),
    "grad-of-the-input": lambda fn, params, x: jax.grad(lambda x: fn(params, x).sum())(x),
    "jvp": lambda fn, params, x: jax.jvp(lambda x: fn(params, x), (x,), (x,)),
    "hessian": lambda fn, params, x: jax.hessian(lambda x: fn(params, x).sum())(x[0]),
    "vmap": lambda fn, params, x: jax.vmap(fn, (None, 0))(params, x),
    "checkpoint": lambda fn, params, x: jax.grad(
        lambda x: jax.checkpoint(lambda x: fn(params, x).sum())(x)
    )(x),
    "eval_shape": lambda fn, params, x: jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(fn, params, x)
    ),
    "jit-of-vmap-of-grad": lambda fn, params, x: jax.jit(
        jax.vmap(jax.grad(lambda x: fn(params, x).sum()))
    )(x),
    "scan": lambda fn, params, x: lax.scan(lambda x, _: (fn(params, x), x), x, None, 3),
    "shard_map": lambda fn, params, x: jax.jit(
        jax.shard_map(
            fn,
            mesh=jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,)),
            in_specs=(P(), P("data")),
            out_specs=P("data"),
        )
    )(params, x),
}


@pytest.mark.parametrize("transform", OUTSIDE.values(), ids=OUTSIDE.keys())
def test_an_adapted_function_composes_with(transform, w, x):
    params, merged = adapted_params(w)
    lifted = lora_jax.adapt(forward, on_materialize="error")
    assert_trees_close(transform(lifted, params, x), transform(forward, merged, x), relative=1e-5)


def test_gradients_flow_under_vmap_over_adapters(w, x):
    """Many adapters at once on one frozen weight: the factors have a batch axis, ``w`` has none."""
    frozen, one = lora_jax.split({"w": w}, CONFIG, jax.random.key(0))
    many = jax.tree.map(lambda leaf: leaf[None] + 0.1 * jnp.arange(3.0).reshape(3, 1, 1), one)
    lifted = lora_jax.adapt(forward, on_materialize="error")

    def loss(trainable):
        return lifted(lora_jax.combine(frozen, trainable), x).sum()

    batched = jax.vmap(jax.grad(loss))(many)
    for i in range(3):
        single = jax.grad(loss)(jax.tree.map(lambda leaf, i=i: leaf[i], many))
        assert_trees_close(jax.tree.map(lambda leaf, i=i: leaf[i], batched), single, relative=1e-5)


def test_shard_map_from_outside_over_sharded_factors(w, x):
    params, merged = adapted_params(w)
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(AxisType.Auto,))
    node = params["w"]
    specs = {"w": jax.tree.map(lambda leaf: P(*([None] * leaf.ndim)), node)}
    lifted = lora_jax.adapt(forward, on_materialize="error")
    sharded = jax.shard_map(lifted, mesh=mesh, in_specs=(specs, P("tensor")), out_specs=P("tensor"))
    assert_trees_close(jax.jit(sharded)(params, x), forward(merged, x), relative=1e-5)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None, *, train, mode="relu"):
        x = nn.Dense(6, name="w")(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = getattr(jax.nn, mode)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return x if mask is None else jnp.where(mask[:, None], x, 0.0)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        pytest.param((None,), {"train": False}, id="none-and-a-flag"),
        pytest.param((), {"train": False, "mode": "gelu"}, id="a-string"),
        pytest.param((np.array([1, 0, 1, 1], bool),), {"train": False}, id="a-numpy-array"),
        pytest.param((), {"train": True, "mutable": ["batch_stats"]}, id="keys-and-mutable"),
        pytest.param((), {"train": False, "capture_intermediates": True}, id="intermediates"),
    ],
)
def test_adapt_takes_what_apply_takes_and_returns_what_it_returns(args, kwargs, x):
    model = Model()
    variables = model.init(jax.random.key(0), x, train=False)
    if kwargs["train"]:
        kwargs = {**kwargs, "rngs": {"dropout": jax.random.key(3)}}
    frozen, trainable = lora_jax.split(variables["params"], CONFIG, jax.random.key(1))
    params = lora_jax.combine(frozen, jax.tree.map(lambda leaf: leaf + 0.1, trainable))
    merged = lora_jax.merge(frozen, jax.tree.map(lambda leaf: leaf + 0.1, trainable))
    lifted = lora_jax.adapt(model.apply, on_materialize="error")
    actual = lifted({**variables, "params": params}, x, *args, **kwargs)
    expected = model.apply({**variables, "params": merged}, x, *args, **kwargs)
    assert_trees_close(actual, expected, relative=1e-5)


def test_results_that_are_no_arrays_come_back_as_they_are(w, x):
    params, _ = adapted_params(w)

    def fn(params, x):
        return {"y": x @ params["w"], "name": "layer", "nothing": None, "count": 3}

    result = lora_jax.adapt(fn)(params, x)
    assert (result["name"], result["nothing"], result["count"]) == ("layer", None, 3)


def test_a_function_of_plain_weights_is_called_as_it_is(w, x):
    def fn(params, x):
        assert not isinstance(x, jax.core.Tracer)
        return x @ params["w"]

    assert_trees_equal(lora_jax.adapt(fn)({"w": w}, x), x @ w)


def test_weights_anywhere_in_the_arguments(w, x):
    params, merged = adapted_params(w)
    other, other_merged = adapted_params(w, seed=1)

    def fn(x, *, layers):
        return x @ layers[0]["w"] @ layers[1]["w"]

    actual = lora_jax.adapt(fn, on_materialize="error")(x, layers=[params, other])
    assert_trees_close(actual, fn(x, layers=[merged, other_merged]), relative=1e-5)


def test_a_strict_configuration(w, x):
    params, _merged = adapted_params(w)
    lifted = lora_jax.adapt(forward, on_materialize="error")
    with jax.numpy_dtype_promotion("strict"), jax.checking_leaks():
        actual = jax.jit(jax.grad(lambda params, x: lifted(params, x).sum()))(params, x)
    assert actual["w"].factors.a.shape == (6, 2)


@pytest.mark.parametrize("compute", ["bfloat16", "float16", "float32"])
def test_float32_factors_meet_a_half_precision_model(compute, w, x):
    params, merged = adapted_params(w.astype(compute))
    assert params["w"].factors.a.dtype == jnp.float32
    lifted = lora_jax.adapt(
        lambda params, x: x.astype(compute) @ params["w"], on_materialize="error"
    )
    actual = lifted(params, x)
    assert actual.dtype == compute
    # Three roundings of the compute dtype: of the merged weight, of the update, of their sum.
    wanted = x.astype(compute).astype(jnp.float32) @ merged["w"].astype(jnp.float32)
    error = jnp.abs(actual.astype(jnp.float32) - wanted).max() / jnp.abs(wanted).max()
    assert error < 6 * jnp.finfo(compute).eps


# --- dropout -------------------------------------------------------------------------------------


def dropout_params(w, key, dropout=0.5, layouts=None):
    config = LoraConfig(rank=2, alpha=2, targets=("w",), dropout=dropout)
    frozen, trainable = lora_jax.split({"w": w}, config, jax.random.key(0), layouts=layouts)
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    return lora_jax.combine(frozen, trainable, dropout_key=key), trainable["w"]


def test_dropout_falls_on_the_input_of_a_alone():
    params, factors = dropout_params(jnp.zeros((64, 8)), jax.random.key(1))
    y = lora_jax.adapt(lambda params, x: x @ params["w"])(params, jnp.eye(64))
    rows = factors.scale * factors.a @ factors.b
    kept = jnp.abs(y) > 1e-7
    # The identity as input: entry (i, i) is kept, then doubled, or dropped; nothing between.
    np.testing.assert_allclose(y[kept.any(1)], 2 * rows[kept.any(1)], rtol=1e-5)
    assert 15 < kept.any(1).sum() < 49  # Binomial(64, 1/2) leaves this range once in 100,000


def test_dropout_is_unbiased():
    params, factors = dropout_params(jnp.zeros((16, 4)), None, dropout=0.25)
    frozen, trainable = {"w": jnp.zeros((16, 4))}, {"w": factors}
    lifted = lora_jax.adapt(lambda params, x: x @ params["w"], on_materialize="error")

    @jax.vmap
    def draw(key):
        return lifted(lora_jax.combine(frozen, trainable, dropout_key=key), jnp.ones((1, 16)))

    draws = draw(jax.random.split(jax.random.key(0), 4000))
    expected = lifted(params, jnp.ones((1, 16)))
    deviation = draws.std(0) / 4000**0.5
    assert (jnp.abs(draws.mean(0) - expected) < 5 * deviation).all()


def test_dropout_is_off_without_a_key_and_follows_its_key(w, x):
    fn = lora_jax.adapt(forward, on_materialize="error")
    off, _ = dropout_params(w, None)
    on, _ = dropout_params(w, jax.random.key(1))
    legacy, _ = dropout_params(w, jax.random.PRNGKey(1))
    other, _ = dropout_params(w, jax.random.key(2))
    assert_trees_equal(fn(on, x), fn(on, x))
    assert_trees_equal(fn(legacy, x), fn(on, x))
    assert jnp.abs(fn(on, x) - fn(off, x)).max() > 1e-3
    assert jnp.abs(fn(on, x) - fn(other, x)).max() > 1e-3


def test_every_layer_of_a_scan_has_its_own_mask():
    w = jnp.zeros((4, 32, 3))

    def fn(params):
        return lax.scan(lambda _, w: (None, jnp.eye(32) @ w), None, params["w"])[1]

    layouts = lora_jax.layouts(fn, {"w": w})
    params, _ = dropout_params(w, jax.random.key(1), layouts=layouts)
    kept = jnp.abs(lora_jax.adapt(fn, on_materialize="error")(params)).sum(-1) > 1e-7
    assert len({tuple(map(bool, layer)) for layer in kept}) == 4


def test_two_uses_of_a_weight_have_two_masks():
    w = jnp.zeros((32, 3))
    params, _ = dropout_params(w, jax.random.key(1))
    fn = lora_jax.adapt(lambda params, x: (x @ params["w"], x @ params["w"]))
    first, second = fn(params, jnp.eye(32))
    assert (first != second).any()


# --- materialising -------------------------------------------------------------------------------


@jax.custom_vjp
def owned(x, w):
    return x @ w


owned.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))

NEEDS_IT_WHOLE = {
    "a nonlinearity": (lambda params, x: x @ jnp.tanh(params["w"]), "`tanh`"),
    "a custom_vjp that takes it": (lambda params, x: owned(x, params["w"]), "`custom_vjp_call`"),
    "a sum with an array": (lambda params, x: x @ (params["w"] + x[0, 0]), "`add`"),
    "inside a scan": (
        lambda params, x: lax.scan(lambda x, _: (x @ jnp.sin(params["w"]), None), x, None, 2)[0],
        "`sin`",
    ),
    "inside a jit": (lambda params, x: jax.jit(lambda w: x @ jnp.exp(w))(params["w"]), "`exp`"),
    "a norm": (lambda params, x: x * jnp.sum(params["w"] ** 2), "`integer_pow`|`square`"),
    "two adapted weights": (lambda params, x: x @ (params["w"] @ params["w"]), "`dot_general`"),
}


@pytest.mark.parametrize(("fn", "primitive"), NEEDS_IT_WHOLE.values(), ids=NEEDS_IT_WHOLE.keys())
def test_what_needs_the_weight_whole_gets_it_and_says_so(fn, primitive, w, x):
    params, merged = adapted_params(w)
    with pytest.warns(MaterializeWarning, match=f"'w' is materialised for {primitive}") as caught:
        actual = lora_jax.adapt(fn)(params, x)
    assert f"{__file__}:" in str(caught[0].message)
    assert_trees_close(actual, fn(merged, x), relative=1e-5)
    with pytest.raises(ValueError, match=f"'w' is materialised for {primitive}"):
        lora_jax.adapt(fn, on_materialize="error")(params, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent = lora_jax.adapt(fn, on_materialize="allow")(params, x)
    assert_trees_equal(silent, actual)


def test_gradients_through_a_materialised_weight_are_right(w, x):
    frozen, trainable = lora_jax.split({"w": w}, CONFIG, jax.random.key(0))
    trainable = jax.tree.map(lambda leaf: leaf + 0.1, trainable)

    def loss(params):
        return owned(x, params["w"]).sum() + jnp.sin(params["w"]).sum()

    lifted = lora_jax.adapt(loss, on_materialize="allow")
    actual = jax.grad(lambda t: lifted(lora_jax.combine(frozen, t)))(trainable)
    expected = jax.grad(lambda t: loss(lora_jax.merge(frozen, t)))(trainable)
    assert_trees_close(actual, expected, relative=1e-5)


def test_a_weight_that_is_returned_is_merged(w):
    params, merged = adapted_params(w)
    with pytest.warns(MaterializeWarning, match="'w' is materialised for the function's result"):
        assert_trees_close(lora_jax.adapt(lambda p: p)(params), merged, relative=1e-6)


def test_the_line_is_the_users_own(w, x):
    params, _ = adapted_params(w)

    def fn(params, x):
        return x @ jnp.cos(params["w"])  # this line

    line = fn.__code__.co_firstlineno + 1
    with pytest.warns(MaterializeWarning, match=f"test_adapt.py:{line}:"):
        lora_jax.adapt(fn)(params, x)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match=r"`on_materialize` is one of .*, got 'maybe'"):
        lora_jax.adapt(forward, on_materialize="maybe")  # type: ignore[arg-type]


# --- what is kept --------------------------------------------------------------------------------


def test_names_and_source_lines_reach_the_compiler(w, x):
    params, _ = adapted_params(w)

    def fn(params, x):
        with jax.named_scope("my_layer"):
            return x @ params["w"]

    text = jax.jit(lora_jax.adapt(fn)).lower(params, x).as_text(debug_info=True)
    assert "my_layer" in text
    assert "test_adapt.py" in text


def test_an_inner_jit_is_traced_once_for_all_its_calls(w, x):
    params, _ = adapted_params(w)
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))

    def fn(params, x):
        for _ in range(5):
            x = layer(params["w"], x)
        return x

    jaxpr = jax.make_jaxpr(lora_jax.adapt(fn, on_materialize="error"))(params, x)
    calls = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "jit"]
    assert len(calls) == 5
    assert len({id(eqn.params["jaxpr"]) for eqn in calls}) == 1


def test_a_remat_policy_is_kept(w, x):
    """What the policy does not save is recomputed: the dots are there twice, and no residual is."""
    params, _ = adapted_params(w)

    def count(policy):
        block = jax.checkpoint(lambda params, x: jnp.sin(jnp.sin(x @ params["w"])), policy=policy)
        lifted = lora_jax.adapt(lambda p, x: block(p, x).sum(), on_materialize="error")
        return str(jax.make_jaxpr(jax.grad(lifted, argnums=1))(params, x)).count("dot_general")

    saved = count(jax.checkpoint_policies.everything_saveable)
    recomputed = count(jax.checkpoint_policies.nothing_saveable)
    assert recomputed > saved


def test_no_gradient_of_the_size_of_w_is_formed(w, x):
    params, _ = adapted_params(jnp.ones((6, 10)))
    node = params["w"]
    lifted = lora_jax.adapt(lambda params, x: (x @ params["w"]).sum(), on_materialize="error")

    def loss(factors):
        return lifted({"w": lora_jax.LoraWeight(node.w, factors, None, "w")}, x)

    jaxpr = jax.make_jaxpr(jax.grad(loss))(node.factors)
    shapes = [var.aval.shape for eqn in jaxpr.eqns for var in eqn.outvars]
    assert (6, 10) not in shapes
    assert (10, 6) not in shapes


def test_functools_and_methods_are_functions(w, x):
    params, merged = adapted_params(w)
    partial = functools.partial(forward, x=x)
    lifted = lora_jax.adapt(partial, on_materialize="error")
    assert_trees_close(lifted(params), partial(merged), relative=1e-5)


def test_static_arguments_under_jit(w, x):
    params, merged = adapted_params(w)

    def fn(params, x, mode):
        return x @ params["w"] if mode == "plain" else x @ params["w"].T

    lifted = jax.jit(lora_jax.adapt(fn, on_materialize="error"), static_argnames="mode")
    assert_trees_close(lifted(params, x, mode="other"), fn(merged, x, "other"), relative=1e-5)


def test_numpy_arguments_keep_their_values(w, x):
    params, merged = adapted_params(w)

    def fn(params, x, count, rows):
        for _ in range(count):
            x = x @ params["w"]
        return x[: rows.max()]

    arguments = (x, np.int64(2), np.array([1, 3]))
    actual = lora_jax.adapt(fn, on_materialize="error")(params, *arguments)
    assert_trees_close(actual, fn(merged, *arguments), relative=1e-5)


def test_constant_results_are_arrays(w, x):
    params, _ = adapted_params(w)
    _, zero = lora_jax.adapt(lambda params, x: (x @ params["w"], jnp.float32(0)))(params, x)
    assert isinstance(zero, jax.Array)


def test_stop_gradient_on_the_weight_stops_the_factors(w, x):
    params, _ = adapted_params(w)
    fn = lora_jax.adapt(lambda params, x: (x @ lax.stop_gradient(params["w"])).sum())
    gradient = jax.grad(fn)(params, x)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_a_complex_input_materialises_the_weight(w, x):
    params, merged = adapted_params(w)
    with pytest.warns(MaterializeWarning, match="`dot_general`"):
        actual = lora_jax.adapt(lambda params, x: jnp.abs((x + 1j * x) @ params["w"]))(params, x)
    assert_trees_close(actual, jnp.abs((x + 1j * x) @ merged["w"]), relative=1e-5)


@pytest.mark.parametrize("fill", [{}, {"fill_value": 1.0}], ids=["nan", "one"])
def test_rows_that_are_not_there_have_no_update_and_no_gradient(fill):
    frozen, trainable = lora_jax.split({"w": jnp.ones((9, 6))}, CONFIG, jax.random.key(0))
    trainable = jax.tree.map(lambda leaf: leaf + 0.1, trainable)
    ids = jnp.array([[1, 2, 9], [3, 9, 9]])

    def loss(params):
        rows = jnp.take(params["w"], ids, axis=0, mode="fill", **fill)
        return jnp.where((ids < 9)[..., None], rows, 0).sum()

    lifted = lora_jax.adapt(loss, on_materialize="error")
    actual = jax.value_and_grad(lambda t: lifted(lora_jax.combine(frozen, t)))(trainable)
    expected = jax.value_and_grad(lambda t: loss(lora_jax.merge(frozen, t)))(trainable)
    assert_trees_close(actual, expected, relative=1e-5)


def test_gathering_along_another_axis_than_the_sharded_one():
    params, merged = adapted_params(jax.random.normal(jax.random.key(7), (8, 16)))
    x = jnp.ones((2, 8))
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(None, "d"), P()), out_specs=P(None, "d"),
        check_vma=False,
    )  # fmt: skip
    def inner(w, x):
        return x @ lax.all_gather(w, "d", axis=0, tiled=True)[8:]

    with pytest.warns(MaterializeWarning, match="`all_gather`"):
        actual = lora_jax.adapt(lambda params, x: inner(params["w"], x))(params, x)
    assert_trees_close(actual, inner(merged["w"], x), relative=1e-5)


PRODUCTS = {
    "dot": (lambda w: jnp.ones((4, 16)) @ w, (16, 3)),
    "ragged": (
        lambda w: lax.ragged_dot(jnp.ones((4, 16)), w, jnp.array([1, 3], jnp.int32)),
        (2, 16, 3),
    ),
    "conv": (
        lambda w: lax.conv_general_dilated(
            jnp.ones((4, 5, 16)), w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        ),
        (3, 16, 3),
    ),
}


@pytest.mark.parametrize(("fn", "shape"), PRODUCTS.values(), ids=PRODUCTS.keys())
def test_every_product_has_dropout(fn, shape):
    w = jnp.zeros(shape)
    layouts = lora_jax.layouts(lambda params: fn(params["w"]), {"w": w})
    lifted = lora_jax.adapt(lambda params: fn(params["w"]), on_materialize="error")
    off, _ = dropout_params(w, None, layouts=layouts)
    draws = []
    for seed in range(2):
        on, _ = dropout_params(w, jax.random.key(seed), layouts=layouts)
        draws.append(lifted(on))
        assert (draws[-1] != lifted(off)).any()
    assert (draws[0] != draws[1]).any()
