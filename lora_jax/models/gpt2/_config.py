"""GPT-2's config: the fields of ``config.json``, each honoured, harmless or refused."""

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

MODEL_TYPES = ("gpt2",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpt2Config:
    """The architecture, field by field as ``config.json`` names them.

    Sizes have no default. The other defaults are those of the published implementation, which
    leaves out of old files what had its default.

    Attributes:
        n_inner: Width inside the MLP; None means ``4 * n_embd``.
        resid_pdrop: Dropout of what attention and MLP add to the residual stream.
        embd_pdrop: Dropout of the sum of the embeddings.
        attn_pdrop: Dropout of the attention weights.
        tie_word_embeddings: Whether the output head is the table of words.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int | None = None
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self):
        sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
        check_at_least_one(self, sizes)
        if self.n_embd % self.n_head:
            raise ValueError(
                f"`n_embd` {self.n_embd} must be a multiple of `n_head` {self.n_head}."
            )
        check_known(self, "activation_function", ACTIVATIONS)
        check_rates(self, ("resid_pdrop", "embd_pdrop", "attn_pdrop"))

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def num_hidden_layers(self) -> int:
        """How many layers there are."""
        return self.n_layer

    @property
    def num_key_value_heads(self) -> int:
        """Heads of keys and values: every query head has its own."""
        return self.n_head

    @property
    def max_length(self) -> int:
        """The longest sequence that the table of positions covers."""
        return self.n_positions


_FIELDS = Fields(
    config=Gpt2Config,
    fixed={
        "add_cross_attention": False,
        "is_encoder_decoder": False,
        "cross_attention_hidden_size": None,
        "pruned_heads": {},
        "reorder_and_upcast_attn": False,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
    },
    # Heads of other tasks, and what the first release's training wrote down.
    ignored=(
        "is_decoder",
        "n_special",
        "pad_token_id",
        "predict_special_tokens",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    ),
)


def read_config(fields: Mapping[str, Any], num_labels: int | None = None) -> Gpt2Config:
    """The config of a ``config.json``, every field of which is honoured or refused.

    Args:
        fields: The file as a dictionary.
        num_labels: None: a language model has no labels.

    Raises:
        ValueError: A field is missing, unknown, or has a value that this model does not have
            (all such fields are listed at once), or labels are asked for.
    """
    if num_labels is not None:
        raise ValueError(f"GPT-2 is a language model here and has no labels, got {num_labels=}.")
    # Old files give the longest sequence twice.
    fixed = {**_FIELDS.fixed, "n_ctx": fields.get("n_positions")}
    return read_fields(dataclasses.replace(_FIELDS, fixed=fixed), fields, num_labels=None)


def config_fields(config: Gpt2Config) -> dict[str, Any]:
    """The fields of ``config.json`` that describe the architecture."""
    return dataclasses.asdict(config)
