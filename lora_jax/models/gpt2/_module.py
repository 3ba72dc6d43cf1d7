"""GPT-2: a Linen decoder with learned positions, normed before each part.

    x = wte[ids] + wpe[positions]
    x = x + attention(norm(x))
    x = x + mlp(norm(x))            every layer
    logits = norm(x) @ wte.T

With a cache the layers hand it on beside ``x``, each with its own keys and values written in.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models import _layers
from lora_jax.models._attention import attend, causal_mask, explicit_mask, place
from lora_jax.models._cache import Cache, store
from lora_jax.models._layers import (
    ACTIVATIONS,
    attend_with_dropout,
    dense,
    dropout,
    embedding,
    float32_norm,
    head,
    layer_norm,
    layers_of,
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
        query, key, value = (
            checkpoint_name(part.reshape(heads), name)
            for name, part in zip(
                ("query", "key", "value"), jnp.split(qkv, 3, axis=-1), strict=True
            )
        )
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
        mixed = attend_with_dropout(self, query, key, value, mask, rate=self.config.attn_pdrop)
        return checkpoint_name(mixed, "attention")


def _drops_attention(block: Block) -> bool:
    """Whether attention weights are dropped in this call."""
    return not block.deterministic and block.config.attn_pdrop > 0


class Mlp(Block):
    """Two matrices with an activation between them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(B, T, width)`` to the same."""
        config = self.config
        up = checkpoint_name(dense(self, config.n_inner or 4 * config.n_embd, "up")(x), "up")
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
        x = checkpoint_name(x + added, "residual")
        x = x + Mlp(**shared(self), name="mlp")(_norm(self, x, "mlp_norm"))
        return (x, cache), None


class Gpt2(Block):
    """GPT-2 with its language-model head.

    Attributes:
        scan_layers: One ``nn.scan`` over the layers: compiles in the time of one layer; the
            layers' weights are stacked along axis 0.
        layers_per_step: Layers that a step of the scan goes through.
        remat: What each layer recomputes in the backward pass, a policy's name or a bool; see
            `lora_jax.models._remat`.
    """

    scan_layers: bool = False
    layers_per_step: int = 1
    remat: bool | str = False

    def setup(self):
        """Makes the tables, the layers and the head."""
        config = self.config
        vocabulary = (config.vocab_size, config.n_embd)
        self.wte = embedding(self, *vocabulary, "wte")
        self.wpe = embedding(self, config.n_positions, config.n_embd, "wpe")
        self.dropout = nn.Dropout(config.embd_pdrop, deterministic=self.deterministic)
        self.layers = layers_of(self, Layer, in_axes=(0, nn.broadcast))
        self.norm = float32_norm(self, "norm", epsilon=config.layer_norm_epsilon)
        if not config.tie_word_embeddings:
            self.lm_head = head(self, *vocabulary, "lm_head")

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
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
        inputs = {"positions": positions, "segment_ids": segment_ids, "cache": cache}
        found = self.hidden(input_ids, attention_mask, **inputs)
        if cache is None:
            return self.logits(found)
        hidden, cache = found
        return self.logits(hidden), cache

    def hidden(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """What the head sees, of the arguments of ``__call__``.

        Returns:
            ``(B, T, width)``, normed; with a ``cache``, that and the new cache.
        """
        placed = place(
            *(input_ids, attention_mask, positions, segment_ids, cache),
            max_length=self.config.max_length,
        )
        mask = explicit_mask(placed) if _drops_attention(self) else causal_mask(placed)
        x = self.dropout(self.wte(input_ids) + self.wpe(placed.positions))
        x, cache = self._through_layers((x, placed.cache), mask)
        x = self.norm(x).astype(self.dtype)
        return x if cache is None else (x, cache)

    def logits(self, hidden: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """What `hidden` gave, ``(B, T, width)``, to ``(B, T, vocab)``.

        Args:
            hidden: Multiplied in the dtype of the arithmetic.
            dtype: What the products are summed in, and given back in.
        """
        tied = self.config.tie_word_embeddings
        return self.wte.attend(hidden, dtype) if tied else self.lm_head(hidden, dtype)

    @property
    def head(self) -> str:
        """The only entry of the parameters that `logits` reads."""
        return "wte" if self.config.tie_word_embeddings else "lm_head"

    def _through_layers(self, carry: Carry, mask: jax.Array | None) -> Carry:
        count = self.config.n_layer
        if self.scan_layers:
            return self.layers(carry, jnp.arange(count, dtype=jnp.int32), mask)[0]
        return self.layers(carry, [(index, mask) for index in range(count)])


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
    layers_per_step: int = 1,
) -> Gpt2:
    """The module; see `Gpt2`."""
    return Gpt2(
        config,
        dtype=dtype,
        param_dtype=param_dtype,
        scan_layers=scan_layers,
        layers_per_step=layers_per_step,
        remat=remat,
    )
