"""Makes the committed GPT-2 references: a tiny checkpoint and what PyTorch computes with it.

    python tests/references/make_gpt2_references.py     (torch, transformers)

``config.json``; ``model.safetensors``, with an output head of its own beside the tied one's
table, so that one file serves both; ``outputs.npz`` with inputs and logits. Rows are full, padded
at the right and padded at the left, with the positions that generation gives them. All weights
are drawn, biases and norms too, wide enough that a mix-up shows.
"""

import json
import pathlib

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel

FOLDER = pathlib.Path(__file__).parent / "gpt2"
SIZES = {
    "vocab_size": 99,
    "n_positions": 24,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 48,
    "initializer_range": 0.2,
    "bos_token_id": 98,
    "eos_token_id": 98,
}


def draw(model: torch.nn.Module) -> None:
    """Redraws every weight: normal of width 0.2, scales of norms around 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            centre = float(".ln_" in name and name.endswith(".weight"))
            weight.copy_(centre + 0.2 * torch.randn(weight.shape, generator=generator))


def inputs() -> dict[str, np.ndarray]:
    """Three rows of 12 tokens; the positions count the tokens that are kept."""
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (3, 12))
    mask = np.ones((3, 12), np.int64)
    mask[1, 7:], mask[2, :4] = 0, 0
    positions = np.maximum(mask.cumsum(1) - 1, 0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def logits(config: GPT2Config, weights: dict[str, torch.Tensor]) -> np.ndarray:
    """What the model of a config computes with the weights that it has."""
    model = GPT2LMHeadModel(config).eval()
    tied = config.tie_word_embeddings
    kept = {k: v for k, v in weights.items() if not (tied and k == "lm_head.weight")}
    model.load_state_dict(kept, strict=False)
    with torch.no_grad():
        return model(**{k: torch.from_numpy(v) for k, v in inputs().items()}).logits.numpy()


def make() -> None:
    """Writes the folder."""
    FOLDER.mkdir(exist_ok=True)
    tied, untied = (GPT2Config(**SIZES, tie_word_embeddings=tied) for tied in (True, False))
    fields = {**tied.to_dict(), "architectures": ["GPT2LMHeadModel"]}
    (FOLDER / "config.json").write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    model = GPT2LMHeadModel(untied)
    draw(model)
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(weights, FOLDER / "model.safetensors", metadata={"format": "pt"})
    outputs = {"tied": logits(tied, weights), "untied": logits(untied, weights)}
    np.savez_compressed(FOLDER / "outputs.npz", **inputs(), **outputs)


if __name__ == "__main__":
    make()
