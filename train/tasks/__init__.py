"""Tasks: what a run asks of a model is one file, and everything else is the same for all.

task = task_of(config)
total, weight = task.loss(model, params, batch, smoothing)
outputs = task.outputs(model, params, batch)
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from ..batches import Batch
from ..config import Config
from ..order import MakeOrder


class Sets(NamedTuple):
    """What a run learns from and is evaluated on; see `batches.Encoded`.

    Attributes:
        train: The rows to learn from, as the task encodes them.
        evaluation: The rows to evaluate on.
        tokenizer: The model's tokenizer.
        names: The names of the classes, of which a task without any has none.
    """

    train: Any
    evaluation: Any
    tokenizer: Any
    names: tuple[str, ...] = ()


class Model(NamedTuple):
    """What a task calls, as functions of weights that may be adapted.

    Attributes:
        apply: A model's `Pretrained.apply`.
        hidden: `Pretrained.hidden`, of a decoder.
        logits: `Pretrained.logits`, of a decoder.
        head: `Pretrained.head`, of a decoder.
        chunk: Tokens, of all devices together, whose logits may be in memory at once.
    """

    apply: Callable[..., Any]
    hidden: Callable[..., Any]
    logits: Callable[..., jax.Array]
    head: Callable[[Any], Any]
    chunk: int


class Answers(NamedTuple):
    """What a model says of the evaluation rows.

    Attributes:
        outputs: ``(rows, n)``: what `Task.outputs` gave for each row.
        texts: What it wrote, question by question, if it was asked to write.
    """

    outputs: np.ndarray
    texts: tuple[str, ...] = ()


class Examples(NamedTuple):
    """A table of the report: the same rows before and after training."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


Complete = Callable[[Sequence[Sequence[int]]], list[str]]
"""Prompts of token ids -> what the model writes after each."""


class Task(Protocol):
    """What the file of a task offers, as functions of its module.

    Attributes:
        HEADLINE: The metric that the report opens with.
        CURVES: The metrics that its second plot draws.
        make_order: What shuffles the training rows.
    """

    HEADLINE: str
    CURVES: tuple[str, ...]
    make_order: MakeOrder

    def load_sets(self, config: Config) -> Sets:
        """Reads, checks and tokenises the data; raises ValueErrors."""
        ...

    def load_evaluation(self, config: Config, names: tuple[str, ...], data: str | None) -> Sets:
        """The evaluation rows alone, of a finished run with these classes or from other data."""
        ...

    def describe(self, sets: Sets, config: Config) -> list[str]:
        """Lines on the data: how much, and what was cut or left out."""
        ...

    def fingerprint(self, encoded: Any) -> str:
        """A short hash of all that a set holds, to know it by when a run resumes."""
        ...

    def apply(self, fn: Callable[..., Any], params: Any, batch: Any, **kwargs: Any) -> jax.Array:
        """Calls `Model.apply`, or another of these functions, on a batch."""
        ...

    def loss(
        self,
        model: Model,
        params: Any,
        batch: Any,
        smoothing: float,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The loss of a batch as a sum and what it is divided by, ``()`` each.

        With a key the model's own dropout is on.
        """
        ...

    def outputs(self, model: Model, params: Any, batch: Any) -> jax.Array:
        """What is kept of each row: ``(batch, n)``."""
        ...

    def metrics(self, outputs: np.ndarray, encoded: Any) -> dict[str, float]:
        """Figures of the outputs of all rows; `loss` is among them."""
        ...

    def write(
        self, sets: Sets, config: Config, complete: Complete, *, few: bool
    ) -> tuple[str, ...]:
        """What the model writes, of all that is to be scored or of a few samples; or nothing."""
        ...

    def scores(self, sets: Sets, texts: Sequence[str]) -> dict[str, float]:
        """Figures of what the model wrote, if it can be scored."""
        ...

    def example(self, sets: Sets, config: Config) -> dict[str, str]:
        """The first training row as the model gets it, by name."""
        ...

    def examples(self, sets: Sets, before: Answers, after: Answers) -> Examples:
        """Some evaluation rows, and what the model said of them before and after."""
        ...


MODULES = {"sequence-classification": "classification", "causal-lm": "causal_lm"}


def task_of(config: Config) -> Task:
    """The task that a config names. Its module is imported here, and no other's."""
    module: Any = importlib.import_module(f".{MODULES[config.model.task]}", __package__)
    return module


def shapes_of(batch: Batch) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch's arrays."""
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in batch.items()}
