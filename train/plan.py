"""What a run will work on and for how long: its texts as tokens, and its number of steps."""

import hashlib
import math
from typing import NamedTuple

import jax
import numpy as np

from lora_jax import training

from .batches import Encoded, encode, load_tokenizer
from .config import Config
from .data import Data, load_data


class Sets(NamedTuple):
    """What a run learns from and is evaluated on: texts, and their tokens."""

    data: Data
    train: Encoded
    evaluation: Encoded


class Plan(NamedTuple):
    """When things happen, in steps."""

    steps: int
    evaluate_every: int
    save_every: int


def load_sets(config: Config) -> Sets:
    """Reads and tokenises the data."""
    data = load_data(config.data, config.model.num_labels)
    tokenizer = load_tokenizer(config.model.path)
    train, evaluation = (
        encode(tokenizer, examples, config.data.max_length)
        for examples in (data.train, data.evaluation)
    )
    return Sets(data, train, evaluation)


def make_plan(config: Config, rows: int, mesh: jax.sharding.Mesh) -> Plan:
    """Counts steps.

    Raises:
        ValueError: A batch does not divide over the devices, or is larger than the data.
    """
    section = config.training
    training.check_batch(jax.ShapeDtypeStruct((section.batch_size,), np.int32), mesh)
    if section.batch_size > rows:
        raise ValueError(
            f"`training.batch_size` is {section.batch_size}, and there are {rows} rows to train "
            "on: make it smaller."
        )
    epoch = rows / section.batch_size
    steps = section.steps or max(1, round((section.epochs or 0) * epoch))
    # At the end of each epoch, and the last one at the end of the run.
    evaluate_every = section.evaluate_every or math.ceil(steps / max(1, round(steps / epoch)))
    return Plan(steps, evaluate_every, section.save_every or evaluate_every)


def check_vocabulary(sets: Sets, vocabulary: int) -> None:
    """Refuses tokens that the model has no embedding for.

    Raises:
        ValueError: The tokenizer is of another model.
    """
    largest = max(int(ids.max()) for part in (sets.train, sets.evaluation) for ids in part.ids)
    if largest >= vocabulary:
        raise ValueError(
            f"The tokenizer gives token {largest}, and the model has embeddings for {vocabulary}: "
            "they do not belong together."
        )


def describe(sets: Sets, config: Config) -> list[str]:
    """The sizes of the data, and how many texts were cut if any were."""
    train, evaluation = sets.train, sets.evaluation
    lines = [
        f"{len(train.ids)} rows to train on, {len(evaluation.ids)} to evaluate on, "
        f"{len(sets.data.names)} classes ({', '.join(sets.data.names[:10])})",
        f"{train.tokens:,} training tokens, the longest batches padded to {train.lengths[-1]}",
    ]
    cut, total = train.truncated + evaluation.truncated, len(train.ids) + len(evaluation.ids)
    if cut:
        lines.append(f"{cut} of {total} texts were cut to {config.data.max_length} tokens")
    return lines


def fingerprints(sets: Sets) -> dict[str, str]:
    """A short hash of the tokens and labels of each set, to know them by when a run resumes."""
    return {"training": _fingerprint(sets.train), "evaluation": _fingerprint(sets.evaluation)}


def _fingerprint(encoded: Encoded) -> str:
    digest = hashlib.sha256(encoded.labels.tobytes())
    for ids in encoded.ids:
        digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    return digest.hexdigest()[:16]
