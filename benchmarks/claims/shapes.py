"""The models that claims are shown on: their published shapes, and how LoRA adapts each.

SHAPES["gpt2-medium"]    24 layers of width 1024, rank 4 on query and value, batches of 8 x 512
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One model.

    Attributes:
        fields: Its ``config.json``.
        task: As `lora_jax.models.from_pretrained` takes it.
        lora: Which weights `lora_jax.LoraConfig` adapts, and which it trains in full.
        rank: Of the factors.
        batch: Rows of a step.
        length: Tokens of a row.
        dtype: What the published weights are kept in.
        trained: What the paper says is trained, in millions; None where it does not say.
        total: What the paper says the model has, in millions.
    """

    fields: Mapping[str, Any]
    task: str
    lora: Mapping[str, Any]
    rank: int
    batch: int
    length: int
    dtype: str = "float32"
    trained: float | None = None
    total: float | None = None


def _gpt2(layers: int, width: int, heads: int, **options: Any) -> Shape:
    """GPT-2: query and value of the fused kernel, rank 4 (the paper's appendix D.3)."""
    fields = {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
    }
    lora = {"targets": ("attention/qkv",), "parts": {"attention/qkv": (True, False, True)}}
    fixed: dict[str, Any] = {
        "task": "causal-lm",
        "lora": lora,
        "rank": 4,
        "batch": 8,
        "length": 512,
    }
    return Shape(fields=fields | options.pop("fields", {}), **fixed | options)


def _encoder(layers: int, width: int, heads: int, **options: Any) -> Shape:
    """RoBERTa: query and value, rank 8, and a new classifier in full (appendix D.1)."""
    fields = {
        "model_type": "roberta",
        "vocab_size": 50265,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    }
    lora = {"targets": ("query", "value"), "train": ("classifier/.*",)}
    fixed: dict[str, Any] = {"task": "sequence-classification", "lora": lora, "rank": 8}
    sizes: dict[str, Any] = {"batch": 32, "length": 128}
    return Shape(fields=fields | options.pop("fields", {}), **fixed | sizes | options)


def _llama(layers: int, width: int, inner: int, **options: Any) -> Shape:
    """Llama 3: every matrix of the layers, rank 16."""
    fields = {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
    }
    lora = {"targets": ("all-linear",)}
    fixed: dict[str, Any] = {"task": "causal-lm", "lora": lora, "rank": 16, "dtype": "bfloat16"}
    return Shape(fields=fields | options.pop("fields", {}), **fixed | options)


_TINY = {"vocab_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}

SHAPES: dict[str, Shape] = {
    "gpt2-small": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16, trained=0.35, total=354.92),
    "gpt2-large": _gpt2(36, 1280, 20, trained=0.77, total=774.03),
    "roberta-base": _encoder(12, 768, 12, trained=0.3, total=125.0),
    "roberta-large": _encoder(24, 1024, 16, trained=0.8, total=355.0),
    "llama-1b": _llama(16, 2048, 8192, batch=8, length=2048, fields={"tie_word_embeddings": True}),
    "llama-8b": _llama(32, 4096, 14336, batch=2, length=2048),
    "gpt3-175b": _gpt2(
        96, 12288, 96, fields={"n_positions": 2048}, dtype="float16", total=175_000.0
    ),
    # The quickstart's: all-MiniLM-L6-v2.
    "minilm": _encoder(
        6,
        384,
        12,
        length=64,
        fields={
            "model_type": "bert",
            "vocab_size": 30522,
            "max_position_embeddings": 512,
            "type_vocab_size": 2,
            "layer_norm_eps": 1e-12,
        },
    ),
    "tiny": _llama(2, 64, 128, batch=4, length=32, fields=_TINY),
    "tiny-gpt2": _gpt2(2, 64, 4, batch=4, length=32, fields={"vocab_size": 256}),
    "tiny-roberta": _encoder(2, 64, 4, batch=4, length=32, fields={"vocab_size": 256}),
}
TINY = ("tiny", "tiny-gpt2", "tiny-roberta")
