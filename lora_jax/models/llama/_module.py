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

from lora_jax.models import _layers
from lora_jax.models._attention import Placement, attend, causal_mask, explicit_mask, place
from lora_jax.models._cache import Cache, store
from lora_jax.models._layers import ACTIVATIONS, Unrolled, dense, embedding, scanned, shared
from lora_jax.models.llama._config import LlamaConfig
from lora_jax.models.llama._rotary import Angles, angles, rotate


class View(NamedTuple):
    """What a layer sees of the tokens: their angles, and the mask of `causal_mask`."""

    angles: Angles
    mask: jax.Array | None


class Views(NamedTuple):
    """The views of a stack of layers.

    Attributes:
        whole: Of layers that see everything, or of all layers where they are of one kind.
        sliding: Of layers that see a window, where a scan runs over both kinds.
    """

    whole: View
    sliding: View | None = None


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
        query = rotate(self._heads(x, "query", config.num_attention_heads), view.angles)
        key = rotate(self._heads(x, "key", config.num_key_value_heads), view.angles)
        value = self._heads(x, "value", config.num_key_value_heads)
        if cache is not None:
            cache, key, value = store(cache, index, key, value)
        scale = config.query_pre_attn_scalar**-0.5
        mixed = attend(query, key, value, view.mask, scale=scale)
        out = dense(self, config.hidden_size, "out", use_bias=config.out_bias)
        return Carry(out(mixed.reshape((*x.shape[:2], -1))), cache)

    def _heads(self, x: jax.Array, name: str, heads: int) -> jax.Array:
        config = self.config
        bias = config.query_key_value_bias
        split = dense(self, heads * config.head_dim, name, use_bias=bias)(x)
        split = split.reshape((*x.shape[:2], heads, config.head_dim))
        if config.query_key_norm and name != "value":
            return RmsNorm(**shared(self), name=f"{name}_norm")(split)
        return split


class Mlp(Block):
    """``down(act(gate(x)) * up(x))``: Shazeer 2020 (https://arxiv.org/abs/2002.05202)."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(B, T, hidden)`` to the same."""
        config = self.config
        gate, up = (
            dense(self, config.intermediate_size, name, use_bias=config.mlp_bias)(x)
            for name in ("gate", "up")
        )
        x = ACTIVATIONS[config.hidden_act](gate) * up
        return dense(self, config.hidden_size, "down", use_bias=config.mlp_bias)(x)


class Layer(Block):
    """One layer of the decoder; the second result is what ``nn.scan`` stacks: nothing."""

    @nn.compact
    def __call__(self, carry: Carry, which: Which, views: Views) -> tuple[Carry, None]:
        """One layer further."""
        x, view = carry.x, _chosen(views, which.sliding)
        mixed, cache = Attention(**shared(self), name="attention")(
            self._norm(x, "attention_norm"), carry.cache, which.index, view
        )
        x = x + self._out_norm(mixed, "attention_out_norm")
        mixed = Mlp(**shared(self), name="mlp")(self._norm(x, "mlp_norm"))
        return Carry(x + self._out_norm(mixed, "mlp_out_norm"), cache), None

    def _norm(self, x: jax.Array, name: str) -> jax.Array:
        return RmsNorm(**shared(self), name=name)(x)

    def _out_norm(self, x: jax.Array, name: str) -> jax.Array:
        return self._norm(x, name) if self.config.output_norms else x


def _chosen(views: Views, sliding: jax.Array | None) -> View:
    if sliding is None:
        return views.whole
    return jax.tree.map(lambda s, w: jnp.where(sliding, s, w), views.sliding, views.whole)


def _unrolled_layers(block: Block, remat: bool | str, carry: Carry, placed: Placement) -> Carry:
    """Through the layers one by one, each with the view of its kind."""
    kinds = block.config.sliding_layers
    views = {sliding: Views(_view(block.config, placed, sliding)) for sliding in set(kinds)}
    layers = Unrolled(**shared(block), layer=Layer, remat=remat, name="layers")
    return layers(carry, [(Which(i), views[sliding]) for i, sliding in enumerate(kinds)])


def _scanned_layers(block: Block, remat: bool | str, carry: Carry, placed: Placement) -> Carry:
    """Through the layers by one scan; where they are of both kinds each chooses its view."""
    config = block.config
    which = Which(jnp.arange(config.num_hidden_layers, dtype=jnp.int32))
    if len(set(config.sliding_layers)) == 1:
        views = Views(_view(config, placed, config.sliding_layers[0]))
    else:
        which = which._replace(sliding=jnp.asarray(config.sliding_layers))
        views = _both_views(config, placed)
    return scanned(block, Layer, remat, in_axes=(0, nn.broadcast))(carry, which, views)[0]


def _view(config: LlamaConfig, placed: Placement, sliding: bool) -> View:
    own = config.sliding_rope if sliding else None
    rope = config.rope if own is None else own
    window = config.sliding_window if sliding else None
    turned = angles(rope, config.head_dim, placed.positions)
    return View(turned, causal_mask(placed, window))


def _both_views(config: LlamaConfig, placed: Placement) -> Views:
    """Both views, with masks to choose between where one of them has one."""
    whole, sliding = (_view(config, placed, kind) for kind in (False, True))
    if whole.mask is None and sliding.mask is not None:
        whole = whole._replace(mask=explicit_mask(placed))
    return Views(whole, sliding)


class Llama(Block):
    """A decoder with its head: the logits of the next token after every token.

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
        config = self.config
        placed = place(
            *(input_ids, attention_mask, positions, segment_ids, cache),
            max_length=config.max_length,
        )
        table = embedding(self, config.vocab_size, config.hidden_size, "embed_tokens")
        x = table(input_ids)
        if config.scaled_embeddings:  # rounded first, as in the published implementation
            x = x * jnp.asarray(config.hidden_size**0.5, self.dtype)
        layers = _scanned_layers if self.scan_layers else _unrolled_layers
        x, new_cache = layers(self, self.remat, Carry(x, placed.cache), placed)
        x = RmsNorm(**shared(self), name="norm")(x)
        head = table.attend if config.tie_word_embeddings else self._head()
        logits = head(x).astype(jnp.float32)
        return logits if cache is None else (logits, new_cache)

    def _head(self) -> nn.Dense:
        return dense(self, self.config.vocab_size, "lm_head", use_bias=False)


def make_module(
    config: LlamaConfig,
    task: str,
    *,
    dtype: Any,
    param_dtype: Any,
    scan_layers: bool,
    remat: bool | str,
) -> Llama:
    """The module; see `Llama`."""
    return Llama(config, dtype=dtype, param_dtype=param_dtype, scan_layers=scan_layers, remat=remat)
