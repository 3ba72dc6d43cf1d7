"""What the families build their modules of: one set of choices, handed from part to part.

    class Mlp(Block):
        @nn.compact
        def __call__(self, x):
            up = dense(self, self.config.intermediate_size, "up")(x)
            return dropout(self, dense(self, x.shape[-1], "down")(up), rate=0.1)

    Mlp(**shared(self), name="mlp")

Layers are modules ``layer(carry, *inputs) -> (carry, None)``, of which `Unrolled` makes
``layers/0``, ``layers/1``, ... and `scanned` one stack ``layers`` with a leading axis.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

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
    norm = nn.LayerNorm(
        epsilon=epsilon,
        dtype=jnp.float32,
        param_dtype=block.param_dtype,
        use_fast_variance=False,
        name=name,
    )
    return norm(x).astype(block.dtype)


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

    def attend(self, x: jax.Array) -> jax.Array:
        """``x (..., features)`` to ``(..., rows)``: ``x @ table.T``."""
        return x.astype(self.dtype) @ self.embedding.astype(self.dtype).T


def embedding(block: Block, rows: int, features: int, name: str) -> Embedding:
    """A table ``(rows, features)``."""
    return Embedding(rows, features, block.dtype, block.param_dtype, _normal(block), name=name)


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


def scanned(block: Block, layer: type[Block], remat: bool | str, *, in_axes: Any) -> nn.Module:
    """The layers as one ``nn.scan``: ``scanned(...)(carry, *inputs) -> (carry, None)``.

    Args:
        block: The layers become its submodule ``layers``.
        layer: The class of a layer.
        remat: A policy of `lora_jax.models._remat`.
        in_axes: Of each input: 0 where a layer has a slice of its own, ``nn.broadcast`` where
            all have the same.
    """
    scan = nn.scan(
        remat_layer(layer, remat, scanned=True),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=block.config.num_hidden_layers,
    )
    return scan(**shared(block), name="layers")


def _normal(block: Block) -> jax.nn.initializers.Initializer:
    return nn.initializers.normal(block.config.initializer_range)
