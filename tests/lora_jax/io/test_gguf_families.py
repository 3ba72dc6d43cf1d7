"""Each architecture, written by its converter's rules, reads as the published checkpoint."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax._paths import flatten
from lora_jax.io.gguf import read_config_json
from lora_jax.io.hugging_face import published_shape
from lora_jax.models import from_pretrained
from tests.lora_jax.io import gguf_files
from tests.lora_jax.io.gguf_files import HEADS, KV_HEADS, LLAMA_KEYS, changed, join_pairs

SHARED = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": gguf_files.VOCAB,
}
COMMON = {
    **SHARED,
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
WINDOW = {"attention__sliding_window": 8}
LENGTHS = {"attention__key_length": 16, "attention__value_length": 16}
GPT2_KEYS = {
    "block_count": 2,
    "context_length": 1024,
    "embedding_length": 64,
    "feed_forward_length": 256,
    "attention.head_count": 4,
    "attention.layer_norm_epsilon": 1e-5,
}
CASES = {
    "llama-biased": (
        LLAMA_KEYS,
        {
            **COMMON,
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "llama-with-mistral-s-window": (
        changed(LLAMA_KEYS, **WINDOW),
        {
            **COMMON,
            "model_type": "mistral",
            "architectures": ["MistralForCausalLM"],
            "hidden_act": "silu",
            "sliding_window": 8,
        },
    ),
    "qwen2": (
        LLAMA_KEYS,
        {
            **COMMON,
            "model_type": "qwen2",
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_act": "silu",
            "use_sliding_window": False,
        },
    ),
    "qwen3": (
        changed(LLAMA_KEYS, **LENGTHS),
        {
            **COMMON,
            "model_type": "qwen3",
            "architectures": ["Qwen3ForCausalLM"],
            "hidden_act": "silu",
            "attention_bias": False,
            "use_sliding_window": False,
        },
    ),
    "gemma3": (
        changed(LLAMA_KEYS, **LENGTHS, **WINDOW, rope__freq_base=1e6),
        {
            **COMMON,
            "model_type": "gemma3_text",
            "architectures": ["Gemma3ForCausalLM"],
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": ["sliding_attention", "sliding_attention"],
            "query_pre_attn_scalar": 16,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1e6,
            "sliding_window": 8,
        },
    ),
    "gpt2": (
        GPT2_KEYS,
        {
            **SHARED,
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            "n_embd": 64,
            "n_head": 4,
            "n_inner": 256,
            "n_layer": 2,
            "n_positions": 1024,
        },
    ),
}


def published_weights(directory):
    """Random weights by the names and shapes that a directory's config.json asks for."""
    model = from_pretrained(directory, "causal-lm", abstract=True)
    shapes, _ = flatten(model.params)
    rng = np.random.default_rng(0)
    return {
        tensor: draw(rng, published_shape(entry, shapes[path].shape))
        for path, entry in model.names.entries.items()
        for tensor in entry.tensors
    }


def draw(rng, shape):
    return (0.3 * rng.standard_normal(shape)).astype(np.float32)


def as_stored(architecture, name, weight):
    """What the converter makes of a published tensor."""
    if architecture == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
        return join_pairs(weight, HEADS if "q_proj" in name else KV_HEADS)
    if architecture == "gemma3" and name.endswith("norm.weight"):
        return weight + 1
    if architecture == "gpt2" and ".c_" in name and weight.ndim == 2:
        return np.ascontiguousarray(weight.T)
    return weight


def written(directory, case):
    """A GGUF file and the published checkpoint that it was made of, in one directory."""
    architecture = case.partition("-")[0]
    keys, config_json = CASES[case]
    (directory / "config.json").write_text(json.dumps(config_json))
    weights = published_weights(directory)
    tensors = {
        gguf_files.own_name(name, architecture): as_stored(architecture, name, weight)
        for name, weight in weights.items()
    }
    save_file(weights, directory / "model.safetensors")
    return gguf_files.write(directory / "m.gguf", tensors, keys, architecture=architecture)


@pytest.mark.parametrize("case", CASES)
def test_an_architecture_reads_as_published(tmp_path, case):
    file = written(tmp_path, case)
    architecture, config_json = case.partition("-")[0], CASES[case][1]
    assert read_config_json(file) == config_json
    found, published = (from_pretrained(path, "causal-lm") for path in (file, tmp_path))
    assert found.config == published.config
    # Gemma's norms have one added in the file, in float32: half an ulp of numbers up to 4.
    atol = 2.0**-22 if architecture == "gemma3" else 0.0
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=0, atol=atol),
        found.params,
        published.params,
    )
