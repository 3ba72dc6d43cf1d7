"""The table of functions that `lora_jax.adapt` must lift: one row each, small and wide.

A row builds a function ``fn(params, *inputs)``, its parameters and its inputs for a given width.
None of the functions knows of this library.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn, nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, PartitionSpec as P

# Two float64 evaluations of a few chained products of at most 2^10 terms: 2^-52 * 2^10 * 2^5.
ROUNDING = 1e-11


@dataclasses.dataclass(frozen=True)
class Case:
    """One function to adapt.

    Attributes:
        fn: ``fn(params, *inputs)``.
        params: Its parameters.
        inputs: Its other arguments.
        targets: Patterns of the weights to adapt.
        train: Patterns of the weights to train in full.
        parts: Pattern -> which parts of the out axis to adapt.
        rounding: Relative error that two evaluations of the function may show in float64.
    """

    fn: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    targets: tuple[str, ...] = ("all-linear",)
    train: tuple[str, ...] = ()
    parts: Mapping[str, tuple[bool, ...]] = dataclasses.field(default_factory=dict)
    rounding: float = ROUNDING


CASES: dict[str, Callable[[int], Case]] = {}


def case(build: Callable[[int], Case]) -> Callable[[int], Case]:
    """Adds a row, named as its function."""
    CASES[build.__name__] = functools.cache(build)
    return build


def normal(seed: int, *shape: int) -> jax.Array:
    """Drawn without JAX, which would compile for every shape."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) / shape[-1] ** 0.5)


