"""The config of the Llama family: one dataclass, whose fields are what its members differ in.

How each member writes them in ``config.json`` is `_published`'s.
"""

import dataclasses

from lora_jax.models._config import check_at_least_one, check_known
from lora_jax.models._layers import ACTIVATIONS
from lora_jax.models.llama._rotary import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The architecture of a decoder of the Llama family.

    Attributes:
        model_type: ``"llama"``, ``"mistral"``, ``"qwen2"``, ``"qwen3"`` or ``"gemma3_text"``.
        rope: The rotary embedding.
        sliding_rope: That of layers that see a window, None where it is the same.
        sliding_window: How many positions such a layer sees, a token's own included.
        sliding_layers: Of each layer, whether it sees a window only.
        query_key_value_bias: Whether query, key and value have a bias.
        out_bias: Whether the projection after attention has one.
        mlp_bias: Whether the MLP's three matrices have one.
        query_key_norm: Whether query and key are normed over each head's features.
        query_pre_attn_scalar: Scores are divided by its square root.
        output_norms: Whether what attention and MLP give is normed as well.
        norm_offset: What norms add to their weight: 1 where weights are stored about 0.
        scaled_embeddings: Whether embeddings are multiplied by the square root of their width.
        initializer_range: Width of the normal distribution that ``init`` draws from.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: Rope
    sliding_rope: Rope | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...]
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    query_key_value_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False
    query_pre_attn_scalar: float
    output_norms: bool = False
    norm_offset: float = 0.0
    scaled_embeddings: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02

    def __post_init__(self):
        check_at_least_one(self, _SIZES)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` {self.num_attention_heads} must be a multiple of "
                f"`num_key_value_heads` {self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even: features turn in pairs; {self.head_dim}.")
        check_known(self, "hidden_act", ACTIVATIONS)
        if len(self.sliding_layers) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` has {len(self.sliding_layers)} entries for "
                f"{self.num_hidden_layers} layers."
            )
        if any(self.sliding_layers) and (self.sliding_window or 0) < 1:
            raise ValueError(
                f"Layers see a window and `sliding_window` is {self.sliding_window}; it must be "
                "at least 1."
            )

    @property
    def max_length(self) -> int:
        """How many positions the model was made for."""
        return self.max_position_embeddings


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "query_pre_attn_scalar",
)
