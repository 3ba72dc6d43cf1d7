"""``lora-jax inspect``: what a choice of targets would train, before any weight is read.

Only the model's config is opened. Its weights are shapes, so this takes a second for any size.
"""

import argparse
import warnings
from typing import Any

from .. import models
from .._config import LoraConfig
from .._summary import summary
from . import _output


def add_command(commands: Any) -> None:
    """Adds ``inspect`` to the commands of a parser."""
    parser = commands.add_parser(
        "inspect",
        help="show what a choice of targets would train in a model",
        description="Shows each weight that would train, with its rank and share. "
        "Reads the model's config, not its weights.",
        epilog="example: lora-jax inspect ./all-MiniLM-L6-v2 --targets query value --rank 8",
    )
    parser.add_argument("model", metavar="MODEL", help="a model's directory, or its hub name")
    parser.add_argument(
        "--targets",
        nargs="+",
        default=["all-linear"],
        metavar="PATTERN",
        help="weights to adapt: regular expressions on their paths, or all-linear (default)",
    )
    parser.add_argument(
        "--exclude", nargs="+", default=[], metavar="PATTERN", help="weights that no target adapts"
    )
    parser.add_argument(
        "--train", nargs="+", default=[], metavar="PATTERN", help="weights to train in full"
    )
    parser.add_argument("--rank", type=int, default=8, help="rank of the adapters (default 8)")
    parser.add_argument("--alpha", type=float, default=16.0, help="scale * rank (default 16)")
    parser.add_argument(
        "--task",
        default="sequence-classification",
        help="which head the model gets (default sequence-classification)",
    )
    parser.add_argument("--num-labels", type=int, default=2, help="classes of the head (default 2)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the summary that the parsed ``options`` ask for; see `add_command`.

    Raises:
        ValueError: The model cannot be read, or a pattern matches nothing.
    """
    config = LoraConfig(
        rank=options.rank,
        alpha=options.alpha,
        targets=options.targets,
        exclude=options.exclude,
        train=options.train,
    )
    params, measured = _shapes(options)
    table = summary(params, config, layouts=measured)
    if options.json:
        _output.print_json(
            {
                "model": options.model,
                "weights": [row._asdict() for row in table.rows],
                "trained": table.trained,
                "total": table.total,
            }
        )
        return 0
    share = f"{100 * table.trained / table.total:.2f} %"
    _output.print_table(
        ("weight", "shape", "rank", "trained", "percent"),
        [
            (
                row.path,
                " x ".join(map(str, row.shape)),
                str(row.rank or "full"),
                f"{row.trained:,}",
                f"{row.percent:.2f} %",
            )
            for row in table.rows
        ],
        foot=(f"of {table.total:,} parameters", "", "", f"{table.trained:,}", share),
    )
    return 0


def _shapes(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model's parameters as shapes, and the layouts of its weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", models.NewHeadWarning)  # nothing is drawn: only shapes
        model = models.from_pretrained(
            options.model, task=options.task, num_labels=options.num_labels, abstract=True
        )
    return model.params, model.layouts
