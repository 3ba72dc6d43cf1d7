"""The committed references of the Llama family as checkpoints that `from_pretrained` reads."""

import json
import shutil
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")


def outputs(family: str) -> dict[str, np.ndarray]:
    """Inputs, and what PyTorch computed from them."""
    with np.load(HERE / family / "outputs.npz") as stored:
        return dict(stored)


def config_json(family: str, **changes) -> dict:
    """A family's ``config.json`` with changes; a change to ``...`` takes the field out."""
    fields = json.loads((HERE / family / "config.json").read_text()) | changes
    return {name: value for name, value in fields.items() if value is not ...}


def checkpoint(directory: Path, family: str, **changes) -> Path:
    """Writes a checkpoint; ``changes`` go into ``config.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_json(family, **changes)))
    shutil.copyfile(HERE / family / "model.safetensors", directory / "model.safetensors")
    return directory
