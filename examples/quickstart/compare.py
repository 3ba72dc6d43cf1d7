"""Fine-tunes one model three ways, compares them, and ships the LoRA one as plain weights.

    python -m examples.quickstart.compare [--short]

Each method is a run of its own, `python -m train configs/quickstart.yaml ...` in a new process,
so that its peak memory is its own. Then the adapter is merged and saved, and the model as it was
published is loaded with the merged weights: its answers must be the adapted model's.

Exit code 1 if they are not, or if LoRA stays below the score that the full form asks for.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import lora_jax
from lora_jax import models
from lora_jax.io import peft
from train.config_file import load
from train.predictions import predictions
from train.tasks import Sets, classification

ROOT = Path(os.path.relpath(Path(__file__).resolve().parents[2]))
CONFIG = ROOT / "configs" / "quickstart.yaml"
RUNS = ROOT / "runs" / "quickstart"
METHODS = {
    "head only": ("lora.targets=[]", "training.learning_rate=1e-2"),
    "LoRA": ("training.learning_rate=2e-3",),
    "full fine-tuning": ("lora.targets=[]", 'lora.train=[".*"]', "training.learning_rate=1e-4"),
}
# The 1000 sentences are classified at the start and at the end only: on a CPU it takes a while.
ALWAYS = ("training.evaluate_every=1000",)
SHORT = ("data.holdout=200", "data.limit=256", "training.epochs=1")
LEAST = 0.79  # of LoRA in the full form; a standard error is 0.013, so this is a coarse check
REFERENCE = (
    "PEFT 0.21.2 on torch, same weights, sentences and budget: head only 0.643, LoRA 0.800, "
    "full fine-tuning 0.808 (standard error 0.013)."
)


def main() -> int:
    """Runs the three methods, prints the table, merges and checks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="fewer sentences, no score asked for")
    short = parser.parse_args().short
    console = Console(width=None if sys.stdout.isatty() else 120)

    results = {}
    for method, chosen in METHODS.items():
        settings = [*chosen, *ALWAYS, *(SHORT if short else ())]
        console.print(f"\n{method}: python -m train {CONFIG} {' '.join(settings)}\n", markup=False)
        results[method] = train(method, settings)
    console.print(comparison(results))
    if not short:
        console.print(REFERENCE)
    shipped = ship(classification.load_sets(load(CONFIG, SHORT if short else ())))
    console.print(
        f"\nMerged into plain weights and loaded again ({RUNS / 'merged'}): "
        f"{shipped.equal} of {shipped.count} answers are the adapted model's; "
        f"accuracy {shipped.accuracy:.3f}, and {results['LoRA']['accuracy']:.3f} before."
    )
    return verdict(results["LoRA"]["accuracy"], shipped, None if short else LEAST)


def directory_of(method: str) -> Path:
    """Where a method's run leaves its files."""
    return RUNS / method.lower().replace(" ", "-")


def train(method: str, settings: list[str]) -> dict[str, Any]:
    """Runs one method in a process of its own; returns its ``result.json``."""
    directory = directory_of(method)
    command = [sys.executable, "-m", "train", os.path.relpath(CONFIG, ROOT), "--overwrite"]
    output = f"output.directory={os.path.relpath(directory, ROOT)}"
    subprocess.run([*command, *settings, output], cwd=ROOT, check=True)
    return json.loads((directory / "result.json").read_text())


def comparison(results: dict[str, dict[str, Any]]) -> Table:
    """The methods side by side."""
    table = Table(title="Three ways to fine-tune the same model")
    table.add_column("method")
    for column in ("accuracy", "trained parameters", "checkpoint", "optimizer state"):
        table.add_column(column, justify="right")
    table.add_column("seconds a step", justify="right")
    table.add_column("peak memory", justify="right")
    for method, result in results.items():
        table.add_row(
            method,
            f"{result['accuracy']:.3f}",
            f"{result['trained_parameters']:,}",
            size(result["checkpoint_bytes"]),
            size(result["optimizer_bytes"]),
            f"{result['seconds_per_step']:.3f}",
            size(result["peak_memory_bytes"]),
        )
    return table


def size(count: int) -> str:
    """A number of bytes for people: ``3.1 kB``, ``0.60 MB``, ``91 MB``."""
    if count < 1e5:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.2f} MB" if count < 1e7 else f"{count / 1e6:,.0f} MB"


class Shipped(NamedTuple):
    """How the merged model compares with the adapted one on the held-out sentences."""

    equal: int
    count: int
    accuracy: float


def ship(sets: Sets) -> Shipped:
    """Merges the adapter, saves plain weights, loads them, and asks both models everything."""
    base = models.from_pretrained(
        load(CONFIG).model.path, num_labels=len(sets.names), new_head=True
    )
    frozen, trainable = peft.load_adapter(directory_of("LoRA") / "adapter", base)[:2]
    merged = lora_jax.merge(frozen, trainable)
    models.save_pretrained(RUNS / "merged", base, merged, overwrite=True)
    plain = models.from_pretrained(RUNS / "merged", num_labels=len(sets.names))

    adapted = lora_jax.adapt(base.apply, on_materialize="error")
    before = answers(adapted, lora_jax.combine(frozen, trainable), sets)
    after = answers(plain.apply, plain.params, sets)
    right = after == sets.evaluation.labels
    return Shipped(int((before == after).sum()), len(after), float(right.mean()))


def answers(apply: Any, params: Any, sets: Sets) -> np.ndarray:
    """The class that a model gives each held-out sentence."""
    logits = jax.jit(lambda params, batch: classification.apply(apply, params, batch))
    return predictions(lambda batch: logits(params, batch), sets.evaluation, 32).argmax(-1)


def verdict(accuracy: float, shipped: Shipped, least: float | None) -> int:
    """Says what is wrong, if anything; the exit code."""
    problems = []
    if shipped.equal != shipped.count or shipped.accuracy != accuracy:
        problems.append("The merged model does not give the adapted model's answers.")
    if least is not None and accuracy < least:
        problems.append(f"LoRA's accuracy is {accuracy:.3f}, below {least}.")
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
