"""LoRA and full fine-tuning of one model, through the public API, the same in all but `split`.

    lora   factors of the targets train (and a new head, where there is one)
    full   every weight trains:  LoraConfig(targets=(), train=(".*",))

Weights are random: what a step costs does not depend on their values.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lora_jax
from lora_jax import models, training

from ..step import loss, weights
from .shapes import Shape

ALPHA = 16.0  # no figure depends on it
CHUNK = 1024  # tokens whose logits exist at a time, as in the train application
CONFIG = "config.json"


def weights_of(model: models.Pretrained) -> Any:
    """Random weights of an abstract model, drawn on the device."""
    return weights.random_weights(model.params, None)


def abstract_model(
    shape: Shape,
    *,
    dtype: str | None = None,
    scan_layers: bool = True,
    remat: str = "none",
    directory: Path | None = None,
) -> models.Pretrained:
    """The model with shapes in place of weights.

    Args:
        shape: Which.
        dtype: Of its weights and its arithmetic; None is the published one.
        scan_layers: Whether its layers are one scan.
        remat: What its layers recompute.
        directory: Where its ``config.json`` is written; None is nowhere that stays.
    """
    with tempfile.TemporaryDirectory() as passing:
        place = Path(passing) if directory is None else directory
        (place / CONFIG).write_text(json.dumps(dict(shape.fields)), encoding="utf-8")
        return models.from_pretrained(
            place,
            task=shape.task,
            dtype=jnp.dtype(dtype or shape.dtype),
            scan_layers=scan_layers,
            remat=remat,
            abstract=True,
        )


def lora_config(shape: Shape, method: str, rank: int | None = None) -> lora_jax.LoraConfig:
    """What trains: the shape's own targets at ``rank`` (None is its own), or everything."""
    if method == "full":
        return lora_jax.LoraConfig(rank=1, alpha=ALPHA, targets=(), train=(".*",))
    return lora_jax.LoraConfig(rank=rank or shape.rank, alpha=ALPHA, **shape.lora)


def halves(
    model: models.Pretrained, params: Any, shape: Shape, method: str, rank: int | None = None
) -> tuple[Any, Any]:
    """``split`` of weights, or of their shapes: ``(frozen, trainable)``."""
    config = lora_config(shape, method, rank)

    def split(params: Any) -> tuple[Any, Any]:
        return lora_jax.split(params, config, jax.random.key(1), layouts=model.layouts)

    is_abstract = isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct)
    return jax.eval_shape(split, params) if is_abstract else split(params)


def make_loss(model: models.Pretrained) -> Callable[..., jax.Array]:
    """``(trainable, frozen, batch, keys) -> ()``: mean cross-entropy through the adapted model.

    Dropout is off, the model's and the factors', so that both methods do the same arithmetic.
    """
    return loss.make_loss(model, CHUNK)


def optimizer() -> optax.GradientTransformation:
    """AdamW: two moments of the dtype of what trains."""
    return optax.adamw(1e-4)


def one_device() -> jax.sharding.Mesh:
    """A mesh of the first device."""
    return training.make_mesh(devices=jax.devices()[:1])


def batch_of(shape: Shape, batch: int, length: int) -> dict[str, jax.Array]:
    """Random tokens ``(batch, length)``, none of them padding, and a classifier's labels."""
    key = jax.random.key(2, impl="unsafe_rbg")  # of all generators it compiles fastest
    ids = jax.random.randint(key, (batch, length), 2, shape.fields["vocab_size"])
    return {"input_ids": ids, "labels": jnp.zeros(batch, jnp.int32)}
