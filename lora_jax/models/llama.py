"""Llama and its kin: Mistral, Qwen2, Qwen3, SmolLM2 and the text models of Gemma 3.

    embed_tokens/embedding                        (vocab, hidden)
    layers/0/attention/query/kernel               (hidden, heads * head_dim)
    layers/0/mlp/gate/kernel                      (hidden, intermediate)
    lm_head/kernel                                (hidden, vocab), where it is not tied

With ``scan_layers`` the layers' weights carry a leading axis: ``layers/attention/query/kernel``
``(layers, hidden, heads * head_dim)``.

Touvron et al. 2023 (https://arxiv.org/abs/2307.09288), Grattafiori et al. 2024
(https://arxiv.org/abs/2407.21783), Jiang et al. 2023 (https://arxiv.org/abs/2310.06825), Yang et
al. 2024 (https://arxiv.org/abs/2407.10671), Yang et al. 2025 (https://arxiv.org/abs/2505.09388),
Allal et al. 2025 (https://arxiv.org/abs/2502.02737), Gemma Team 2025
(https://arxiv.org/abs/2503.19786).
"""

from typing import Any

from lora_jax.io.names import LAYER, NameTable, Row, expand
from lora_jax.models._decoder import Llama as Llama
from lora_jax.models._llama_config import LlamaConfig as LlamaConfig
from lora_jax.models._llama_published import (
    MODEL_TYPES as MODEL_TYPES,
    config_fields as config_fields,
    read_config as read_config,
)

TASKS = ("causal-lm",)

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def name_table(config: LlamaConfig, task: str, *, scan_layers: bool) -> NameTable:
    """The published names of a model's weights."""
    rows = [
        Row("embed_tokens/embedding", "model.embed_tokens.weight", "embedding"),
        *_attention_rows(config),
        *_mlp_rows(config),
        *_norm_rows(config),
        Row("norm/scale", "model.norm.weight"),
    ]
    if not config.tie_word_embeddings:
        rows.append(Row("lm_head/kernel", "lm_head.weight", "linear"))
    return NameTable(
        expand(rows, config.num_hidden_layers, stacked=scan_layers),
        prefix="model",
        unused=_buffers(config),
        tied={"lm_head.weight": "embed_tokens.weight"} if config.tie_word_embeddings else {},
    )


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


def architecture(config: LlamaConfig, task: str) -> str:
    """The name of the published class, such as ``"LlamaForCausalLM"``."""
    return _ARCHITECTURES[config.model_type]


_OURS, _THEIRS = f"layers/{LAYER}", f"model.layers.{LAYER}"


def _linear_rows(path: str, module: str, *, bias: bool) -> list[Row]:
    rows = [Row(f"{_OURS}/{path}/kernel", f"{_THEIRS}.{module}.weight", "linear")]
    return [*rows, Row(f"{_OURS}/{path}/bias", f"{_THEIRS}.{module}.bias")] if bias else rows


def _attention_rows(config: LlamaConfig) -> list[Row]:
    published = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    rows = []
    for name, module in published.items():
        bias = config.out_bias if name == "out" else config.query_key_value_bias
        rows += _linear_rows(f"attention/{name}", f"self_attn.{module}", bias=bias)
    return rows


def _mlp_rows(config: LlamaConfig) -> list[Row]:
    names = ("gate", "up", "down")
    rows = (_linear_rows(f"mlp/{n}", f"mlp.{n}_proj", bias=config.mlp_bias) for n in names)
    return [row for pair in rows for row in pair]


def _norm_rows(config: LlamaConfig) -> list[Row]:
    """The norms of a layer. Gemma's name for the one after attention is Llama's before the MLP."""
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    if config.output_norms:
        norms |= {
            "attention_out_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "mlp_out_norm": "post_feedforward_layernorm",
        }
    if config.query_key_norm:
        norms |= {"attention/query_norm": "self_attn.q_norm"}
        norms |= {"attention/key_norm": "self_attn.k_norm"}
    return [
        Row(f"{_OURS}/{path}/scale", f"{_THEIRS}.{module}.weight") for path, module in norms.items()
    ]


def _buffers(config: LlamaConfig) -> frozenset[str]:
    """The frequencies that old files store; they follow from the config."""
    layers = range(config.num_hidden_layers)
    inside = (f"layers.{index}.self_attn.rotary_emb.inv_freq" for index in layers)
    return frozenset(("rotary_emb.inv_freq", *inside))
