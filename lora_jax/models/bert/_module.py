"""BERT and RoBERTa: one Linen encoder, normed after each sum, and four heads.

    x = norm(x + attention(x))
    x = norm(x + mlp(x))            every layer

Heads see the last hidden state, and the head of masked LM the table of words besides.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lora_jax.models import _layers
from lora_jax.models._inputs import check_ids, check_length, check_shapes
from lora_jax.models._layers import (
    ACTIVATIONS,
    Embedding,
    attend_with_dropout,
    dense,
    dropout,
    embedding,
    layer_norm,
    layers_of,
    shared,
)
from lora_jax.models.bert._config import BertConfig


class Block(_layers.Block):
    """A part of BERT."""

    config: BertConfig


class Embeddings(Block):
    """Words, token types and positions, added and normed."""

    @nn.compact
    def __call__(
        self, ids: jax.Array, token_types: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, Embedding]:
        """``(B, T)`` ids to ``(B, T, hidden)``, and the table of words for a tied head."""
        config = self.config
        words, types, places = (
            embedding(self, rows, config.hidden_size, f"{name}_embeddings")
            for name, rows in (
                ("word", config.vocab_size),
                ("token_type", config.type_vocab_size),
                ("position", config.max_position_embeddings),
            )
        )
        x = words(ids) + types(token_types) + places(positions)
        return dropout(self, _norm(self, x, "norm"), config.hidden_dropout_prob), words


class Attention(Block):
    """Self-attention of every token to every token that the mask keeps."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """``x (B, T, hidden)``, ``mask (B, T)`` of bool: which tokens may be attended to."""
        config = self.config
        heads = (*x.shape[:2], config.num_attention_heads, -1)
        query, key, value = (
            checkpoint_name(dense(self, config.hidden_size, name)(x).reshape(heads), name)
            for name in ("query", "key", "value")
        )
        rate = config.attention_probs_dropout_prob
        kept = mask[:, None, None, :]
        mixed = attend_with_dropout(self, query, key, value, kept, rate=rate).reshape(x.shape)
        mixed = checkpoint_name(mixed, "attention")
        out = dense(self, config.hidden_size, "out")(mixed)
        x = checkpoint_name(x + dropout(self, out, config.hidden_dropout_prob), "out")
        return _norm(self, x, "norm")


class Mlp(Block):
    """Two matrices with an activation between them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(B, T, hidden)`` to the same."""
        config = self.config
        up = checkpoint_name(dense(self, config.intermediate_size, "up")(x), "up")
        down = dense(self, config.hidden_size, "down")(ACTIVATIONS[config.hidden_act](up))
        x = checkpoint_name(x + dropout(self, down, config.hidden_dropout_prob), "down")
        return _norm(self, x, "norm")


class Layer(Block):
    """One layer of the encoder; the second result is what ``nn.scan`` stacks: nothing."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """``(B, T, hidden)`` to the same."""
        x = Attention(**shared(self), name="attention")(x, mask)
        return Mlp(**shared(self), name="mlp")(x), None


class Encoder(Block):
    """All layers, unrolled or scanned."""

    scan_layers: bool = False
    layers_per_step: int = 1
    remat: bool | str = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """``(B, T, hidden)`` to the same."""
        layers = layers_of(self, Layer, in_axes=nn.broadcast)
        if self.scan_layers:
            return layers(x, mask)[0]
        return layers(x, [(mask,)] * self.config.num_hidden_layers)


class ClassificationHead(Block):
    """RoBERTa's head: dense, tanh, dense."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(B, hidden)`` to ``(B, num_labels)``."""
        x = dropout(self, x, self.config.head_dropout)
        x = jnp.tanh(dense(self, self.config.hidden_size, "dense")(x))
        x = dropout(self, x, self.config.head_dropout)
        return dense(self, self.config.num_labels, "out_proj")(x)


