"""Bytes of a safetensors file, from the names and shapes of its tensors alone.

    8 bytes, then the header (JSON, filled up to a multiple of 8), then the tensors one by one

https://huggingface.co/docs/safetensors. Files are predicted, so that no model of 350 GB has to
be written; small ones are written, and must be as long as predicted.
"""

import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import lora_jax
from lora_jax import models

from . import contenders
from .shapes import Shape

_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class Tensors(NamedTuple):
    """What a file holds: names, and shapes and dtypes of tensors; and its metadata."""

    tensors: Mapping[str, jax.ShapeDtypeStruct]
    metadata: Mapping[str, str]


def file_bytes(file: Tensors) -> int:
    """Bytes of the file, its header included.

    >>> tensor = jax.ShapeDtypeStruct((2, 3), jax.numpy.float32)
    >>> file_bytes(Tensors({"a": tensor}, {"format": "pt"}))
    128
    """
    header: dict[str, Any] = {"__metadata__": dict(file.metadata)}
    end = 0
    for name in sorted(file.tensors):
        tensor, begin = file.tensors[name], end
        end += math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[tensor.dtype.name],
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + 8 * math.ceil(length / 8) + end


def checkpoint(model: models.Pretrained) -> Tensors:
    """The full checkpoint, as one file: the published tensor of every weight."""
    tensors = {}
    for path, entry in model.names.entries.items():
        tensors |= dict.fromkeys(entry.tensors, _published(entry, _weight_at(model.params, path)))
    return Tensors(tensors, {"format": "pt"})


def adapter(model: models.Pretrained, trainable: Mapping[str, Any]) -> Tensors:
    """The adapter in PEFT's format.

    A kernel adapted in part is there one adapter of the whole kernel, whose rank is that of all
    its parts together, with a note in the metadata that says which.
    """
    tensors: dict[str, jax.ShapeDtypeStruct] = {}
    parts: dict[str, list[bool]] = {}
    for path, trained in trainable.items():
        entry = model.names.entries[path]
        if not isinstance(trained, lora_jax.Factors):
            named = dict.fromkeys(entry.tensors, _published(entry, trained))
            tensors |= {f"base_model.model.{name}": tensor for name, tensor in named.items()}
            continue
        whole = jax.eval_shape(lambda factors: factors.whole(), trained)
        for module in entry.modules:
            for side, factor in (("A", whole.a), ("B", whole.b)):
                shape = factor.shape[entry.stacked :][::-1]
                name = f"base_model.model.{module}.lora_{side}.weight"
                tensors[name] = jax.ShapeDtypeStruct(shape, factor.dtype)
            if isinstance(trained, lora_jax.PartFactors):
                parts[module] = list(trained.parts)
    note = {"lora_jax.parts": json.dumps(parts)} if parts else {}
    return Tensors(tensors, {"format": "pt"} | note)


def _published(entry: Any, weight: Any) -> jax.ShapeDtypeStruct:
    shape = weight.shape[entry.stacked :]
    return jax.ShapeDtypeStruct(shape[::-1] if entry.transposed else shape, weight.dtype)


def _weight_at(params: Any, path: str) -> Any:
    for segment in path.split("/"):
        params = params[segment]
    return params


def written(shape: Shape) -> dict[str, int]:
    """Writes a small model's checkpoint and adapter for real; predicted and written bytes."""
    with tempfile.TemporaryDirectory() as passing:
        base, full, low = (Path(passing) / name for name in ("base", "full", "low"))
        base.mkdir()
        model = contenders.abstract_model(shape, directory=base)
        params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), model.params)
        _, trainable = contenders.halves(model, params, shape, "lora")
        models.save_pretrained(full, model, params)
        lora_jax.save_adapter(low, trainable, contenders.lora_config(shape, "lora"), model)
        return {
            "full_predicted": file_bytes(checkpoint(model)),
            "full_written": (full / "model.safetensors").stat().st_size,
            "adapter_predicted": file_bytes(adapter(model, trainable)),
            "adapter_written": (low / "adapter_model.safetensors").stat().st_size,
        }
