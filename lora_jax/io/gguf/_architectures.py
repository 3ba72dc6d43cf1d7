"""Which models a GGUF file may hold, and which of its keys are which fields of ``config.json``.

A row of the table is one value of ``general.architecture``.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from lora_jax.io.gguf._header import Header

_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
_GPT2_SIZES = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "attention.layer_norm_epsilon": "layer_norm_epsilon",
    "vocab_size": "vocab_size",
}
_OPTIONAL = ("vocab_size", "attention.head_count_kv", "attention.key_length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """How one value of ``general.architecture`` reads.

    Attributes:
        model_type: What ``config.json`` calls it.
        class_name: What ``config.json`` lists under ``architectures``.
        keys: Key, without its prefix, to field.
        optional: Keys that a file may lack because other numbers tell.
        defaults: Keys that a file may lack, and what is meant then.
        constants: Fields that a GGUF file does not state because they are always so.
    """

    model_type: str
    class_name: str
    keys: Mapping[str, str]
    optional: tuple[str, ...] = _OPTIONAL
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_SILU = {"hidden_act": "silu"}
_BASE = {"rope.freq_base": 10000.0}
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        keys={**_SIZES, "attention.sliding_window": "sliding_window"},
        optional=(*_OPTIONAL, "attention.sliding_window"),
        defaults=_BASE,
        constants=_SILU,
    ),
    "qwen2": Architecture(
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        keys=_SIZES,
        defaults=_BASE,
        constants={**_SILU, "use_sliding_window": False},
    ),
    "qwen3": Architecture(
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        keys=_SIZES,
        defaults=_BASE,
        constants={**_SILU, "use_sliding_window": False, "attention_bias": False},
    ),
    "gemma3": Architecture(
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        keys={
            **_SIZES,
            "attention.sliding_window": "sliding_window",
            "rope.freq_base_swa": "rope_local_base_freq",
        },
        optional=("vocab_size", "attention.head_count_kv"),
        defaults={"rope.freq_base": 1_000_000.0, "rope.freq_base_swa": 10_000.0},
        constants={"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False},
    ),
    "gpt2": Architecture(
        model_type="gpt2",
        class_name="GPT2LMHeadModel",
        keys=_GPT2_SIZES,
        constants={"activation_function": "gelu_new"},
    ),
}
"""By the value of ``general.architecture``."""


def architecture_of(header: Header) -> tuple[str, Architecture]:
    """The name of a file's architecture, and how it reads.

    Raises:
        ValueError: The file holds something else, a part of a model, or an unknown model.
    """
    metadata = header.metadata
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        near = difflib.get_close_matches(str(name), ARCHITECTURES, n=1)
        hint = f" The nearest is {near[0]!r}." if near else ""
        raise ValueError(
            f"{header.file}: 'general.architecture' is {name!r:.80}; known: "
            f"{', '.join(ARCHITECTURES)}.{hint}"
        )
    for key, only in (("general.type", "model"), ("general.quantization_version", 2)):
        if metadata.get(key, only) != only:
            raise ValueError(f"{header.file}: {key!r} is {metadata[key]!r:.80}; not {only!r}.")
    if metadata.get("split.count", 0) not in (0, 1):
        raise ValueError(
            f"{header.file} is one of {metadata['split.count']!r:.80} parts: join them with "
            "llama-gguf-split --merge."
        )
    return name, ARCHITECTURES[name]
