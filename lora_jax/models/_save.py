"""save_pretrained: a model's weights as a complete Hugging Face directory.

save_pretrained(directory, model, merge(frozen, trainable))     weights that are merged already
save_merged(directory, model, frozen, trainable)                the same, merged while written
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._merge import check_float, merge_leaf, plain_leaves
from lora_jax._partition import _frozen_leaves
from lora_jax._paths import flatten, nearest
from lora_jax._quantized import is_quantized
from lora_jax._weights import is_node
from lora_jax.io._checkpoint_writer import MAX_SHARD_BYTES, Deferred, write_checkpoint
from lora_jax.models._pretrained import Pretrained

WRITTEN = ("float16", "bfloat16", "float32", "float64")
"""Dtypes of weights that `from_pretrained` reads."""


def save_pretrained(
    directory: str | os.PathLike,
    model: Pretrained,
    params: Any,
    *,
    dtype: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Writes plain weights as a Hugging Face checkpoint, whole or not at all.

    The directory holds ``config.json``, the weights as safetensors, and copies of the base's
    tokenizer files and ``generation_config.json``; `from_pretrained` and the usual libraries
    load it. A tied output head is not stored a second time.

    Args:
        directory: Where; made, with its parents.
        model: The model that the weights belong to.
        params: Plain weights of the structure of ``model.params``: `lora_jax.merge` first.
        dtype: What weights are rounded to as they are written; None keeps each one's own. Of a
            bfloat16 base, ``merge(..., dtype=jnp.float32)`` and then a dtype here rounds once.
        max_shard_bytes: How much one file holds before there are several and an index; 5 GB as
            the usual libraries have it. The host holds a copy of one file's tensors at a time.
        overwrite: Whether a directory that holds files may be replaced.

    Returns:
        ``directory``.

    Raises:
        ValueError: ``params`` are not plain weights of the model (all problems are listed), a
            weight leaves the range of ``dtype``, ``directory`` holds files, or the base's
            directory is gone.
        OSError: A file could not be written; nothing is left behind.
    """
    leaves = leaves_of(params)
    check_weights(leaves, model)
    return _write(directory, model, leaves, {}, dtype, max_shard_bytes, overwrite)


