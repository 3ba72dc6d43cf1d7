"""GPT-2: a Linen decoder with learned positions, and the names of the published weights.

    x = wte[ids] + wpe[positions]
    x = x + attention(norm(x));  x = x + mlp(norm(x))        every layer
    logits = norm(x) @ wte.T

Query, key and value are the three equal parts of one kernel, ``attention/qkv (in, 3 * in)``, as
the published weights have them; `LoraConfig.parts` adapts some of the three. With
``scan_layers`` the layers are one ``nn.scan`` and their weights carry a leading axis of layers.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.io.names import NameTable, Row, expand
from lora_jax.models._attention import attend, causal_mask, explicit_mask, place
from lora_jax.models._cache import Cache, store
from lora_jax.models._gpt2_config import (
    Gpt2Config as Gpt2Config,
    config_fields as config_fields,
    read_config as read_config,
)
from lora_jax.models._remat import remat_layer
from lora_jax.models.bert import ACTIVATIONS, Embedding

MODEL_TYPES = ("gpt2",)
TASKS = ("causal-lm",)


class Block(nn.Module):
    """What all parts of the model are told.

    Attributes:
        dtype: What matrices are multiplied in. Softmax and layer norms run in float32.
        param_dtype: What ``init`` makes weights in.
        deterministic: Whether dropout is off.
    """

    config: Gpt2Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    deterministic: bool = True


def _shared(block: Block) -> dict[str, Any]:
    names = ("config", "dtype", "param_dtype", "deterministic")
    return {name: getattr(block, name) for name in names}


def _normal(block: Block) -> jax.nn.initializers.Initializer:
    return nn.initializers.normal(block.config.initializer_range)


def _dense(block: Block, features: int, name: str) -> nn.Dense:
    return nn.Dense(
        features,
        dtype=block.dtype,
        param_dtype=block.param_dtype,
        kernel_init=_normal(block),
        name=name,
    )


def _norm(block: Block, x: jax.Array, name: str) -> jax.Array:
    norm = nn.LayerNorm(
        epsilon=block.config.layer_norm_epsilon,
        dtype=jnp.float32,
        param_dtype=block.param_dtype,
        use_fast_variance=False,
        name=name,
    )
    return norm(x).astype(block.dtype)


def _dropout(block: Block, x: jax.Array, rate: float) -> jax.Array:
    return nn.Dropout(rate, deterministic=block.deterministic)(x)


class Attention(Block):
    """Causal self-attention; query, key and value come from one product."""

    @nn.compact
    def __call__(
        self, x: jax.Array, cache: Cache | None, index: jax.Array | int, mask: jax.Array | None
    ) -> tuple[jax.Array, Cache | None]:
        """``x (B, T, width)`` to the same, and the cache with this layer's keys and values."""
        config = self.config
        heads = (*x.shape[:2], config.n_head, config.head_dim)
        qkv = _dense(self, 3 * config.n_embd, "qkv")(x)
        query, key, value = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))
        if cache is not None:
            cache, key, value = store(cache, index, key, value)
        if _drops_attention(self):
            mixed = self._attend_with_dropout(query, key, value, mask)
        else:
            mixed = attend(query, key, value, mask)
        out = _dense(self, config.n_embd, "out")(mixed.reshape(x.shape))
        return _dropout(self, out, config.resid_pdrop), cache

    def _attend_with_dropout(
        self, query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
    ) -> jax.Array:
        """`attend` with the weights written out, because fused attention cannot drop them."""
        assert mask is not None  # `Gpt2` makes one where attention drops weights
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        scores *= self.config.head_dim**-0.5
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        weights = _dropout(self, weights, self.config.attn_pdrop)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def _drops_attention(block: Block) -> bool:
    """Whether attention weights are dropped in this call."""
    return not block.deterministic and block.config.attn_pdrop > 0


class Mlp(Block):
    """Two matrices with an activation between them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(B, T, width)`` to the same."""
        config = self.config
        up = _dense(self, config.n_inner or 4 * config.n_embd, "up")(x)
        down = _dense(self, config.n_embd, "down")(ACTIVATIONS[config.activation_function](up))
        return _dropout(self, down, config.resid_pdrop)


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
        attention = Attention(**_shared(self), name="attention")
        added, cache = attention(_norm(self, x, "attention_norm"), cache, index, mask)
        x = x + added
        x = x + Mlp(**_shared(self), name="mlp")(_norm(self, x, "mlp_norm"))
        return (x, cache), None


