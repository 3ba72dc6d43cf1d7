"""The published names of the Llama family's weights.

layers/{layer}/attention/query/kernel
model.layers.{layer}.self_attn.q_proj.weight
"""

from lora_jax.io.names import LAYER, NameTable, Row, expand
from lora_jax.models.llama._config import LlamaConfig

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
