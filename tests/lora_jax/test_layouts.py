"""`layouts`: what each axis does, read from the function itself."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn, nnx
from jax import lax

import lora_jax


def measured(fn, shape, *inputs):
    return lora_jax.layouts(
        lambda params, *xs: fn(params["w"], *xs), {"w": jnp.ones(shape)}, *inputs
    )["w"]


X = jnp.ones((3, 8))

READ = {
    "matmul": (lambda w: X @ w, (8, 6), "in out"),
    "transposed": (lambda w: X @ w.T, (6, 8), "out in"),
    "size-1 out axis": (lambda w: X @ w, (8, 1), "in out"),
    "heads": (lambda w: jnp.einsum("bi,ihd->bhd", X, w), (8, 2, 3), "in out out"),
    "head-out": (
        lambda w: jnp.einsum("bhd,hdo->bo", jnp.ones((3, 2, 4)), w),
        (2, 4, 5),
        "in in out",
    ),
    "experts": (
        lambda w: jnp.einsum("ecd,edf->ecf", jnp.ones((2, 3, 8)), w),
        (2, 8, 6),
        "stack in out",
    ),
    "experts-by-token": (
        lambda w: jnp.einsum("ti,tio->to", X, w[jnp.array([0, 1, 1])]),
        (2, 8, 6),
        "stack in out",
    ),
    "ragged": (
        lambda w: lax.ragged_dot(X, w, jnp.array([1, 2], jnp.int32)),
        (2, 8, 6),
        "stack in out",
    ),
    "indexed": (lambda w: X @ w[1], (4, 8, 6), "stack in out"),
    "indexed in the middle": (lambda w: X @ w[:, 1], (8, 4, 6), "in stack out"),
    "scanned": (lambda w: lax.scan(lambda x, w: (x @ w, None), X, w)[0], (4, 8, 8), "stack in out"),
    "looped": (lambda w: lax.fori_loop(0, 4, lambda i, x: x @ w[i], X), (4, 8, 8), "stack in out"),
    "lookup": (lambda w: jnp.take(w, jnp.array([1, 2]), axis=0), (9, 8), "in out"),
    "lookup then product": (lambda w: w[jnp.array([1, 2])] @ jnp.ones((8, 5)), (9, 8), "in out"),
    "product then lookup": (lambda w: (X @ w.T, w[jnp.array([1])]), (9, 8), "in out"),
    "reshaped": (lambda w: X @ w.reshape(8, 6), (8, 2, 3), "in out out"),
    "merged in axes": (lambda w: X @ w.reshape(8, 6), (2, 4, 6), "in in out"),
    "scaled and cast": (
        lambda w: X @ (w.astype(jnp.bfloat16) * 2).astype(jnp.float32),
        (8, 6),
        "in out",
    ),
    "conv": (
        lambda w: lax.conv_general_dilated(
            jnp.ones((1, 5, 8)), w, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        ),
        (3, 8, 6),
        "in in out",
    ),
    "vmapped": (lambda w: jax.vmap(jnp.matmul)(jnp.ones((4, 3, 8)), w), (4, 8, 6), "stack in out"),
    "vmapped on one shared input": (
        lambda w: jax.vmap(jnp.matmul, (None, 0))(X, w),
        (4, 8, 6),
        "out in out",
    ),
    "remat": (lambda w: jax.checkpoint(lambda w: X @ w)(w), (8, 6), "in out"),
    "cond": (lambda w: lax.cond(True, lambda w: X @ w, lambda w: X @ w + 1, w), (8, 6), "in out"),
    "bias": (lambda w: X + w[None], (8,), "out"),
    "scanned bias": (
        lambda w: lax.scan(lambda x, w: (x + w[None], None), X, w)[0],
        (4, 8),
        "stack out",
    ),
    "unused": (lambda w: X, (8, 6), "out out"),
}


@pytest.mark.parametrize(("fn", "shape", "layout"), READ.values(), ids=READ.keys())
def test_layout_of(fn, shape, layout):
    assert measured(fn, shape) == tuple(layout.split())


def test_nothing_is_computed_and_shapes_suffice():
    model = nn.DenseGeneral((2, 3))
    x = jax.ShapeDtypeStruct((5, 8), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert lora_jax.layouts(model.apply, variables, x) == {
        "bias": ("out", "out"),
        "kernel": ("in", "out", "out"),
    }


@pytest.mark.parametrize(
    "fn",
    [
        pytest.param(lambda w: X @ jnp.concatenate([w, w], 1), id="concatenated"),
        pytest.param(lambda w: X @ (w / jnp.linalg.norm(w)), id="normalised"),
        pytest.param(lambda w: X @ jnp.where(w > 0, w, 0), id="masked"),
    ],
)
def test_a_matrix_that_meets_something_else_first_is_left_out_and_stays_a_target(fn):
    params = {"w": jnp.ones((8, 8))}
    layouts = lora_jax.layouts(lambda params: fn(params["w"]), params)
    assert layouts.get("w") in (None, ("in", "out"))
    config = lora_jax.LoraConfig(rank=2, alpha=2, targets="all-linear")
    frozen, trainable = lora_jax.split(params, config, jax.random.key(0), layouts=layouts)
    with pytest.warns(lora_jax.MaterializeWarning, match="'w' is materialised"):
        lora_jax.adapt(lambda params: fn(params["w"]))(lora_jax.combine(frozen, trainable))


def test_every_call_measures_anew():
    """An inner jit that was traced before is read again."""
    inner = jax.jit(lambda w: X @ w)
    for _ in range(2):
        assert measured(lambda w: inner(w), (8, 6)) == ("in", "out")


def test_nnx_state():
    graph, state = nnx.split(
        nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0)), nnx.Param
    )

    def apply(state, x):
        return nnx.merge(graph, state)(x)

    layouts = lora_jax.layouts(apply, state, jnp.ones((1, 4, 8)))
    assert layouts["query/kernel"] == ("in", "out", "out")
    assert layouts["out/kernel"] == ("in", "in", "out")


def test_keyword_arguments_and_flags_pass_through():
    def fn(params, *, x, transpose):
        return x @ (params["w"].T if transpose else params["w"])

    layouts = lora_jax.layouts(fn, {"w": jnp.ones((8, 8))}, x=X, transpose=True)
    assert layouts == {"w": ("out", "in")}
