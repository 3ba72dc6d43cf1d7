"""GPT-2: a Linen decoder with learned positions, normed before each part.

    x = wte[ids] + wpe[positions]
    x = x + attention(norm(x))
    x = x + mlp(norm(x))            every layer
    logits = norm(x) @ wte.T

With a cache the layers hand it on beside ``x``, each with its own keys and values written in.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.models import _layers
from lora_jax.models._attention import attend, causal_mask, explicit_mask, place
from lora_jax.models._cache import Cache, store
from lora_jax.models._layers import (
    ACTIVATIONS,
    Embedding,
    Unrolled,
    attend_with_dropout,
    dense,
    dropout,
    embedding,
    layer_norm,
    scanned,
    shared,
)
from lora_jax.models.gpt2._config import Gpt2Config


class Block(_layers.Block):
    """A part of GPT-2."""

    config: Gpt2Config


class Attention(Block):
    """Causal self-attention; query, key and value come from one product."""

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Cache | None, index: jax.Array | int, mask: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        """``x (B, T, width)`` to the same, and the cache with this layer's keys and values."""
        config = self.config
        heads = (*x.shape[:2], config.n_head, config.head_dim)
        qkv = dense(self, 3 * config.n_embd, "qkv")(x)
        query, key, value = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))
        if cache is not None:
            cache, key, value = store(cache, index, key, value)
        mixed = self._attend(query, key, value, mask)
        out = dense(self, config.n_embd, "out")(mixed.reshape(x.shape))
        return dropout(self, out, config.resid_pdrop), cache

    def _attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
    ) -> jax.Array:
        if not _drops_attention(self):
            return attend(query, key, value, mask)
        assert mask is not None  # `Gpt2` makes one where attention drops weights
        return attend_with_dropout(self, query, key, value, mask, rate=self.config.attn_pdrop)


def _drops_attention(block: Block) -> bool:
    """Whether attention weights are dropped in this call."""
    return not block.deterministic and block.config.attn_pdrop > 0


class Mlp(Block):
    """Two matrices with an activation between them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(B, T, width)`` to the same."""
        config = self.config
        up = dense(self, config.n_inner or 4 * config.n_embd, "up")(x)
        down = dense(self, config.n_embd, "down")(ACTIVATIONS[config.activation_function](up))
        return dropout(self, down, config.resid_pdrop)


Carry = tuple[jax.Array, Cache | None]
"""What passes from layer to layer: the residual stream ``(B, T, width)`` and the cache."""


class Layer(Block):
    """One layer; the second result is what ``nn.scan`` stacks: nothing."""

    @nn.compact
    def __call__(
        self, carry: Carry, index: jax.Array | int, mask: jax.Array | None
    ) -> tuple[Carry, None]:
        """Adds attention and MLP, each of the normed stream, to the stream."""
        x, cache = carry
        attention = Attention(**shared(self), name="attention")
        added, cache = attention(_norm(self, x, "attention_norm"), cache, index, mask)
        x = x + added
        x = x + Mlp(**shared(self), name="mlp")(_norm(self, x, "mlp_norm"))
        return (x, cache), None


class Gpt2(Block):
    """GPT-2 with its language-model head.

    Attributes:
        scan_layers: One ``nn.scan`` over the layers: compiles in the time of one layer; the
            layers' weights are stacked along axis 0.
        remat: What each layer recomputes in the backward pass, a policy's name or a bool; see
            `lora_jax.models._remat`.
    """

    scan_layers: bool = False
    remat: bool | str = False

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> jax.Array | tuple[jax.Array, Cache]:
        """Runs the model on ``(B, T)`` tokens.

        Args:
            input_ids: Integers ``(B, T)``.
            attention_mask: ``(B, T)``, zero or False where padded, at either side. None keeps
                every token.
            positions: Integers ``(B, T)``, rows of the table of positions; one outside it gives
                NaN. None counts the kept tokens before each token, in its segment if there are
                segments and from the cache's tokens if there is a cache.
            segment_ids: Integers ``(B, T)``: tokens attend within their own segment only; 0 is
                padding. None makes each row one segment.
            cache: Keys and values of the tokens before these, of `lora_jax.models.init_cache`.

        Returns:
            Logits in float32, ``(B, T, vocab)``; with a ``cache``, logits and the new cache.

        Raises:
            ValueError: Shapes or dtypes of the arguments are not these, the sequence is longer
                than the table of positions, or segments meet a cache.
        """
        config = self.config
        placed = place(
            input_ids, attention_mask, positions, segment_ids, cache, max_length=config.max_length
        )
        mask = explicit_mask(placed) if _drops_attention(self) else causal_mask(placed)
        words = embedding(self, config.vocab_size, config.n_embd, "wte")
        places = embedding(self, config.n_positions, config.n_embd, "wpe")
        x = words(input_ids) + places(placed.positions)
        x = dropout(self, x, config.embd_pdrop)
        x, cache = self._layers((x, placed.cache), mask)
        logits = self._head(_norm(self, x, "norm"), words)
        return logits if cache is None else (logits, cache)

    def _layers(self, carry: Carry, mask: jax.Array | None) -> Carry:
        count = self.config.n_layer
        if self.scan_layers:
            layers = scanned(self, Layer, self.remat, in_axes=(0, nn.broadcast))
            return layers(carry, jnp.arange(count, dtype=jnp.int32), mask)[0]
        layers = Unrolled(**shared(self), layer=Layer, remat=self.remat, name="layers")
        return layers(carry, [(index, mask) for index in range(count)])

    def _head(self, x: jax.Array, words: Embedding) -> jax.Array:
        """Logits, summed in float32 whatever the dtype of the arithmetic."""
        product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
        if self.config.tie_word_embeddings:
            table = words.embedding.astype(self.dtype)
            return product(x, table, (((2,), (1,)), ((), ())))
        size = self.config.vocab_size
        return dense(self, size, "lm_head", use_bias=False, dot_general=product)(x)


def _norm(block: Block, x: jax.Array, name: str) -> jax.Array:
    return layer_norm(block, x, name, epsilon=block.config.layer_norm_epsilon)


def make_module(
    config: Gpt2Config,
    task: str,
    *,
    dtype: Any,
    param_dtype: Any,
    scan_layers: bool,
    remat: bool | str,
) -> Gpt2:
    """The module; see `Gpt2`."""
    return Gpt2(config, dtype=dtype, param_dtype=param_dtype, scan_layers=scan_layers, remat=remat)
