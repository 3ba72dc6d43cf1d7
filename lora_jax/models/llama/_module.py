"""The decoder of the Llama family: causal layers of attention and gated MLP, normed before.

    x = x + out(attention(rotate(query(n)), rotate(key(n)), value(n)))      n = norm(x)
    x = x + down(act(gate(n)) * up(n))                                      n = norm(x)

What its members do differently are fields of `LlamaConfig`; `lora_jax.models.llama` names the
papers.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models import _layers
from lora_jax.models._attention import Placement, attend, place
from lora_jax.models._cache import Cache, store
from lora_jax.models._layers import ACTIVATIONS, dense, embedding, head, layers_of, shared
from lora_jax.models.llama._config import LlamaConfig
from lora_jax.models.llama._rotary import Angles, rotate
from lora_jax.models.llama._views import View, Views, both_views, chosen, view_of


class Carry(NamedTuple):
    """What goes from layer to layer: ``x (B, T, hidden)`` and the cache if there is one."""

    x: jax.Array
    cache: Cache | None


class Which(NamedTuple):
    """Which layer it is: its index, and whether it slides where views are of both kinds."""

    index: int | jax.Array
    sliding: jax.Array | None = None


class Block(_layers.Block):
    """A part of the decoder. Nothing in it has dropout, so ``deterministic`` changes nothing."""

    config: LlamaConfig


class RmsNorm(Block):
    """``x / sqrt(mean(x ** 2) + eps) * (offset + scale)``, in float32, rounded once.

    Zhang and Sennrich 2019 (https://arxiv.org/abs/1910.07467). Gemma stores its weights about 0.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(..., features)`` to the same."""
        offset = self.config.norm_offset
        start = nn.initializers.constant(1.0 - offset)
        scale = self.param("scale", start, (x.shape[-1],), self.param_dtype)
        scale = offset + scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        wide = x.astype(jnp.float32)
        mean = jnp.mean(wide**2, axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean + self.config.rms_norm_eps) * scale).astype(self.dtype)


class Attention(Block):
    """Causal attention with rotary positions; several queries may share a key and a value."""

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Cache | None, index: int | jax.Array, view: View
    ) -> Carry:
        """``x (B, T, hidden)`` to the same; the cache with layer ``index`` filled in."""
        config = self.config
        query = self._heads(x, "query", config.num_attention_heads, view.angles)
        key = self._heads(x, "key", config.num_key_value_heads, view.angles)
        value = self._heads(x, "value", config.num_key_value_heads)
        if cache is not None:
            cache, key, value = store(cache, index, key, value)
        scale = config.query_pre_attn_scalar**-0.5
        mixed = attend(query, key, value, view.mask, scale=scale)
        out = dense(self, config.hidden_size, "out", use_bias=config.out_bias)
        return Carry(out(mixed.reshape((*x.shape[:2], -1))), cache)

    def _heads(
        self, x: jax.Array, name: str, heads: int, turned: Angles | None = None
    ) -> jax.Array:
        """``(B, T, heads, head_dim)``, normed where the config says so, and rotated."""
        config = self.config
        bias = config.query_key_value_bias
        split = dense(self, heads * config.head_dim, name, use_bias=bias)(x)
        split = split.reshape((*x.shape[:2], heads, config.head_dim))
        normed = config.query_key_norm and name != "value"
        if normed:
            split = RmsNorm(**shared(self), name=f"{name}_norm")(checkpoint_name(split, name))
        split = split if turned is None else rotate(split, turned)
        return split if normed else checkpoint_name(split, name)


class Mlp(Block):
    """``down(act(gate(x)) * up(x))``: Shazeer 2020 (https://arxiv.org/abs/2002.05202)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(B, T, hidden)`` to the same."""
        config = self.config
        gate, up = (
            checkpoint_name(
                dense(self, config.intermediate_size, name, use_bias=config.mlp_bias)(x), name
            )
            for name in ("gate", "up")
        )
        x = ACTIVATIONS[config.hidden_act](gate) * up
        return dense(self, config.hidden_size, "down", use_bias=config.mlp_bias)(x)