def linen_params(module: nn.Module, *inputs: Any) -> Any:
    """Parameters of the shapes that the module asks for."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    leaves, treedef = jax.tree.flatten(shapes)
    return treedef.unflatten(
        [normal(100 + seed, *leaf.shape).astype(leaf.dtype) for seed, leaf in enumerate(leaves)]
    )


def linen(module: nn.Module, *inputs: Any, **options: Any) -> Case:
    """A row that applies a Linen module to parameters alone."""
    return Case(
        lambda params, *inputs: module.apply({"params": params}, *inputs),
        linen_params(module, *inputs),
        inputs,
        **options,
    )


# --- Linen ---------------------------------------------------------------------------------------


@case
def linen_dense(n):
    mlp = nn.Sequential([nn.Dense(2 * n), nn.relu, nn.Dense(n)])
    return linen(mlp, normal(1, 4 * n, n), train=("layers_2/bias",))


@case
def linen_dense_general(n):
    module = nn.Sequential([nn.DenseGeneral((2, n)), nn.gelu, nn.DenseGeneral(n, axis=(-2, -1))])
    return linen(module, normal(1, 2 * n, 2, n))


@case
def linen_einsum(n):
    return linen(nn.Einsum((n, 2, n), "...d,dhk->...hk"), normal(1, 4 * n, n))


@case
def linen_attention(n):
    return linen(
        nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=2 * n), normal(1, n, 8, n)
    )


@case
def linen_conv_1d(n):
    return linen(nn.Conv(n, (3,), strides=2), normal(1, 4, n, n))


@case
def linen_conv_2d_dilated(n):
    return linen(nn.Conv(n, (3, 2), kernel_dilation=2, padding="VALID"), normal(1, 4, 16, 17, n))


@case
def linen_conv_grouped(n):
    return linen(nn.Conv(2 * n, (3,), feature_group_count=2), normal(1, 2, n // 2, 2 * n))


@case
def linen_conv_transpose(n):
    return linen(nn.ConvTranspose(n, (3,), strides=(2,), transpose_kernel=True), normal(1, 2, n, n))


@case
def linen_embed(n):
    return linen(nn.Embed(11 + n, n), jnp.array([[1, 2, 3], [4, 4, 0]]), targets=("embedding",))


class Tied(nn.Module):
    n: int

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11 + self.n, self.n)
        return embed.attend(nn.Dense(self.n)(embed(ids)))


@case
def linen_tied_embedding(n):
    return linen(Tied(n), jnp.arange(4 * n).reshape(4, n) % 11, targets=("embedding", "Dense_0"))


class Block(nn.Module):
    n: int

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(self.n, name="down")(nn.relu(nn.Dense(2 * self.n, name="up")(x))), None


class Stack(nn.Module):
    n: int
    block: Any

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            self.block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return scan(self.n, name="layers")(x, None)[0]


@case
def linen_scan(n):
    return linen(Stack(n, Block), normal(1, 4 * n, n))


@case
def linen_remat(n):
    return linen(nn.remat(Block)(n), normal(1, 4 * n, n))


@case
def linen_scan_remat(n):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return linen(Stack(n, nn.remat(Block, policy=policy, prevent_cse=False)), normal(1, 4 * n, n))


@case
def linen_vmap(n):
    experts = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
    return linen(experts(n), normal(1, 3, 2 * n, n))


@case
def linen_vmap_shared(n):
    shared = nn.vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})
    return linen(shared(n), normal(1, 3, 2 * n, n))


@case
def linen_recurrent(n):
    return linen(nn.RNN(nn.LSTMCell(n, param_dtype=jnp.float64)), normal(1, 2 * n, 5, n))


@case
def linen_batch_norm_updates(n):
    module = nn.Sequential([nn.Dense(n), nn.BatchNorm(use_running_average=False), nn.Dense(n)])
    x = normal(1, 4 * n, n)
    statistics = {"layers_1": {"mean": jnp.zeros(n), "var": jnp.ones(n)}}

    def fn(params, x):
        state = {"params": params, "batch_stats": statistics}
        return module.apply(state, x, mutable=["batch_stats"])

    return Case(fn, linen_params(module, x), (x,))


# --- NNX -----------------------------------------------------------------------------------------


def nnx_case(module: nnx.Module, *inputs: Any, **options: Any) -> Case:
    graph, state, rest = nnx.split(module, nnx.Param, ...)
    return Case(
        lambda state, *inputs: nnx.merge(graph, state, rest)(*inputs), state, inputs, **options
    )


@case
def nnx_linear(n):
    return nnx_case(nnx.Linear(n, 2 * n, rngs=nnx.Rngs(0)), normal(1, 4 * n, n), train=("bias",))


@case
def nnx_attention(n):
    attention = nnx.MultiHeadAttention(2, n, 2 * n, decode=False, rngs=nnx.Rngs(0))
    # Flax computes this softmax in float32, whatever the inputs are: 2^-23 * 2^3.
    return nnx_case(attention, normal(1, n, 8, n), rounding=1e-6)


@case
def nnx_scan(n):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return nnx.Linear(n, n, rngs=rngs)

    graph, state = nnx.split(make(nnx.Rngs(0)))

    def fn(state, x):
        def layer(x, state):
            return jnp.tanh(nnx.merge(graph, state)(x)), None

        return lax.scan(layer, x, state)[0]

    return Case(fn, state, (normal(1, 4 * n, n),))


# --- plain functions: how a weight is written ----------------------------------------------------


def plain(fn: Callable[..., Any], shape: tuple[int, ...], *inputs: Any, **options: Any) -> Case:
    """A row on one weight: ``fn(w, *inputs)``."""
    return Case(
        lambda params, *xs: fn(params["w"], *xs), {"w": normal(0, *shape)}, inputs, **options
    )


@case
def matmul(n):
    return plain(lambda w, x: jnp.tanh(x) @ w, (n, 2 * n), normal(1, 4 * n, n))


@case
def weight_first(n):
    return plain(lambda w, x: w @ jnp.tanh(x), (n, 2 * n), normal(1, 2 * n, 4 * n))


@case
def vector_input(n):
    return plain(lambda w, x: jnp.sin(x @ w), (n, n), normal(1, n))


@case
def einsum_weight_first(n):
    return plain(lambda w, x: jnp.einsum("oi,bti->bto", w, x), (2 * n, n), normal(1, 2 * n, 2, n))


@case
def einsum_out_before_batch(n):
    return plain(lambda w, x: jnp.einsum("bi,ihd->hbd", x, w), (n, 2, n), normal(1, 4 * n, n))


@case
def einsum_two_in_axes(n):
    return plain(lambda w, x: jnp.einsum("bhd,hdo->bo", x, w), (2, n, n), normal(1, 2 * n, 2, n))


@case
def einsum_experts(n):
    return plain(lambda w, x: jnp.einsum("ecd,edf->ecf", x, w), (3, n, n), normal(1, 3, 2 * n, n))


@case
def einsum_experts_last(n):
    return plain(lambda w, x: jnp.einsum("ecd,dfe->ecf", x, w), (n, n, 3), normal(1, 3, 2 * n, n))


@case
def einsum_shared_head(n):
    """Multi-head latent attention's absorbed product: heads are a batch, inside the out axis."""

    def fn(w, q):
        return jnp.einsum("bqhd,rhd->bqhr", q, w.reshape(n, 2, n))

    return plain(fn, (n, 2 * n), normal(1, n, 4, 2, n))