class MaskedLmHead(Block):
    """A dense layer, then the table of words again."""

    @nn.compact
    def __call__(self, x: jax.Array, words: Embedding) -> jax.Array:
        """``(B, T, hidden)`` to ``(B, T, vocab)``."""
        x = dense(self, self.config.hidden_size, "dense")(x)
        roberta = self.config.model_type == "roberta"
        x = ACTIVATIONS["gelu" if roberta else self.config.hidden_act](x)
        x = words.attend(_norm(self, x, "norm"))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return x + bias.astype(self.dtype)[None, None, :]


class Bert(Block):
    """The encoder with the head of a task.

    Attributes:
        task: One of `TASKS`.
        scan_layers: One ``nn.scan`` over the layers: compiles in the time of one layer; the
            layers' weights are stacked along axis 0.
        layers_per_step: Layers that a step of the scan goes through.
        remat: What each layer recomputes in the backward pass, a policy's name or a bool; see
            `lora_jax.models._remat`.
    """

    task: str = "sequence-classification"
    scan_layers: bool = False
    layers_per_step: int = 1
    remat: bool | str = False

    @nn.compact
    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Runs the model on ``(B, T)`` tokens.

        Args:
            input_ids: Integers ``(B, T)``.
            attention_mask: ``(B, T)``, zero or False where padded. None keeps every token.
            token_type_ids: Integers ``(B, T)``. None means all 0.

        Returns:
            Logits in float32: ``(B, num_labels)`` for sequence classification,
            ``(B, T, num_labels)`` for token classification, ``(B, T, 2)`` (start and end of
            the answer) for question answering, ``(B, T, vocab)`` for masked LM; or, for
            feature extraction, the last hidden state ``(B, T, hidden)`` in ``dtype``.

        Raises:
            ValueError: Shapes or dtypes of the arguments are not these, or the sequence is
                longer than the table of positions.
        """
        check_ids(input_ids)
        check_length(input_ids, self.config.max_length)
        check_shapes(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        positions = _positions(self.config, input_ids)
        x, words = Embeddings(**shared(self), name="embeddings")(input_ids, types, positions)
        encoder = Encoder(
            **shared(self),
            scan_layers=self.scan_layers,
            layers_per_step=self.layers_per_step,
            remat=self.remat,
            name="encoder",
        )
        x = encoder(x, mask.astype(bool))
        if self.task == "feature-extraction":
            return x
        return self._head(x, words).astype(jnp.float32)

    def _head(self, x: jax.Array, words: Embedding) -> jax.Array:
        if self.task == "masked-lm":
            return MaskedLmHead(**shared(self), name="lm_head")(x, words)
        if self.task == "question-answering":
            return dense(self, 2, "qa_outputs")(x)
        if self.task == "sequence-classification":
            x = x[:, 0]
            if self.config.model_type == "roberta":
                return ClassificationHead(**shared(self), name="classifier")(x)
            x = jnp.tanh(dense(self, self.config.hidden_size, "pooler")(x))
        x = dropout(self, x, self.config.head_dropout)
        return dense(self, self.config.num_labels, "classifier")(x)


def _norm(block: Block, x: jax.Array, name: str) -> jax.Array:
    return layer_norm(block, x, name, epsilon=block.config.layer_norm_eps)


def _positions(config: BertConfig, ids: jax.Array) -> jax.Array:
    """Rows of the table of positions. With padding token 1, ``[7, 8, 1]`` is at ``[2, 3, 1]``."""
    if config.model_type == "bert":
        return jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
    kept = (ids != config.pad_token_id).astype(jnp.int32)
    return jnp.cumsum(kept, axis=1) * kept + (config.first_position - 1)


def make_module(
    config: BertConfig,
    task: str,
    *,
    dtype: Any,
    param_dtype: Any,
    scan_layers: bool,
    remat: bool | str,
    layers_per_step: int = 1,
) -> Bert:
    """The module of a task; see `Bert`."""
    return Bert(
        config,
        dtype=dtype,
        param_dtype=param_dtype,
        task=task,
        scan_layers=scan_layers,
        layers_per_step=layers_per_step,
        remat=remat,
    )
