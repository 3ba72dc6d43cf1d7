"""What the families build their modules of: one set of choices, handed from part to part.

    class Mlp(Block):
        @nn.compact
        def __call__(self, x):
            up = dense(self, self.config.intermediate_size, "up")(x)
            return dropout(self, dense(self, x.shape[-1], "down")(up), rate=0.1)

    Mlp(**shared(self), name="mlp")

Layers are modules ``layer(carry, *inputs) -> (carry, None)``, of which `layers_of` makes
``layers/0``, ``layers/1``, ... or one stack ``layers`` with a leading axis.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.models._remat import remat_layer

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


class Block(nn.Module):
    """What all parts of a model are told.

    Attributes:
        config: The family's; ``num_hidden_layers`` and ``initializer_range`` are read here.
        dtype: What matrices are multiplied in. Softmax, norms and rotations run in float32.
        param_dtype: What ``init`` makes weights in.
        deterministic: Whether dropout is off.
    """

    config: Any
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    deterministic: bool = True


def shared(block: Block) -> dict[str, Any]:
    """What a block tells its parts."""
    names = ("config", "dtype", "param_dtype", "deterministic")
    return {name: getattr(block, name) for name in names}


def dense(block: Block, features: int, name: str, **options: Any) -> nn.Dense:
    """A matrix ``(in, features)`` and its bias; ``options`` are further ones of ``nn.Dense``."""
    return nn.Dense(
        features,
        dtype=block.dtype,
        param_dtype=block.param_dtype,
        kernel_init=_normal(block),
        name=name,
        **options,
    )


def layer_norm(block: Block, x: jax.Array, name: str, *, epsilon: float) -> jax.Array:
    """Norms the last axis in float32, rounded once, to the block's dtype."""
    return float32_norm(block, name, epsilon=epsilon)(x).astype(block.dtype)


def float32_norm(block: Block, name: str, *, epsilon: float) -> nn.LayerNorm:
    """A layer norm of the last axis, whose result is float32."""
    return nn.LayerNorm(
        epsilon=epsilon,
        dtype=jnp.float32,
        param_dtype=block.param_dtype,
        use_fast_variance=False,
        name=name,
    )


def dropout(block: Block, x: jax.Array, rate: float) -> jax.Array:
    """Drops entries, unless the block is deterministic."""
    return nn.Dropout(rate, deterministic=block.deterministic)(x)


def attend_with_dropout(
    block: Block,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    rate: float,
) -> jax.Array:
    """Softmax attention with its weights written out, because fused attention cannot drop them.

    Args:
        block: Whose dtype and dropout are used.
        query: ``(B, T, heads, head_dim)``.
        key: ``(B, S, heads, head_dim)``.
        value: Likewise.
        mask: Bool, broadcast to ``(B, heads, T, S)``: which keys a query attends to.
        rate: Of dropout.

    Returns:
        ``(B, T, heads, head_dim)``.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
    scores /= query.shape[-1] ** 0.5
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(block.dtype)
    weights = dropout(block, weights, rate)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


class Embedding(nn.Module):
    """A table of vectors: rows looked up, or (tied output head) multiplied by.

    ``nn.Embed`` has a special case for a table of one row, which RoBERTa's token types are;
    it does not pass with rank promotion forbidden.
    """

    rows: int
    features: int
    dtype: Any
    param_dtype: Any
    initializer: jax.nn.initializers.Initializer

    def setup(self):
        """Makes the table, ``(rows, features)``."""
        shape = (self.rows, self.features)
        self.embedding = self.param("embedding", self.initializer, shape, self.param_dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """``ids (...)`` to ``(..., features)``; an id outside the table gives NaN."""
        return jnp.take(self.embedding, ids, axis=0, mode="fill").astype(self.dtype)

    def attend(self, x: jax.Array, sums: Any = None) -> jax.Array:
        """``x (..., features)`` to ``(..., rows)``: ``x @ table.T``, summed as `Head` does."""
        return _product(x, self.embedding, 1, self.dtype, sums)


def embedding(block: Block, rows: int, features: int, name: str) -> Embedding:
    """A table ``(rows, features)``."""
    return Embedding(rows, features, block.dtype, block.param_dtype, _normal(block), name=name)


class Head(nn.Module):
    """A matrix ``(features, rows)`` to multiply by, whose sums are of a dtype of the caller's."""

    rows: int
    features: int
    dtype: Any
    param_dtype: Any
    initializer: jax.nn.initializers.Initializer

    def setup(self):
        """Makes the matrix."""
        shape = (self.features, self.rows)
        self.kernel = self.param("kernel", self.initializer, shape, self.param_dtype)

    def __call__(self, x: jax.Array, sums: Any = None) -> jax.Array:
        """``x (..., features)`` to ``(..., rows)``, of dtype ``sums``; None is that of ``x``."""
        return _product(x, self.kernel, 0, self.dtype, sums)


def head(block: Block, rows: int, features: int, name: str) -> Head:
    """A matrix ``(features, rows)``."""
    return Head(rows, features, block.dtype, block.param_dtype, _normal(block), name=name)


def _product(x: jax.Array, matrix: jax.Array, axis: int, dtype: Any, sums: Any) -> jax.Array:
    """Sums ``x`` times ``matrix`` over the last axis of one and ``axis`` of the other."""
    axes = (((x.ndim - 1,), (axis,)), ((), ()))
    return lax.dot_general(x.astype(dtype), matrix.astype(dtype), axes, preferred_element_type=sums)


class Unrolled(Block, kw_only=True):
    """The layers one after another, named by their index.

    Attributes:
        layer: The class of a layer, a `Block`.
        remat: A policy of `lora_jax.models._remat`.
    """

    layer: type[Block]
    remat: bool | str

    @nn.compact
    def __call__(self, carry: Any, inputs: Sequence[tuple]) -> Any:
        """Through all layers; ``inputs`` are each layer's own."""
        layer = remat_layer(self.layer, self.remat, scanned=False)
        for index, own in enumerate(inputs):
            carry, _ = layer(**shared(self), name=str(index))(carry, *own)  # pyright: ignore
        return carry


def layers_of(block: Any, layer: type[Block], *, in_axes: Any) -> Any:
    """All layers, as the submodule ``layers`` of a block that says how they are stored and run.

    Args:
        block: Its ``scan_layers``, ``layers_per_step`` and ``remat`` are read.
        layer: The class of a layer.
        in_axes: Of each input, for a scan: 0 where a layer has a slice of its own,
            ``nn.broadcast`` where all have the same.

    Returns:
        `Unrolled`, or with ``scan_layers`` one ``nn.scan``: ``(carry, *inputs) -> (carry, None)``.

    Raises:
        ValueError: ``layers_per_step`` is below 1, or above 1 without a scan.
    """
    step = block.layers_per_step
    if step < 1 or (step > 1 and not block.scan_layers):
        raise ValueError(
            f"`layers_per_step` must be at least 1, and 1 without `scan_layers`; got {step}."
        )
    if not block.scan_layers:
        return Unrolled(**shared(block), layer=layer, remat=block.remat, name="layers")
    scan = nn.scan(
        remat_layer(layer, block.remat, scanned=True),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=block.config.num_hidden_layers,
        unroll=step,
    )
    return scan(**shared(block), name="layers")


def _normal(block: Block) -> jax.nn.initializers.Initializer:
    return nn.initializers.normal(block.config.initializer_range)
