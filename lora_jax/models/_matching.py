"""Which tensors of a checkpoint make which weights of a model, and which weights have to be drawn.

A head that the checkpoint lacks, or has for another task, is drawn; half a head is an error.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax

from lora_jax.io import gguf, hugging_face
from lora_jax.io._tensor import Tensor
from lora_jax.io.names import NameTable


class NewHeadWarning(UserWarning):
    """The checkpoint has no head for the task, so an untrained one was drawn.

    It is a warning and not a log line because a log line is invisible by default and the
    logits are noise until the head is trained. Whoever expects it says so with
    ``new_head=True`` and is not warned.
    """


def format_of(checkpoint: Path) -> ModuleType:
    """Which module reads it."""
    return gguf if checkpoint.is_file() else hugging_face


def match(
    directory: Path,
    other_task: bool,
    names: NameTable,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    new_head: bool | None,
    abstract: bool,
) -> tuple[dict[str, tuple[Tensor, ...]], tuple[str, ...]]:
    """Finds the tensors of every weight, and the weights that have to be drawn.

    Args:
        directory: The checkpoint, or a GGUF file.
        other_task: Whether its head is another task's, and is therefore left.
        names: What the weights are called.
        shapes: Path to shape of every weight.
        new_head: As in `lora_jax.models.from_pretrained`.
        abstract: Whether the checkpoint need not have weights.

    Returns:
        Path to tensors, and the paths of which there are none.

    Raises:
        ValueError: Tensors are missing, left over or of another shape (all listed).
    """
    if abstract and not _has_weights(directory):
        return {}, ()
    tensors = format_of(directory).find_tensors(directory)
    if new_head or other_task:
        tensors = {name: t for name, t in tensors.items() if not _in_a_head(names, name)}
    plain = {path: shape.shape for path, shape in shapes.items()}
    may_be_absent = () if new_head is False else _absent_heads(tensors, names)
    try:
        found, new = hugging_face.match_tensors(tensors, names, plain, may_be_absent)
    except ValueError as error:
        hint = "" if new_head else "Where only the head does not fit, new_head=True draws one."
        raise ValueError(f"{directory}: {error}\n{hint}".rstrip()) from None
    return found, new


def is_of_other_task(config_json: Mapping[str, Any], architecture: str) -> bool:
    """Whether the checkpoint says that its head is another task's (or that it has none)."""
    known = {architecture, architecture.replace("ForMaskedLM", "ForPreTraining")}
    architectures = config_json.get("architectures") or ()
    return bool(architectures) and known.isdisjoint(architectures)


def announce(new: tuple[str, ...], task: str, config_json: Mapping[str, Any]) -> None:
    """Warns whoever called the caller that these weights were drawn."""
    made_for = ", ".join(config_json.get("architectures") or ()) or "an unnamed architecture"
    warnings.warn(
        f"This checkpoint ({made_for}) has no head for {task!r}: {', '.join(new)} were drawn at "
        "random and want training. new_head=True says that you know.",
        NewHeadWarning,
        stacklevel=3,
    )


def _has_weights(directory: Path) -> bool:
    files = (hugging_face.SINGLE, hugging_face.INDEX)
    return directory.is_file() or any((directory / name).is_file() for name in files)


def _in_a_head(names: NameTable, tensor: str) -> bool:
    key = names.key(tensor)
    return key in names.unused and not key.startswith(("embeddings.", "pooler."))


def _absent_heads(tensors: Mapping[str, Any], names: NameTable) -> list[str]:
    """Paths of the heads of which the checkpoint has nothing; half a head is an error."""
    keys = {names.key(name) for name in tensors}
    heads: dict[str, list[str]] = {}
    for path in names.entries:
        top = path.partition("/")[0]
        if top in names.drawn:
            heads.setdefault(top, []).append(path)
    return [
        path
        for paths in heads.values()
        if not any(names.key(t) in keys for p in paths for t in names.entries[p].tensors)
        for path in paths
    ]