@case
def ragged_dot(n):
    sizes = jnp.array([2 * n, 0, n], jnp.int32)
    return plain(lambda w, x: lax.ragged_dot(x, w, sizes), (3, n, n), normal(1, 3 * n, n))


@case
def experts_by_token(n):
    ids = jnp.arange(4 * n) % 3
    return plain(lambda w, x: jnp.einsum("ti,tio->to", x, w[ids]), (3, n, n), normal(1, 4 * n, n))


@case
def used_twice(n):
    return plain(lambda w, x: jnp.tanh(x @ w) @ w, (n, n), normal(1, 4 * n, n))


@case
def tied_lookup_and_head(n):
    ids = jnp.arange(4 * n).reshape(4, n) % 9
    return plain(lambda w: jnp.tanh(jnp.take(w, ids, axis=0)) @ w.T, (9 + n, 2 * n))


@case
def one_hot_lookup(n):
    return plain(lambda w, ids: jax.nn.one_hot(ids, n) @ w, (n, n), jnp.arange(4 * n) % n)


@case
def transposed(n):
    return plain(lambda w, x: x @ w.T, (2 * n, n), normal(1, 4 * n, n))


@case
def reshaped(n):
    return plain(lambda w, x: x @ w.reshape(n, 2 * n), (n, 2, n), normal(1, 4 * n, n))


@case
def split_heads(n):
    def fn(w, x):
        return jnp.einsum("bi,ihd->bhd", x, w.reshape(n, 2, n // 2))

    return plain(fn, (n, n), normal(1, 4 * n, n))


@case
def split_into_three(n):
    def fn(w, x):
        q, k, v = jnp.split(w, 3, axis=1)
        return x @ q + jnp.tanh(x @ k) * (x @ v)

    return plain(fn, (n, 3 * n), normal(1, 4 * n, n))


def _fused(w, x):
    q, k, v = jnp.split(x @ w, 3, axis=1)
    return q + jnp.tanh(k) * v


@case
def fused_in_part(n):
    return plain(_fused, (n, 3 * n), normal(1, 4 * n, n), parts={"w": (True, False, True)})


@case
def fused_in_part_and_split(n):
    def fn(w, x):
        q, k, v = jnp.split(w, 3, axis=1)
        return x @ q + jnp.tanh(x @ k) * (x @ v)

    return plain(fn, (n, 3 * n), normal(1, 4 * n, n), parts={"w": (False, True, True)})


@case
def fused_in_part_and_scanned(n):
    def fn(w, x):
        return lax.scan(lambda x, w: (x + _fused(w, x), None), x, w)[0]

    return plain(fn, (3, n, 3 * n), normal(1, 4 * n, n), parts={"w": (True, False, True)})


@case
def sliced_in(n):
    return plain(lambda w, x: x @ w[:n] + x @ w[n:], (2 * n, n), normal(1, 4 * n, n))


@case
def indexed(n):
    return plain(lambda w, x: jnp.tanh(x @ w[0]) @ w[2] @ w[-2], (3, n, n), normal(1, 4 * n, n))


@case
def indexed_by_value(n):
    def fn(w, x, i):
        return x @ w[i] + x @ lax.dynamic_index_in_dim(w, 1, keepdims=False)

    return plain(fn, (3, n, n), normal(1, 4 * n, n), jnp.int32(2))


@case
def stacked_in_the_middle(n):
    def fn(w, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, jnp.moveaxis(w, 1, 0))

    return plain(fn, (n, 3, n), normal(1, 4 * n, n))


@case
def scaled(n):
    return plain(lambda w, x, s: x @ (-w * 0.5 / s), (n, n), normal(1, 4 * n, n), jnp.float32(0.7))


@case
def scaled_by_column(n):
    return plain(
        lambda w, x, s: x @ (w * s[None, :]), (n, 2 * n), normal(1, 4 * n, n), normal(2, 2 * n)
    )


@case
def scaled_by_row(n):
    return plain(
        lambda w, x, s: x @ (w / s[:, None]), (n, n), normal(1, 4 * n, n), 2 + normal(2, n)
    )


@case
def broadcast_over_batch(n):
    def fn(w, x):
        return lax.batch_matmul(x, jnp.broadcast_to(w, (len(x), n, n)))

    return plain(fn, (n, n), normal(1, 2 * n, 2, n))


@case
def flipped(n):
    return plain(lambda w, x: x @ w[::-1, ::2], (n, 2 * n), normal(1, 4 * n, n))


# --- plain functions: what stands around the weight ----------------------------------------------


@jax.custom_vjp
def fused_loss(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1).mean()


def _fused_forward(logits, labels):
    return fused_loss(logits, labels), (jax.nn.softmax(logits), labels)


def _fused_backward(saved, g):
    probabilities, labels = saved
    return g * (probabilities - jax.nn.one_hot(labels, probabilities.shape[-1])) / len(labels), None


fused_loss.defvjp(_fused_forward, _fused_backward)


@jax.custom_jvp
def soft_clip(x):
    return jnp.tanh(x)


soft_clip.defjvp(
    lambda primals, tangents: (jnp.tanh(*primals), tangents[0] / (1 + primals[0] ** 2))
)


@case
def custom_vjp_loss(n):
    labels = jnp.arange(4 * n) % n
    return plain(lambda w, x: fused_loss(x @ w, labels), (n, n), normal(1, 4 * n, n))


@case
def custom_jvp_activation(n):
    return plain(lambda w, x: soft_clip(soft_clip(x @ w) @ w), (n, n), normal(1, 4 * n, n))


@case
def checkpoint_with_policy(n):
    policy = jax.checkpoint_policies.save_only_these_names("hidden")

    @functools.partial(jax.checkpoint, policy=policy)
    def block(w, x):
        return jnp.tanh(checkpoint_name(x @ w, "hidden")) @ w

    return plain(block, (n, n), normal(1, 4 * n, n))


@case
def fori_loop(n):
    return plain(
        lambda w, x: lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w), x),
        (n, n),
        normal(1, 4 * n, n),
    )


