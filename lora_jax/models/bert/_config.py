"""BERT's config: the fields of ``config.json``, each honoured, harmless or refused."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.models._config import (
    Fields,
    check_at_least_one,
    check_known,
    check_rates,
    read_fields,
)
from lora_jax.models._layers import ACTIVATIONS

MODEL_TYPES = ("bert", "roberta")


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
        check_at_least_one(self, _SIZES)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` {self.hidden_size} must be a multiple of "
                f"`num_attention_heads` {self.num_attention_heads}."
            )
        check_known(self, "hidden_act", ACTIVATIONS)
        check_rates(
            self, ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
        )
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


def config_fields(config: BertConfig) -> dict[str, Any]:
    """The fields of ``config.json`` that describe the architecture."""
    fields = dataclasses.asdict(config)
    del fields["num_labels"]  # said by ``id2label``
    return fields
