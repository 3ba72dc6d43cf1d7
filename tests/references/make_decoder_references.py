"""Makes the committed references of the Llama family: tiny checkpoints and what PyTorch computes.

    python tests/references/make_decoder_references.py     (torch, transformers)

A folder a member: ``config.json`` and ``model.safetensors`` as transformers writes them;
``outputs.npz`` with three rows of tokens and their logits, once all tokens kept (``plain``) and
once padded at the right and at the left (``padded``), with the positions that generation gives
them. All weights are drawn, biases and norms too, wide enough that a mix-up shows. Windows are
shorter than the rows.
"""

import json
import pathlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
FAMILIES = {
    "llama": (
        transformers.LlamaConfig(
            **SIZES, rope_parameters=LLAMA_3, attention_bias=True, mlp_bias=True
        ),
        transformers.LlamaForCausalLM,
    ),
    "mistral": (
        transformers.MistralConfig(**SIZES, sliding_window=5, head_dim=16),
        transformers.MistralForCausalLM,
    ),
    "qwen2": (
        transformers.Qwen2Config(
            **SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1
        ),
        transformers.Qwen2ForCausalLM,
    ),
    "qwen3": (
        transformers.Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
        transformers.Qwen3ForCausalLM,
    ),
    "gemma3": (
        transformers.Gemma3TextConfig(
            **SIZES | {"num_hidden_layers": 3},
            head_dim=16,
            query_pre_attn_scalar=20,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters=GEMMA_ROPES,
        ),
        transformers.Gemma3ForCausalLM,
    ),
}


def draw(model: torch.nn.Module) -> None:
    """Redraws every weight: normal of width 0.2 about 0, norms about what they start at."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            start = weight.mean() if "norm" in name else 0.0
            weight.copy_(start + 0.2 * torch.randn(weight.shape, generator=generator))


def inputs() -> dict[str, np.ndarray]:
    """Three rows of 12 tokens; the positions count the tokens that are kept."""
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (3, 12))
    mask = np.ones((3, 12), np.int64)
    mask[1, 7:], mask[2, :4] = 0, 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def make(family: str) -> None:
    """Writes one member's folder."""
    folder = HERE / family
    config, cls = FAMILIES[family]
    model = cls(config).eval()
    draw(model)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    given = {name: torch.from_numpy(array) for name, array in inputs().items()}
    with torch.no_grad():
        plain, padded = model(given["input_ids"]).logits, model(**given).logits
    outputs = {"plain": plain.numpy(), "padded": padded.numpy()}
    np.savez_compressed(folder / "outputs.npz", **inputs(), **outputs)


if __name__ == "__main__":
    for each in FAMILIES:
        make(each)
