"""Makes the committed adapters, and what PyTorch computes with them.

    python -m tests.references.make_peft_references     (torch, transformers, peft; from the root)

Into each family's folder: ``peft/`` (query and value at rank 4, head in full) and
``peft-rslora-patterns/`` (rank and alpha of their own for some layers, rsLoRA); their logits go
into ``outputs.npz`` under the same names. Run it after ``make_bert_references.py``.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

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
    (HERE / family / name / "README.md").unlink()
    file = HERE / family / name / "adapter_config.json"
    fields = json.loads(file.read_text()) | {"base_model_name_or_path": None}
    fields["target_modules"].sort()
    file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    with torch.no_grad():
        return model(**inputs).logits.numpy()


if __name__ == "__main__":
    for each in FAMILIES:
        made = {name: make(each, name) for name in ADAPTERS}
        np.savez_compressed(HERE / each / "outputs.npz", **(outputs(each) | made))
