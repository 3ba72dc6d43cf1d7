"""Part a: what trains, what is stored, what the optimizer keeps. Shapes say it all.

    LoRA on query and value:  layers * 2 * rank * (in + out) parameters

Exact, and without an accelerator: `jax.eval_shape` of the true models.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax

import lora_jax

from . import contenders, files
from .shapes import SHAPES, TINY, Shape

SIZES = (
    "gpt2-small",
    "gpt2-medium",
    "gpt2-large",
    "roberta-base",
    "roberta-large",
    "llama-1b",
    "llama-8b",
    "gpt3-175b",
)


def rows(sizes: Sequence[str] = SIZES) -> list[dict[str, Any]]:
    """A row for each model."""
    return [row(name, SHAPES[name]) for name in sizes]


def row(name: str, shape: Shape) -> dict[str, Any]:
    """Counts and bytes of one model, LoRA beside full fine-tuning."""
    model = contenders.abstract_model(shape)
    base = nbytes(model.params)
    _, trainable = contenders.halves(model, model.params, shape, "lora")
    _, everything = contenders.halves(model, model.params, shape, "full")
    factors = [leaf for leaf in trainable.values() if isinstance(leaf, lora_jax.Factors)]
    moments, all_moments = (_optimizer_bytes(half) for half in (trainable, everything))
    state = base + _more_than_base(trainable) + moments
    return {
        "size": name,
        "rank": shape.rank,
        "dtype": shape.dtype,
        "parameters": count(model.params),
        "factors": count(factors),
        "trained": count(trainable),
        "paper_trained": shape.trained,
        "paper_total": shape.total,
        "full_file_bytes": files.file_bytes(files.checkpoint(model)),
        "adapter_file_bytes": files.file_bytes(files.adapter(model, trainable)),
        "trained_bytes": nbytes(trainable),
        "full_optimizer_bytes": all_moments,
        "lora_optimizer_bytes": moments,
        "full_state_bytes": base + all_moments,
        "lora_state_bytes": state,
    }


def written_rows(sizes: Sequence[str] = TINY) -> list[dict[str, Any]]:
    """Small models written for real: predicted and written bytes."""
    return [{"size": name, **files.written(SHAPES[name])} for name in sizes]


def count(tree: Any) -> int:
    """Numbers in a tree of arrays or of their shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def nbytes(tree: Any) -> int:
    """Their bytes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _optimizer_bytes(trainable: Any) -> int:
    return nbytes(jax.eval_shape(contenders.optimizer().init, trainable))


def _more_than_base(trainable: dict[str, Any]) -> int:
    """Bytes of the factors: a weight that trains in full stands in the base already."""
    return nbytes([leaf for leaf in trainable.values() if isinstance(leaf, lora_jax.Factors)])