class Unrolled(Block):
    """The layers one after another, named by their index."""

    remat: bool | str = False

    @nn.compact
    def __call__(
        self, carry: Carry, indices: jax.Array, mask: jax.Array | None
    ) -> tuple[Carry, None]:
        """Runs all layers; see `Layer`."""
        layer = remat_layer(Layer, self.remat, scanned=False)
        for index in range(self.config.n_layer):
            carry, _ = layer(**_shared(self), name=str(index))(carry, indices[index], mask)
        return carry, None


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
        words = self._table(config.vocab_size, "wte")
        x = words(input_ids) + self._table(config.n_positions, "wpe")(placed.positions)
        x = _dropout(self, x, config.embd_pdrop)
        layers = jnp.arange(config.n_layer, dtype=jnp.int32)
        (x, cache), _ = self._layers()((x, placed.cache), layers, mask)
        logits = self._head(_norm(self, x, "norm"), words)
        return logits if cache is None else (logits, cache)

    def _table(self, rows: int, name: str) -> Embedding:
        width = self.config.n_embd
        return Embedding(rows, width, self.dtype, self.param_dtype, _normal(self), name=name)

    def _layers(self) -> Any:
        if not self.scan_layers:
            return Unrolled(**_shared(self), remat=self.remat, name="layers")
        scanned = nn.scan(
            remat_layer(Layer, self.remat, scanned=True),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType] (typed as int)
            length=self.config.n_layer,
        )
        return scanned(**_shared(self), name="layers")

    def _head(self, x: jax.Array, words: Embedding) -> jax.Array:
        """Logits, summed in float32 whatever the dtype of the arithmetic."""
        product = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
        if self.config.tie_word_embeddings:
            table = words.embedding.astype(self.dtype)
            return product(x, table, (((2,), (1,)), ((), ())))
        head = nn.Dense(
            self.config.vocab_size,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=_normal(self),
            dot_general=product,
            name="lm_head",
        )
        return head(x)


def name_table(config: Gpt2Config, task: str, *, scan_layers: bool) -> NameTable:
    """The published names of a model's weights; files may leave the ``transformer.`` out."""
    tied = {"lm_head.weight": "wte.weight"} if config.tie_word_embeddings else {}
    head = () if tied else (Row("lm_head/kernel", "lm_head.weight", "linear"),)
    return NameTable(
        expand((*_ROWS, *head), config.n_layer, stacked=scan_layers),
        prefix="transformer",
        unused=frozenset({*_OTHER_HEADS, *_masks(config.n_layer)}),
        tied=tied,
        heads=("lm_head",),
        drawn=("lm_head",),
    )


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


def architecture(config: Gpt2Config, task: str) -> str:
    """The name of the published class."""
    return "GPT2LMHeadModel"


def _kernel_rows(path: str, module: str) -> tuple[Row, ...]:
    return (
        Row(f"{path}/kernel", f"{module}.weight", "conv1d"),
        Row(f"{path}/bias", f"{module}.bias"),
    )


def _norm_rows(path: str, module: str) -> tuple[Row, ...]:
    return Row(f"{path}/scale", f"{module}.weight"), Row(f"{path}/bias", f"{module}.bias")


_ROWS = (
    Row("wte/embedding", "transformer.wte.weight", "embedding"),
    Row("wpe/embedding", "transformer.wpe.weight", "embedding"),
    *_norm_rows("layers/{layer}/attention_norm", "transformer.h.{layer}.ln_1"),
    *_kernel_rows("layers/{layer}/attention/qkv", "transformer.h.{layer}.attn.c_attn"),
    *_kernel_rows("layers/{layer}/attention/out", "transformer.h.{layer}.attn.c_proj"),
    *_norm_rows("layers/{layer}/mlp_norm", "transformer.h.{layer}.ln_2"),
    *_kernel_rows("layers/{layer}/mlp/up", "transformer.h.{layer}.mlp.c_fc"),
    *_kernel_rows("layers/{layer}/mlp/down", "transformer.h.{layer}.mlp.c_proj"),
    *_norm_rows("norm", "transformer.ln_f"),
)

_OTHER_HEADS = (
    "multiple_choice_head.summary.weight",
    "multiple_choice_head.summary.bias",
    "score.weight",
)


def _masks(layers: int) -> list[str]:
    """The causal masks that old files hold beside the weights."""
    return [f"h.{index}.attn.{name}" for index in range(layers) for name in ("bias", "masked_bias")]
