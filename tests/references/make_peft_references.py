"""Makes the committed adapters, and what PyTorch computes with them.

    python -m tests.references.make_peft_references     (torch, transformers, peft; from the root)

Into the folder of each encoder: ``peft/`` (query and value at rank 4, head in full) and
``peft-rslora-patterns/`` (rank and alpha of their own for some layers, rsLoRA); their logits go
into ``outputs.npz`` under the same names. Run it after ``make_bert_references.py``.

Into ``peft/FAMILY/`` of each decoder: a random base, adapters of each case of the format, and
``logits.npz``.
"""

import json
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from tests.oracle import peft_cases as cases
from tests.references.checkpoints import FAMILIES, HERE, checkpoint, outputs

TASK = "sequence-classification"
COMMON = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], "lora_dropout": 0.1}
ADAPTERS = {
    "peft": LoraConfig(r=4, lora_alpha=6, **COMMON),
    "peft-rslora-patterns": LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"layer.0.attention.self.query": 2},
        alpha_pattern={"1.attention.self.value": 3},
        **COMMON,
    ),
}


def draw(model: torch.nn.Module) -> None:
    """Moves everything that trains, so that nothing is at its start."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.requires_grad:
                width = 0.5 if "lora_" in name else 0.2
                weight.add_(width * torch.randn(weight.shape, generator=generator))


def make(family: str, name: str) -> np.ndarray:
    """Writes one adapter; returns its logits."""
    given = outputs(family)
    inputs = {n: torch.from_numpy(given[n]) for n in ("input_ids", "attention_mask")}
    inputs["token_type_ids"] = torch.from_numpy(given["token_type_ids"])
    with tempfile.TemporaryDirectory() as scratch:
        base = checkpoint(Path(scratch), family, TASK)
        model = get_peft_model(
            AutoModelForSequenceClassification.from_pretrained(base), ADAPTERS[name]
        ).eval()
        draw(model)
        model.save_pretrained(HERE / family / name)
    tidy(HERE / family / name)
    with torch.no_grad():
        return model(**inputs).logits.numpy()


def tidy(directory: Path) -> None:
    """Leaves what says nothing of this machine."""
    (directory / "README.md").unlink()
    file = directory / "adapter_config.json"
    fields = json.loads(file.read_text()) | {"base_model_name_or_path": None}
    for name in ("target_modules", "modules_to_save", "exclude_modules"):
        if isinstance(fields[name], list):
            fields[name].sort()
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


DECODERS = {
    "llama": {
        "patterns": {
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"1.mlp.up_proj": 3},
            "use_rslora": True,
        },
        "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
        "head-in-full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    },
    "llama-tied": {
        "tied": {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        "lookup-only": {"target_modules": ["embed_tokens", "q_proj"]},
    },
    "qwen2": {
        "bias-all": {"target_modules": ["q_proj"], "bias": "all"},
        "bias-lora-only": {"target_modules": ["q_proj", "v_proj"], "bias": "lora_only"},
    },
    "gpt2": {
        "conv1d": {"target_modules": ["c_attn", "c_proj"]},
        "conv1d-bias-all": {"target_modules": ["c_attn"], "bias": "all"},
    },
}


def make_decoder(family: str) -> None:
    """Writes a base and its adapters."""
    here = HERE / "peft" / family
    shutil.rmtree(here, ignore_errors=True)
    base = cases.make_checkpoint(here / "base", family)
    (base / "generation_config.json").unlink()
    logits = {}
    for name, config in DECODERS[family].items():
        wanted = LoraConfig(r=4, lora_alpha=6, lora_dropout=0.1, task_type="CAUSAL_LM", **config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(cases.read_torch(base), wanted).eval()
            draw(model)
            model.save_pretrained(here / name)
        tidy(here / name)
        logits[name] = cases.torch_logits(model)
    np.savez_compressed(here / "logits.npz", input_ids=cases.IDS, mask=cases.MASK, **logits)


if __name__ == "__main__":
    for each in FAMILIES:
        made = {name: make(each, name) for name in ADAPTERS}
        np.savez_compressed(HERE / each / "outputs.npz", **(outputs(each) | made))
    for each in DECODERS:
        make_decoder(each)
