"""What tasks differ in before any of their code is needed: defaults, metrics, idle settings."""

import dataclasses
from typing import Literal

Task = Literal["sequence-classification", "causal-lm"]
Metric = Literal["accuracy", "f1", "matthews", "loss", "perplexity", "token_accuracy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """What a setting that is left out means to a task, and which settings it has no use for.

    Attributes:
        train: `lora.train` where it is left out.
        metrics: What it is measured by; the first one chooses the best checkpoint.
        without: Settings that would be ignored, and are therefore refused.
    """

    train: tuple[str, ...]
    metrics: tuple[Metric, ...]
    without: tuple[tuple[str, str], ...]


TRAITS: dict[Task, Traits] = {
    "sequence-classification": Traits(
        train=("classifier/.*",),
        metrics=("accuracy", "f1", "matthews", "loss"),
        without=(
            *(("data", key) for key in ("format", "separator", "loss_on", "packing")),
            ("evaluation", "generate"),
        ),
    ),
    "causal-lm": Traits(
        train=(),
        metrics=("loss", "perplexity", "token_accuracy"),
        without=(
            *(("model", key) for key in ("num_labels", "new_head")),
            *(("data", key) for key in ("text_pair", "label", "labels")),
        ),
    ),
}


def is_better_lower(metric: Metric) -> bool:
    """Whether less of a metric is better."""
    return metric in ("loss", "perplexity")