@case
def weight_in_the_carry(n):
    def fn(w, x):
        return lax.fori_loop(0, 3, lambda i, c: (c[0], jnp.tanh(c[1] @ c[0])), (w, x))[1]

    return plain(fn, (n, n), normal(1, 4 * n, n))


@case
def conditional(n):
    def fn(w, x, use_tanh):
        return lax.cond(use_tanh, lambda w, x: jnp.tanh(x @ w), lambda w, x: x @ w.T, w, x)

    return plain(fn, (n, n), normal(1, 4 * n, n), jnp.bool_(True))


@case
def switch(n):
    def fn(w, x, i):
        return lax.switch(i, [lambda x: x, lambda x: x @ w, lambda x: jnp.sin(x @ w @ w)], x)

    return plain(fn, (n, n), normal(1, 4 * n, n), jnp.int32(2))


@case
def jit_in_jit(n):
    inner = jax.jit(lambda w, x: jnp.tanh(x @ w))
    return plain(jax.jit(lambda w, x: inner(w.T, inner(w, x))), (n, n), normal(1, 4 * n, n))


@case
def vmapped_inside(n):
    return plain(lambda w, x: jax.vmap(lambda x: jnp.tanh(x @ w))(x), (n, n), normal(1, 4 * n, n))


@case
def barrier(n):
    def fn(w, x):
        w, x = lax.optimization_barrier((w, x))
        return x @ w

    return plain(fn, (n, n), normal(1, 4 * n, n))


def mesh_of(*names: str, shape: tuple[int, ...]) -> Mesh:
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


@case
def shard_map_tensor_parallel(n):
    mesh = mesh_of("data", "tensor", shape=(2, 4))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(None, "tensor"), P("tensor", None), P("data")),
        out_specs=P("data"),
    )
    def mlp(up, down, x):
        return lax.psum(jnp.tanh(x @ up) @ down, "tensor")

    def fn(params, x):
        return mlp(params["up"], params["down"], x)

    return Case(
        fn, {"up": normal(0, n, 4 * n), "down": normal(2, 4 * n, n)}, (normal(1, 4 * n, n),)
    )


@case
def shard_map_gathered(n):
    mesh = mesh_of("fsdp", shape=(8,))

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("fsdp"), P("fsdp")),
        out_specs=P("fsdp"),
        check_vma=False,
    )
    def fn(w, x):
        return x @ lax.all_gather(w, "fsdp", axis=0, tiled=True)

    return plain(fn, (8 * n, n), normal(1, 8 * n, 8 * n))
