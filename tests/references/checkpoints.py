"""The committed references put together as checkpoints that `from_pretrained` reads."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
FAMILIES = ("bert", "roberta")
HEADS = {
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "masked-lm": "ForMaskedLM",
}


def outputs(family: str) -> dict[str, np.ndarray]:
    """Inputs, and what PyTorch computed from them."""
    with np.load(HERE / family / "outputs.npz") as stored:
        return dict(stored)


def config_json(family: str, task: str | None, **changes) -> dict:
    """A family's ``config.json`` for a task (None: the bare encoder), with changes."""
    fields = json.loads((HERE / family / "config.json").read_text())
    fields["architectures"] = [family.capitalize() + (HEADS[task] if task else "Model")]
    if task and task.endswith("classification"):
        fields["id2label"] = {str(i): f"LABEL_{i}" for i in range(3)}
    return fields | changes


def tensors(family: str, task: str | None) -> dict[str, np.ndarray]:
    """A checkpoint's tensors. Those of the bare encoder have no prefix."""
    encoder = load_file(HERE / family / "encoder.safetensors")
    if task is None:
        return {name.removeprefix(f"{family}."): t for name, t in encoder.items()}
    return encoder | load_file(HERE / family / f"{task}.safetensors")


def checkpoint(directory: Path, family: str, task: str | None, **changes) -> Path:
    """Writes a checkpoint in one file; ``changes`` go into ``config.json``."""
    return write(directory, config_json(family, task, **changes), tensors(family, task))


def write(directory: Path, fields: dict, stored: dict[str, np.ndarray]) -> Path:
    """Writes a checkpoint of any config and tensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(fields))
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def hub_cache(cache: Path, checkpoint: Path, hub_id: str, revision: str) -> Path:
    """Writes what the hub's client keeps of a checkpoint that was fetched at one revision only."""
    repository, commit = cache / f"models--{hub_id.replace('/', '--')}", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(commit)
    shutil.copytree(checkpoint, repository / "snapshots" / commit)
    return cache


def sharded(directory: Path, family: str, task: str) -> Path:
    """Writes a checkpoint in two files and their index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_json(family, task)))
    shards = {"model-1.safetensors": "encoder", "model-2.safetensors": task}
    weight_map = {}
    for shard, name in shards.items():
        shutil.copyfile(HERE / family / f"{name}.safetensors", directory / shard)
        weight_map |= dict.fromkeys(load_file(directory / shard), shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
