"""For how long a run trains, in batches of which size, and whether its tokens are the model's."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax

from lora_jax import training

from .batches import Encoded
from .config import Config


class Plan(NamedTuple):
    """When things happen, in steps.

    Attributes:
        steps: The length of the run.
        epoch: Of an epoch; no whole number where a batch holds the end of one.
        evaluate_every: From one evaluation to the next.
        save_every: From one checkpoint to the next.
    """

    steps: int
    epoch: float
    evaluate_every: int
    save_every: int


def sized(config: Config, mesh: jax.sharding.Mesh, before: int | None = None) -> Config:
    """The config with the batch size of all devices together, whichever of both was given.

    Args:
        config: The config.
        mesh: The devices.
        before: That of the run that is gone on with. Where only the size of a device was said,
            it stays what it was, on any number of devices.

    Raises:
        ValueError: They disagree, or the devices cannot share a batch.
    """
    section = config.training
    total, per_device = section.total, section.batch_size_per_device
    if total is None and before is not None:
        total, per_device = before, None
    size = training.batch_size(
        mesh, total=total, per_device=per_device, accumulate=section.accumulate
    )
    update = {"batch_size": size, "batch_size_per_device": None}
    return config.model_copy(update={"training": section.model_copy(update=update)})


def make_plan(config: Config, rows: int) -> Plan:
    """Counts steps.

    Args:
        config: The run's config, `sized`.
        rows: How many there are to train on.

    Raises:
        ValueError: A batch is larger than the data.
    """
    section = config.training
    if section.batch_size > rows:
        raise ValueError(
            f"`training.batch_size` is {section.batch_size}, and there are {rows} rows to train "
            "on: make it smaller."
        )
    epoch = rows / section.batch_size
    steps = section.steps or max(1, round((section.epochs or 0) * epoch))
    # At the end of each epoch, and the last one at the end of the run.
    evaluate_every = section.evaluate_every or math.ceil(steps / max(1, round(steps / epoch)))
    return Plan(steps, epoch, evaluate_every, section.save_every or evaluate_every)


def check_vocabulary(parts: Iterable[Encoded], vocabulary: int) -> None:
    """Refuses tokens that the model has no embedding for, padding too: it would be NaN.

    Raises:
        ValueError: The tokenizer is of another model.
    """
    largest = max(max(part.pad, *(int(ids.max()) for ids in part.ids)) for part in parts)
    if largest >= vocabulary:
        raise ValueError(
            f"The tokenizer gives token {largest}, and the model has embeddings for {vocabulary}: "
            "they do not belong together."
        )