def save_merged(
    directory: str | os.PathLike,
    model: Pretrained,
    frozen: Any,
    trainable: Mapping[str, Any],
    *,
    dtype: Any = None,
    base: Any = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Merges and writes a weight at a time: no second model is held beside the base.

    Each weight is summed in float32 and rounded once, to the dtype that is written.

    Args:
        directory: Where; made, with its parents.
        model: The model that was split.
        frozen: The frozen half of `lora_jax.split`.
        trainable: The trainable half.
        dtype: What is written; None means each weight's own dtype.
        base: As in `lora_jax.merge`: the full precision of a quantised ``frozen``; None merges
            into its dequantised weights, and warns.
        max_shard_bytes: As in `save_pretrained`.
        overwrite: Whether a directory that holds files may be replaced.

    Returns:
        ``directory``.

    Raises:
        ValueError: As `lora_jax.merge` and `save_pretrained` raise it.
        OSError: A file could not be written; nothing is left behind.

    Warns:
        DequantizedMergeWarning: See ``base``.
    """
    leaves, _ = _frozen_leaves(frozen, trainable)
    leaves = plain_leaves(leaves, base)
    return _write(directory, model, leaves, trainable, dtype, max_shard_bytes, overwrite)


def _write(
    directory: str | os.PathLike,
    model: Pretrained,
    leaves: Mapping[str, Any],
    trainable: Mapping[str, Any],
    dtype: Any,
    max_shard_bytes: int,
    overwrite: bool,
) -> Path:
    _check_dtype(dtype)
    if not model.directory.exists():
        raise ValueError(
            f"{model.directory}, which the model was read from, no longer exists: its tokenizer "
            "and generation config cannot be copied. Put it back or load the model again."
        )
    given: dict[str, Any] = {
        path: trainable.get(path) if w is None else w for path, w in leaves.items()
    }
    check_weights(given, model, or_codes=True)
    weights = {
        path: Deferred(
            shape=weight.shape,
            dtype=weight.dtype if dtype is None else jnp.dtype(dtype),
            make=lambda path=path: merge_leaf(path, leaves[path], trainable.get(path), dtype),
        )
        for path, weight in given.items()
    }
    return write_checkpoint(
        directory,
        model.names,
        weights,
        _config_json(model, {str(weight.dtype) for weight in weights.values()}),
        source=model.directory,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )


def _check_dtype(dtype: Any) -> None:
    check_float(dtype)
    if dtype is not None and jnp.dtype(dtype).name not in WRITTEN:
        known = ", ".join(WRITTEN)
        raise ValueError(f"`dtype` must be one of {known}, got {jnp.dtype(dtype).name}.")


def leaves_of(params: Any) -> dict[str, Any]:
    """Path to leaf, where None and an adapted weight are leaves too."""
    return flatten(params, is_leaf=lambda leaf: leaf is None or is_node(leaf))[0]


def check_weights(weights: Mapping[str, Any], model: Pretrained, *, or_codes: bool = False) -> None:
    """Refuses weights that are not plain arrays of the model's paths and shapes.

    Args:
        weights: Path to weight.
        model: What they are to be weights of.
        or_codes: Whether quantised weights may be among them.

    Raises:
        ValueError: Lists every one that is missing, unknown, of another shape, not merged,
            quantised, or not an array of floats.
    """
    shapes, _ = flatten(model.params)
    quantized = [path for path, weight in weights.items() if is_quantized(weight)]
    problems = [
        *(f"missing: {path}" for path in shapes if path not in weights),
        *(f"quantised: {path}" for path in ([] if or_codes else quantized)),
        *(p for path, weight in weights.items() for p in _problems(path, weight, shapes)),
    ]
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        hint = "\nlora_jax.dequantize gives plain weights." if quantized and not or_codes else ""
        raise ValueError(f"These are not plain weights of the model:{listed}{hint}")


def _problems(path: str, weight: Any, shapes: Mapping[str, Any]) -> Iterable[str]:
    if path not in shapes:
        yield f"unknown: {path}; the nearest is {nearest(path, shapes)[0]}"
    elif is_node(weight):
        yield f"not merged: {path}; lora_jax.merge gives plain weights"
    elif isinstance(weight, jax.ShapeDtypeStruct):
        yield f"no values: {path}; load the model with abstract=False"
    elif not hasattr(weight, "dtype") or not jnp.issubdtype(weight.dtype, jnp.floating):
        yield f"not a float array: {path} is {getattr(weight, 'dtype', type(weight).__name__)}"
    elif tuple(weight.shape) != tuple(shapes[path].shape):
        yield f"shape: {path} is {tuple(weight.shape)}, the model has {tuple(shapes[path].shape)}"


def _config_json(model: Pretrained, dtypes: set[str]) -> dict[str, Any]:
    """The base's ``config.json`` with the model's own architecture, labels and dtype in it.

    The dtype goes by two names: ``torch_dtype`` is what older readers know.
    """
    kept = {k: v for k, v in model.config_json.items() if k not in ("dtype", "torch_dtype")}
    one = next(iter(dtypes)) if len(dtypes) == 1 else None
    return {
        **kept,
        **model.family.config_fields(model.config),
        **({"dtype": one, "torch_dtype": one} if one else {}),
        **_labels(model),
        "architectures": [model.family.architecture(model.config, model.task)],
    }


def _labels(model: Pretrained) -> dict[str, Any]:
    """``id2label`` and ``label2id`` of a classification head, kept where they fit."""
    if not model.task.endswith("classification"):
        return {}
    count = model.config.num_labels
    if len(model.config_json.get("id2label") or ()) == count:
        return {}
    id2label = {str(index): f"LABEL_{index}" for index in range(count)}
    return {"id2label": id2label, "label2id": {v: int(k) for k, v in id2label.items()}}