class Layer(Block):
    """One layer of the decoder; the second result is what ``nn.scan`` stacks: nothing."""

    @nn.compact
    def __call__(self, carry: Carry, which: Which, views: Views) -> tuple[Carry, None]:
        """One layer further."""
        x, view = carry.x, chosen(views, which.sliding)
        mixed, cache = Attention(**shared(self), name="attention")(
            self._norm(x, "attention_norm"), carry.cache, which.index, view
        )
        x = self._add(x, mixed, "out", "attention_out_norm")
        mixed = Mlp(**shared(self), name="mlp")(self._norm(x, "mlp_norm"))
        return Carry(self._add(x, mixed, "down", "mlp_out_norm"), cache), None

    def _norm(self, x: jax.Array, name: str) -> jax.Array:
        return RmsNorm(**shared(self), name=name)(x)

    def _add(self, x: jax.Array, mixed: jax.Array, kept: str, norm: str) -> jax.Array:
        """What a part computed, added to the stream, after its norm if the config says so."""
        if self.config.output_norms:
            return x + self._norm(checkpoint_name(mixed, kept), norm)
        return checkpoint_name(x + mixed, "residual")


def _unrolled_layers(layers: nn.Module, config: LlamaConfig, x: Carry, placed: Placement) -> Carry:
    """Through the layers one by one, each with the view of its kind."""
    kinds = config.sliding_layers
    views = {sliding: Views(view_of(config, placed, sliding)) for sliding in set(kinds)}
    return layers(x, [(Which(i), views[sliding]) for i, sliding in enumerate(kinds)])


def _scanned_layers(layers: nn.Module, config: LlamaConfig, x: Carry, placed: Placement) -> Carry:
    """Through the layers by one scan; where they are of both kinds each chooses its view."""
    which = Which(jnp.arange(config.num_hidden_layers, dtype=jnp.int32))
    if len(set(config.sliding_layers)) == 1:
        views = Views(view_of(config, placed, config.sliding_layers[0]))
    else:
        which = which._replace(sliding=jnp.asarray(config.sliding_layers))
        views = both_views(config, placed)
    return layers(x, which, views)[0]


class Llama(Block):
    """A decoder with its head: the logits of the next token after every token.

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
        vocabulary = (config.vocab_size, config.hidden_size)
        self.embed_tokens = embedding(self, *vocabulary, "embed_tokens")
        self.layers = layers_of(self, Layer, in_axes=(0, nn.broadcast))
        self.norm = RmsNorm(**shared(self))
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
        """Runs the decoder.

        Args:
            input_ids: Ints ``(B, T)``.
            attention_mask: ``(B, T)``, zero where padded, at either side; None if nothing is.
            positions: Ints ``(B, T)``; None counts the tokens that are not padding, in each
                segment from 0, and after those that the cache holds.
            segment_ids: Ints ``(B, T)``: of packed sequences, each one run of an id of its own;
                a token attends to its own segment only. 0 is padding.
            cache: Of `lora_jax.models.init_cache`; the tokens come after those that it holds.

        Returns:
            Logits ``(B, T, vocab)`` float32; with a ``cache``, logits and the new cache.

        Raises:
            ValueError: Inputs do not fit each other or the model; see `_attention.place`.
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
            ``(B, T, hidden)``, normed; with a ``cache``, that and the new cache.
        """
        config = self.config
        placed = place(
            *(input_ids, attention_mask, positions, segment_ids, cache),
            max_length=config.max_length,
        )
        x = self.embed_tokens(input_ids)
        if config.scaled_embeddings:  # rounded first, as in the published implementation
            x = x * jnp.asarray(config.hidden_size**0.5, self.dtype)
        through = _scanned_layers if self.scan_layers else _unrolled_layers
        x, new_cache = through(self.layers, config, Carry(x, placed.cache), placed)
        x = self.norm(x)
        return x if cache is None else (x, new_cache)

    def logits(self, hidden: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """What `hidden` gave, ``(B, T, hidden)``, to ``(B, T, vocab)``.

        Args:
            hidden: Multiplied in the dtype of the arithmetic.
            dtype: What the products are summed in, and given back in.
        """
        tied = self.config.tie_word_embeddings
        return self.embed_tokens.attend(hidden, dtype) if tied else self.lm_head(hidden, dtype)

    @property
    def head(self) -> str:
        """The only entry of the parameters that `logits` reads."""
        return "embed_tokens" if self.config.tie_word_embeddings else "lm_head"


def make_module(
    config: LlamaConfig,
    task: str,
    *,
    dtype: Any,
    param_dtype: Any,
    scan_layers: bool,
    remat: bool | str,
    layers_per_step: int = 1,
) -> Llama:
    """The module; see `Llama`."""
    return Llama(
        config,
        dtype=dtype,
        param_dtype=param_dtype,
        scan_layers=scan_layers,
        layers_per_step=layers_per_step,
        remat=remat,
    )
