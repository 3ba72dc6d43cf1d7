"""BERT and RoBERTa: one Linen encoder, four heads, and the names of the published weights.

Every matrix that LoRA is likely to adapt is a plain ``(in, out)`` kernel: query, key, value
and out of the attention, up and down of the MLP. With ``scan_layers`` the layers are one
``nn.scan`` and their weights carry a leading axis of layers: ``(layers, in, out)``.

    encoder/layers/0/attention/query/kernel    unrolled
    encoder/layers/attention/query/kernel      scanned

Devlin et al. 2019 (https://arxiv.org/abs/1810.04805), Liu et al. 2019
(https://arxiv.org/abs/1907.11692).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.io.names import NameTable, Row, expand
from lora_jax.models._config import Fields, read_fields
from lora_jax.models._remat import remat_layer

MODEL_TYPES = ("bert", "roberta")
TASKS = (
    "sequence-classification",
    "token-classification",
    "question-answering",
    "masked-lm",
    "feature-extraction",
)
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """The architecture, field by field as ``config.json`` names them.

    Sizes have no default. The other defaults are those of the published implementation, which
    leaves out of old files what had its default.

    Attributes:
        model_type: ``"bert"`` or ``"roberta"``. RoBERTa counts positions from
            ``pad_token_id + 1``, over the tokens that are not padding.
        classifier_dropout: Dropout before the classifier; None means ``hidden_dropout_prob``.
        num_labels: Width of the classification heads, from ``id2label`` or ``num_labels``.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True
    num_labels: int = 2

    def __post_init__(self):
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"`model_type` must be one of {MODEL_TYPES}, got {self.model_type!r}.")
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` {self.hidden_size} must be a multiple of "
                f"`num_attention_heads` {self.num_attention_heads}."
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(
                f"`hidden_act` {self.hidden_act!r} is not supported; known: {list(ACTIVATIONS)}."
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"):
            rate = getattr(self, name)
            if rate is not None and not 0.0 <= rate < 1.0:
                raise ValueError(f"`{name}` must be in [0, 1), got {rate}.")
        if self.model_type == "roberta" and self.pad_token_id is None:
            raise ValueError("`pad_token_id` is null: RoBERTa counts its positions from it.")

    @property
    def head_dropout(self) -> float:
        """The dropout before a classifier."""
        if self.classifier_dropout is None:
            return self.hidden_dropout_prob
        return self.classifier_dropout

    @property
    def max_length(self) -> int:
        """The longest sequence that the table of positions covers."""
        return self.max_position_embeddings - self.first_position

    @property
    def first_position(self) -> int:
        """The row of the table of positions that the first token reads."""
        return 0 if self.model_type == "bert" else (self.pad_token_id or 0) + 1


_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "num_labels",
)

_FIELDS = Fields(
    config=BertConfig,
    fixed={
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "is_encoder_decoder": False,
        "cross_attention_hidden_size": None,
        "pruned_heads": {},
    },
    # They describe multilingual BERT's training pooler; no implementation reads them.
    ignored=(
        "directionality",
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
        "pooler_type",
    ),
)


def read_config(fields: Mapping[str, Any], num_labels: int | None = None) -> BertConfig:
    """The config of a ``config.json``, every field of which is honoured or refused.

    Args:
        fields: The file as a dictionary.
        num_labels: Width of the classification heads; None reads it from the file.

    Raises:
        ValueError: A field is missing, unknown, or has a value that this model does not have.
            All such fields are listed at once.
    """
    default_pad = {"pad_token_id": 1} if fields.get("model_type") == "roberta" else {}
    return read_fields(_FIELDS, default_pad | dict(fields), num_labels=num_labels)


class Block(nn.Module):
    """What all parts of the model are told.

    Attributes:
        dtype: What matrices are multiplied in. Softmax and layer norms run in float32.
        param_dtype: What ``init`` makes weights in.
        deterministic: Whether dropout is off.
    """

    config: BertConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    deterministic: bool = True


def _shared(block: Block) -> dict[str, Any]:
    names = ("config", "dtype", "param_dtype", "deterministic")
    return {name: getattr(block, name) for name in names}


def _normal(block: Block) -> jax.nn.initializers.Initializer:
    return nn.initializers.normal(block.config.initializer_range)


def _dense(block: Block, features: int, name: str | None = None) -> nn.Dense:
    return nn.Dense(
        features,
        dtype=block.dtype,
        param_dtype=block.param_dtype,
        kernel_init=_normal(block),
        name=name,
    )


def _norm(block: Block, x: jax.Array, name: str) -> jax.Array:
    norm = nn.LayerNorm(
        epsilon=block.config.layer_norm_eps,
        dtype=jnp.float32,
        param_dtype=block.param_dtype,
        use_fast_variance=False,
        name=name,
    )
    return norm(x).astype(block.dtype)


def _dropout(block: Block, x: jax.Array, rate: float) -> jax.Array:
    return nn.Dropout(rate, deterministic=block.deterministic)(x)


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


class Embeddings(Block):
    """Words, token types and positions, added and normed."""

    @nn.compact
    def __call__(
        self, ids: jax.Array, token_types: jax.Array, positions: jax.Array
    ) -> tuple[jax.Array, Embedding]:
        """``(B, T)`` ids to ``(B, T, hidden)``, and the table of words for a tied head."""
        config = self.config
        words = self._table(config.vocab_size, "word_embeddings")
        x = words(ids)
        x += self._table(config.type_vocab_size, "token_type_embeddings")(token_types)
        x += self._table(config.max_position_embeddings, "position_embeddings")(positions)
        return _dropout(self, _norm(self, x, "norm"), config.hidden_dropout_prob), words

    def _table(self, rows: int, name: str) -> Embedding:
        size = self.config.hidden_size
        return Embedding(rows, size, self.dtype, self.param_dtype, _normal(self), name=name)


class Attention(Block):
    """Self-attention of every token to every token that the mask keeps."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """``x (B, T, hidden)``, ``mask (B, T)`` of bool: which tokens may be attended to."""
        config = self.config
        heads = (*x.shape[:2], config.num_attention_heads, -1)
        query, key, value = (
            _dense(self, config.hidden_size, name)(x).reshape(heads)
            for name in ("query", "key", "value")
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        scores /= query.shape[-1] ** 0.5
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        weights = _dropout(self, weights, config.attention_probs_dropout_prob)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape)
        out = _dense(self, config.hidden_size, "out")(mixed)
        return _norm(self, x + _dropout(self, out, config.hidden_dropout_prob), "norm")


class Mlp(Block):
    """Two matrices with an activation between them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(B, T, hidden)`` to the same."""
        config = self.config
        up = _dense(self, config.intermediate_size, "up")(x)
        down = _dense(self, config.hidden_size, "down")(ACTIVATIONS[config.hidden_act](up))
        return _norm(self, x + _dropout(self, down, config.hidden_dropout_prob), "norm")


class Layer(Block):
    """One layer of the encoder; the second result is what ``nn.scan`` stacks: nothing."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """``(B, T, hidden)`` to the same."""
        x = Attention(**_shared(self), name="attention")(x, mask)
        return Mlp(**_shared(self), name="mlp")(x), None


class Unrolled(Block):
    """The layers one after another, named by their index."""

    remat: bool | str = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, None]:
        """``(B, T, hidden)`` to the same."""
        layer = remat_layer(Layer, self.remat, scanned=False)
        for index in range(self.config.num_hidden_layers):
            x, _ = layer(**_shared(self), name=str(index))(x, mask)
        return x, None


class Encoder(Block):
    """All layers, unrolled or scanned."""

    scan_layers: bool = False
    remat: bool | str = False

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """``(B, T, hidden)`` to the same."""
        if not self.scan_layers:
            return Unrolled(**_shared(self), remat=self.remat, name="layers")(x, mask)[0]
        scanned = nn.scan(
            remat_layer(Layer, self.remat, scanned=True),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType] (typed as int)
            length=self.config.num_hidden_layers,
        )
        return scanned(**_shared(self), name="layers")(x, mask)[0]


class ClassificationHead(Block):
    """RoBERTa's head: dense, tanh, dense."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(B, hidden)`` to ``(B, num_labels)``."""
        x = _dropout(self, x, self.config.head_dropout)
        x = jnp.tanh(_dense(self, self.config.hidden_size, "dense")(x))
        x = _dropout(self, x, self.config.head_dropout)
        return _dense(self, self.config.num_labels, "out_proj")(x)


class MaskedLmHead(Block):
    """A dense layer, then the table of words again."""

    @nn.compact
    def __call__(self, x: jax.Array, words: Embedding) -> jax.Array:
        """``(B, T, hidden)`` to ``(B, T, vocab)``."""
        x = _dense(self, self.config.hidden_size, "dense")(x)
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
        remat: What each layer recomputes in the backward pass, a policy's name or a bool; see
            `lora_jax.models._remat`.
    """

    task: str = "sequence-classification"
    scan_layers: bool = False
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
        _check_inputs(self.config, input_ids, attention_mask, token_type_ids)
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        positions = _positions(self.config, input_ids)
        x, words = Embeddings(**_shared(self), name="embeddings")(input_ids, types, positions)
        encoder = Encoder(
            **_shared(self), scan_layers=self.scan_layers, remat=self.remat, name="encoder"
        )
        x = encoder(x, mask.astype(bool))
        if self.task == "feature-extraction":
            return x
        return self._head(x, words).astype(jnp.float32)

    def _head(self, x: jax.Array, words: Embedding) -> jax.Array:
        if self.task == "masked-lm":
            return MaskedLmHead(**_shared(self), name="lm_head")(x, words)
        if self.task == "question-answering":
            return _dense(self, 2, "qa_outputs")(x)
        if self.task == "sequence-classification":
            x = x[:, 0]
            if self.config.model_type == "roberta":
                return ClassificationHead(**_shared(self), name="classifier")(x)
            x = jnp.tanh(_dense(self, self.config.hidden_size, "pooler")(x))
        x = _dropout(self, x, self.config.head_dropout)
        return _dense(self, self.config.num_labels, "classifier")(x)


def _positions(config: BertConfig, ids: jax.Array) -> jax.Array:
    """Rows of the table of positions. With padding token 1, ``[7, 8, 1]`` is at ``[2, 3, 1]``."""
    if config.model_type == "bert":
        return jnp.arange(ids.shape[1], dtype=jnp.int32)[None, :]
    kept = (ids != config.pad_token_id).astype(jnp.int32)
    return jnp.cumsum(kept, axis=1) * kept + (config.first_position - 1)


def _check_inputs(config: BertConfig, ids: jax.Array, *others: jax.Array | None) -> None:
    if ids.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(
            f"`input_ids` must be integers of shape (batch, length), got {ids.dtype}{ids.shape}."
        )
    if ids.shape[1] > config.max_length:
        raise ValueError(
            f"`input_ids` are {ids.shape[1]} tokens long and the model has positions for "
            f"{config.max_length}: truncate to that."
        )
    for name, other in zip(("attention_mask", "token_type_ids"), others, strict=True):
        if other is not None and other.shape != ids.shape:
            raise ValueError(
                f"`{name}` must have the shape of `input_ids`, {ids.shape}, got {other.shape}."
            )


def name_table(config: BertConfig, task: str, *, scan_layers: bool) -> NameTable:
    """The published names of a model's weights.

    The bare encoder's names have no prefix, as in the files of the published encoder.

    Raises:
        ValueError: The config does not allow the task.
    """
    if task == "masked-lm" and not config.tie_word_embeddings:
        raise ValueError("`tie_word_embeddings` is false; masked-lm has a tied decoder only.")
    heads, tied = _HEADS[config.model_type], _TIED[config.model_type]
    prefix = "" if task == "feature-extraction" else f"{config.model_type}."
    rows = (*_encoder_rows(prefix), *heads[task])
    of_other_tasks = {row.tensor for head in heads.values() for row in head}
    return NameTable(
        expand(rows, config.num_hidden_layers, stacked=scan_layers),
        prefix=config.model_type,
        unused=frozenset({*_UNUSED, *of_other_tasks, *tied}),
        renamed=((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")),
        tied=tied if task == "masked-lm" else {},
        heads=("classifier", "qa_outputs", "lm_head"),
        drawn=("classifier", "qa_outputs", "lm_head", "pooler"),
    )


def make_module(
    config: BertConfig,
    task: str,
    *,
    dtype: Any,
    param_dtype: Any,
    scan_layers: bool,
    remat: bool | str,
) -> Bert:
    """The module of a task; see `Bert`."""
    return Bert(
        config,
        dtype=dtype,
        param_dtype=param_dtype,
        task=task,
        scan_layers=scan_layers,
        remat=remat,
    )


def architecture(config: BertConfig, task: str) -> str:
    """The name of the published class, such as ``"BertForMaskedLM"``."""
    ends = {
        "sequence-classification": "ForSequenceClassification",
        "token-classification": "ForTokenClassification",
        "question-answering": "ForQuestionAnswering",
        "masked-lm": "ForMaskedLM",
        "feature-extraction": "Model",
    }
    return {"bert": "Bert", "roberta": "Roberta"}[config.model_type] + ends[task]


def config_fields(config: BertConfig) -> dict[str, Any]:
    """The fields of ``config.json`` that describe the architecture."""
    fields = dataclasses.asdict(config)
    del fields["num_labels"]  # said by ``id2label``
    return fields


def _kernel_rows(path: str, module: str) -> tuple[Row, ...]:
    return (
        Row(f"{path}/kernel", f"{module}.weight", "linear"),
        Row(f"{path}/bias", f"{module}.bias"),
    )


def _norm_rows(path: str, module: str) -> tuple[Row, ...]:
    return Row(f"{path}/scale", f"{module}.weight"), Row(f"{path}/bias", f"{module}.bias")


def _encoder_rows(prefix: str) -> tuple[Row, ...]:
    ours, theirs = "encoder/layers/{layer}", f"{prefix}encoder.layer.{{layer}}"
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    return (
        *(
            Row(f"embeddings/{t}/embedding", f"{prefix}embeddings.{t}.weight", "embedding")
            for t in tables
        ),
        *_norm_rows("embeddings/norm", f"{prefix}embeddings.LayerNorm"),
        *_kernel_rows(f"{ours}/attention/query", f"{theirs}.attention.self.query"),
        *_kernel_rows(f"{ours}/attention/key", f"{theirs}.attention.self.key"),
        *_kernel_rows(f"{ours}/attention/value", f"{theirs}.attention.self.value"),
        *_kernel_rows(f"{ours}/attention/out", f"{theirs}.attention.output.dense"),
        *_norm_rows(f"{ours}/attention/norm", f"{theirs}.attention.output.LayerNorm"),
        *_kernel_rows(f"{ours}/mlp/up", f"{theirs}.intermediate.dense"),
        *_kernel_rows(f"{ours}/mlp/down", f"{theirs}.output.dense"),
        *_norm_rows(f"{ours}/mlp/norm", f"{theirs}.output.LayerNorm"),
    )


_HEADS: dict[str, dict[str, tuple[Row, ...]]] = {
    "bert": {
        "sequence-classification": (
            *_kernel_rows("pooler", "bert.pooler.dense"),
            *_kernel_rows("classifier", "classifier"),
        ),
        "token-classification": _kernel_rows("classifier", "classifier"),
        "question-answering": _kernel_rows("qa_outputs", "qa_outputs"),
        "masked-lm": (
            *_kernel_rows("lm_head/dense", "cls.predictions.transform.dense"),
            *_norm_rows("lm_head/norm", "cls.predictions.transform.LayerNorm"),
            Row("lm_head/bias", "cls.predictions.bias"),
        ),
        "feature-extraction": (),
    },
    "roberta": {
        "sequence-classification": (
            *_kernel_rows("classifier/dense", "classifier.dense"),
            *_kernel_rows("classifier/out_proj", "classifier.out_proj"),
        ),
        "token-classification": _kernel_rows("classifier", "classifier"),
        "question-answering": _kernel_rows("qa_outputs", "qa_outputs"),
        "masked-lm": (
            *_kernel_rows("lm_head/dense", "lm_head.dense"),
            *_norm_rows("lm_head/norm", "lm_head.layer_norm"),
            Row("lm_head/bias", "lm_head.bias"),
        ),
        "feature-extraction": (),
    },
}

_UNUSED = (
    "embeddings.position_ids",
    "embeddings.token_type_ids",
    "pooler.dense.weight",
    "pooler.dense.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
)

_TIED = {
    "bert": {
        "cls.predictions.decoder.weight": "embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    "roberta": {
        "lm_head.decoder.weight": "embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
}
