"""How the Llama family writes its config: five spellings of ``config.json``, read and written.

    model_type      what it adds to Llama 2
    llama           biases by name; Llama 3: rotary embedding of type "llama3"
    mistral         every layer sees a window
    qwen2           bias on query, key and value; the upper layers may see a window
    qwen3           query and key are normed, head by head; windows as in qwen2
    gemma3_text     query and key are normed; most layers see a window, and have a rotary
                    embedding of their own; norms after attention and MLP too; norms multiply by
                    1 + weight; embeddings are scaled

A file is read through the dataclass of its ``model_type``, so a field that another type has is
as unknown as a misspelt one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.models._config import Fields, read_fields
from lora_jax.models.llama._config import LlamaConfig
from lora_jax.models.llama._rotary import Rope, read_rope, rope_fields

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Published:
    """The fields that all have. Sizes have no default, the others the published one.

    transformers 4 writes ``rope_theta`` and ``rope_scaling``, transformers 5 ``rope_parameters``.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    rope_theta: float | None = None
    rope_scaling: dict | None = None
    rope_parameters: dict | None = None

    def own(self) -> dict[str, Any]:
        """The fields of `LlamaConfig` that are spelt in a way of the type's own."""
        return {"sliding_layers": (False,) * self.num_hidden_layers, "rope": _rope(self)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Llama(_Published):
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False

    def own(self) -> dict[str, Any]:
        biases = {"query_key_value_bias": self.attention_bias, "out_bias": self.attention_bias}
        return super().own() | biases


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Mistral(_Published):
    head_dim: int | None = None
    hidden_act: str = "silu"
    sliding_window: int | None = 4096

    def own(self) -> dict[str, Any]:
        sliding = self.sliding_window is not None
        return super().own() | {"sliding_layers": (sliding,) * self.num_hidden_layers}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Qwen(_Published):
    hidden_act: str = "silu"
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list | None = None

    def own(self) -> dict[str, Any]:
        window = self.sliding_window if self.use_sliding_window else None
        layers = range(self.num_hidden_layers)
        derived = tuple(window is not None and i >= self.max_window_layers for i in layers)
        sliding = derived if self.layer_types is None else _sliding(self.layer_types)
        return super().own() | {"sliding_window": window, "sliding_layers": sliding}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Qwen2(_Qwen):
    head_dim: int | None = None

    def own(self) -> dict[str, Any]:
        return super().own() | {"query_key_value_bias": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Qwen3(_Qwen):
    head_dim: int
    attention_bias: bool = False

    def own(self) -> dict[str, Any]:
        biases = {"query_key_value_bias": self.attention_bias, "out_bias": self.attention_bias}
        return super().own() | biases | {"query_key_norm": True}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Gemma3(_Published):
    head_dim: int
    hidden_activation: str = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    sliding_window_pattern: int | None = None
    layer_types: list | None = None
    rope_local_base_freq: float | None = None

    def own(self) -> dict[str, Any]:
        return {
            **_gemma_ropes(self),
            "sliding_layers": self._sliding_layers(),
            "hidden_act": self.hidden_activation,
            "query_key_value_bias": self.attention_bias,
            "out_bias": self.attention_bias,
            "query_key_norm": True,
            "output_norms": True,
            "norm_offset": 1.0,
            "scaled_embeddings": True,
        }

    def _sliding_layers(self) -> tuple[bool, ...]:
        pattern = self.sliding_window_pattern or 6  # five see a window, the sixth everything
        derived = tuple((i + 1) % pattern != 0 for i in range(self.num_hidden_layers))
        given = derived if self.layer_types is None else _sliding(self.layer_types)
        if self.sliding_window_pattern is not None and given != derived:
            raise ValueError(
                f"`layer_types` does not follow `sliding_window_pattern` {pattern}; give one."
            )
        return given


_TYPES: dict[str, type[_Published]] = {
    "llama": _Llama,
    "mistral": _Mistral,
    "qwen2": _Qwen2,
    "qwen3": _Qwen3,
    "gemma3_text": _Gemma3,
}
MODEL_TYPES = tuple(_TYPES)

_FIXED = {
    "attention_dropout": 0.0,
    "rope_interleaved": False,
    "use_mrope": False,  # Qwen2.5's base models say so
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
}
_IGNORED = (
    "pad_token_id",
    "pretraining_tp",  # how products were split, to reproduce their rounding
    "is_llama_config",  # SmolLM2's training library says so
    "cache_implementation",
    "_sliding_window_pattern",  # stands beside the ``layer_types`` that came of it
    "transformers.js_config",
    "unsloth_fixed",
)


def read_config(fields: Mapping[str, Any], num_labels: int | None = None) -> LlamaConfig:
    """The config of a ``config.json``, every field of which is honoured or refused.

    Args:
        fields: The file as a dictionary.
        num_labels: Ignored: a decoder has no labels.

    Raises:
        ValueError: A field is missing, unknown, or has a value that this model does not have.
    """
    model_type = fields.get("model_type")
    if model_type not in _TYPES:
        raise ValueError(f"`model_type` must be one of {MODEL_TYPES}, got {model_type!r}.")
    known = Fields(config=_TYPES[model_type], fixed=_FIXED, ignored=_IGNORED)
    found = read_fields(known, fields, num_labels=num_labels)
    own = {f.name for f in dataclasses.fields(LlamaConfig)}
    same = {name: value for name, value in vars(found).items() if name in own}
    if found.head_dim is None:
        same["head_dim"] = _derived_head_dim(found)
    if found.num_key_value_heads is None:
        same["num_key_value_heads"] = found.num_attention_heads
    same.setdefault("query_pre_attn_scalar", same["head_dim"])
    return LlamaConfig(**same | found.own())


def config_fields(config: LlamaConfig) -> dict[str, Any]:
    """The fields of ``config.json`` that describe the architecture.

    They are in the spelling of transformers 4, which transformers 5 reads as well.
    """
    scaling = rope_fields(config.rope)
    theta = scaling.pop("rope_theta")
    values = vars(config) | {
        "attention_bias": config.out_bias,
        "hidden_activation": config.hidden_act,
        "use_sliding_window": any(config.sliding_layers),
        "layer_types": [SLIDING if sliding else FULL for sliding in config.sliding_layers],
        "rope_theta": theta,
        "rope_scaling": None if config.rope.rope_type == "default" else scaling,
    }
    if config.sliding_rope is not None:
        values["rope_local_base_freq"] = config.sliding_rope.rope_theta
    names = (f.name for f in dataclasses.fields(_TYPES[config.model_type]))
    return {name: values[name] for name in names if name in values}


def _derived_head_dim(found: _Published) -> int:
    size, heads = found.hidden_size, found.num_attention_heads
    if heads < 1 or size % heads:
        raise ValueError(
            f"`hidden_size` {size} must be a multiple of `num_attention_heads` {heads} where "
            "`head_dim` is not given."
        )
    return size // heads


def _sliding(layer_types: list) -> tuple[bool, ...]:
    if odd := [kind for kind in layer_types if kind not in (FULL, SLIDING)]:
        raise ValueError(f"`layer_types` may be {FULL!r} or {SLIDING!r}, got {odd}.")
    return tuple(kind == SLIDING for kind in layer_types)


def _rope(found: _Published) -> Rope:
    return _agreed(
        found,
        old=(found.rope_theta, found.rope_scaling),
        new=found.rope_parameters,
        default=10_000.0,
    )


def _gemma_ropes(found: _Gemma3) -> dict[str, Rope]:
    """The rotary embeddings of Gemma 3, one for each kind of layer; only one may be scaled."""
    new = {FULL: None, SLIDING: None} | (found.rope_parameters or {})
    if odd := sorted(new.keys() - {FULL, SLIDING}):
        raise ValueError(f"`rope_parameters` may have the keys {FULL} and {SLIDING}, got {odd}.")
    whole = _agreed(
        found, old=(found.rope_theta, found.rope_scaling), new=new[FULL], default=1_000_000.0
    )
    sliding = _agreed(
        found, old=(found.rope_local_base_freq, None), new=new[SLIDING], default=10_000.0
    )
    if sliding.rope_type != "default":
        raise ValueError(f"`rope_type` of {SLIDING} is {sliding.rope_type!r}, not 'default'.")
    return {"rope": whole, "sliding_rope": sliding}


def _agreed(
    found: _Published,
    *,
    old: tuple[float | None, dict | None],
    new: dict | None,
    default: float,
) -> Rope:
    """What the old and the new spelling say; both may be there if they say the same."""
    theta, scaling = old
    spellings = [] if old == (None, None) and new is not None else [scaling or {}]
    spellings += [] if new is None else [new]
    theta = default if theta is None else theta
    limit = found.max_position_embeddings
    ropes = {read_rope(spelling, theta=theta, max_positions=limit) for spelling in spellings}
    if len(ropes) > 1:
        raise ValueError(f"Rotary embedding: the old and the new fields differ: {old}, {new}.")
    return ropes.pop()
