"""Evaluates what a run left: ``lora-jax eval RUN_DIRECTORY [--data FILE]``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BAD_INPUT = 2


def main(arguments: Sequence[str]) -> int:
    """Runs a command line.

    Args:
        arguments: What follows the command's name.

    Returns:
        The exit code: 0, done; 2, the run or the data cannot be used.
    """
    options = parser().parse_args(list(arguments))
    from .console import Console

    try:
        metrics = evaluate(
            options.run, Console(stderr=options.json), options.data, base=options.base
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    if options.json:
        print(json.dumps(metrics))
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = argparse.ArgumentParser(
        prog="lora-jax eval",
        description="Evaluates the adapter of a finished run.",
        epilog="exit codes: 0 done; 2 the run or the data cannot be used",
    )
    top.add_argument("run", type=Path, help="the run's output directory")
    top.add_argument(
        "--data", help="a file of the run's format; without it the run's own evaluation rows"
    )
    top.add_argument("--base", action="store_true", help="the base model, without what was trained")
    top.add_argument("--json", action="store_true", help="print the metrics as JSON, and only it")
    return top


def evaluate(
    directory: Path, console: Any, data: str | None = None, *, base: bool = False
) -> dict[str, float]:
    """Loads a run's adapter onto its base model, and measures it.

    Args:
        directory: The run's output directory.
        console: Where to print.
        data: A file, read as the run's config reads its own; the run's own evaluation rows if
            None.
        base: Measure the base model as it was before.

    Raises:
        ValueError: The directory holds no finished run, or the data cannot be used.
    """
    import lora_jax
    from lora_jax import training

    from . import adapter, run_directory
    from .completion import make_complete
    from .model import load_model, make_eval_step, put_halves, where_weights_fit
    from .predictions import compiled_once, predictions
    from .tasks import task_of

    config, names = read_run(directory, data)
    task = task_of(config)
    sets = task.load_evaluation(config, names, config.data.train if data else None)
    mesh = mesh_of(config, console)
    with where_weights_fit(mesh):
        model = load_model(config, len(names) or None)
        halves = model.params, {}
        if not base:
            halves = adapter.load(directory / run_directory.ADAPTER, model)

    frozen, trainable, placement = put_halves(*halves, mesh, model.layouts)
    step = compiled_once(make_eval_step(task, model, mesh, placement), "evaluation", console)
    shards = training.batch_shards(mesh)
    batch_size = -(-config.training.batch_size // shards) * shards
    outputs = predictions(
        lambda batch: step(trainable, frozen, training.shard_batch(batch, mesh)),
        sets.evaluation,
        batch_size,
    )
    complete = make_complete(model, config, sets.tokenizer, console)
    params = lora_jax.combine(frozen, trainable)
    texts = task.write(sets, config, lambda prompts: complete(params, prompts), few=False)
    metrics = task.metrics(outputs, sets.evaluation) | task.scores(sets, texts)
    rows = {name: f"{value:.4f}" for name, value in metrics.items()}
    console.table(f"{directory} on {len(outputs)} examples", rows)
    return metrics


def mesh_of(config: Any, console: Any) -> Any:
    """The mesh that the run trained on, or all of these devices side by side if they are others."""
    from lora_jax import training

    try:
        return training.make_mesh(**config.mesh.model_dump())
    except ValueError as error:
        mesh = training.make_mesh()
        console.say(f"{error} Now, on {mesh.size} devices, each holds the whole model.")
        return mesh


def read_run(directory: Path, data: str | None) -> tuple[Any, tuple[str, ...]]:
    """The config of a finished run, and the names of its classes."""
    from . import run_directory
    from .config_file import load

    path = directory / run_directory.RESULT
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if result.get("status") != "finished":
        raise ValueError(
            f"{directory} holds no finished run: it has no {run_directory.RESULT} with a score. "
            "Finish it with: python -m train CONFIG.yaml --resume"
        )
    # With other data, the run's own need not exist any more.
    other = (
        f"data.train={json.dumps(data)}",
        "data.validation=null",
        "data.validation_limit=null",
        "data.holdout=1",
    )
    config = load(directory / run_directory.CONFIG, other if data else ())
    return config, tuple(result["classes"])
