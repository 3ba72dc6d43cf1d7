"""What an adapter says that its model is for: its task type, and by its head how many classes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..io._safetensors import Tensor, tensors_in
from ..io.peft import _config as adapter_config, _keys as peft_keys
from ..models._families import family_of


def task_of(task_type: str | None, config_json: Mapping[str, Any]) -> str:
    """What the model is for: as the adapter says, or as the base's own head does.

    Args:
        task_type: Of ``adapter_config.json``, in PEFT's words, if it has one.
        config_json: The base's.

    Raises:
        ValueError: The task is none that is known, or nothing says which it is.
    """
    by_type = {peft: ours for ours, peft in adapter_config.TASK_TYPES.items() if peft}
    if task_type in by_type:
        return by_type[task_type]
    if task_type is not None:
        raise ValueError(f"`task_type` {task_type!r} is not supported; known: {list(by_type)}.")
    family = family_of(config_json)
    config = family.read_config(config_json)
    named = config_json.get("architectures") or ()
    for task in family.TASKS:
        if family.architecture(config, task) in named:
            return task
    raise ValueError(
        f"The adapter names no task, and of the base's architectures, {list(named)}, none is "
        f"known; known tasks: {', '.join(family.TASKS)}."
    )


def labels_of(adapter: Path, config_json: Mapping[str, Any], task: str) -> int | None:
    """How many classes the head in the adapter has; None where it has no such head.

    Args:
        adapter: Its directory.
        config_json: The base's.
        task: What the model is for.
    """
    if not task.endswith("classification"):
        return None
    family = family_of(config_json)
    names = family.name_table(family.read_config(config_json), task, scan_layers=False)
    saved: dict[str, Tensor] = {}
    for name, tensor in tensors_in(adapter / adapter_config.WEIGHTS).items():
        key = peft_keys.parse(name)
        if key is not None and key.role == "full":
            saved[names.key(key.tensor)] = tensor
    head = [entry for path, entry in names.entries.items() if names.in_head(path)]
    keys = [names.key(entry.tensors[0]) for entry in head if entry.kind == "linear"]
    if not all(names.key(entry.tensors[0]) in saved for entry in head):
        return None
    return saved[keys[-1]].shape[0]
