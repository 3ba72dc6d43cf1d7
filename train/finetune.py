"""The run, top to bottom: data, model, loop, adapter, report. Fork it here.

    state, metrics = train_step(state, frozen, batches[step])

Everything that a step depends on follows from its number: the batch from the order of the rows,
dropout from the run's key. So a run that was killed goes on from its last checkpoint bit for bit.
What the model is asked to do is in `tasks`; nothing here knows it.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import lora_jax
from lora_jax import models, training
from lora_jax.io import checkpoints

from . import adapter, completion, report, run_directory
from .batches import Batches
from .config import Config, best_metric
from .config_file import differences, from_plain
from .console import Console
from .model import (
    load_model,
    make_eval_step,
    make_train_step,
    run_keys,
    split_model,
    summarise,
)
from .optimizer import learning_rate_schedule, make_optimizer
from .plan import Plan, check_vocabulary, make_plan
from .predictions import compiled_once, predictions
from .tasks import Answers, Sets, Task, task_of
from .traits import is_better_lower


class NotFiniteError(ArithmeticError):
    """The loss or the gradient is not finite; the last good checkpoint is kept."""


class Run(NamedTuple):
    """All that stays the same while a run trains."""

    config: Config
    console: Console
    task: Task
    sets: Sets
    plan: Plan
    model: models.Pretrained
    frozen: Any
    mesh: jax.sharding.Mesh
    train_step: Callable[..., Any]
    predict: Callable[[Any], np.ndarray]
    complete: Callable[[Any, Any], list[str]]
    directory: Path
    saved: Any


def run(config: Config, console: Console) -> dict[str, Any]:
    """Trains, evaluates, saves and reports.

    Returns:
        The contents of `result.json`.

    Raises:
        ValueError: The config, the data, the model or the output directory does not fit.
        NotFiniteError: The loss or the gradient is not finite.
    """
    started = time.perf_counter()
    run, begin = prepare(config, console)
    state = resume(run, begin)
    before = answer(run, begin.trainable, few=True)
    if state is begin:
        evaluate(run, 0, before.outputs)
    del begin
    state = train(run, state)
    if config.output.weights == "best":
        state = checkpoints.restore(run.saved, state, run.saved.best_step()).state
    run.saved.close()
    after = answer(run, state.trainable, few=False)
    result = finish(run, state, before, after, started)
    console.table(f"Finished: {run.directory}", report.headline(result))
    return result


def prepare(config: Config, console: Console) -> tuple[Run, training.TrainState]:
    """Everything before the first step. Nothing is written until all of it has been checked."""
    resuming = run_directory.check_directory(config)
    mesh = training.make_mesh()
    task = task_of(config)
    sets = task.load_sets(config)
    plan = make_plan(config, len(sets.train.sizes), mesh)
    for line in task.describe(sets, config):
        console.say(line)
    model = load_model(config, len(sets.names) or None)
    check_vocabulary((sets.train, sets.evaluation), model.config.vocab_size)
    task.write(sets, config, completion.make_check(model, config, sets.tokenizer), few=False)
    if model.new:
        console.say(f"new head, drawn from the seed: {', '.join(model.new)}")
    frozen, trainable = split_model(model, config)
    adapter.check_savable(model, trainable, config)
    console.say(f"\n{summarise(model, config)}\n")

    tx = make_optimizer(config.training, plan.steps)
    step = make_train_step(task, model, tx, mesh, config.training.label_smoothing)
    train_step = compiled_once(step, "training", console)
    eval_step = compiled_once(make_eval_step(task, model, mesh), "evaluation", console)
    state = training.init_state(trainable, tx, run_keys(config.training.seed).steps)
    state, frozen = training.replicate((state, frozen), mesh)

    def predict(trainable: Any) -> np.ndarray:
        def call(batch: Any) -> jax.Array:
            return eval_step(trainable, frozen, training.shard_batch(batch, mesh))

        return predictions(call, sets.evaluation, config.training.batch_size)

    directory = run_directory.start_directory(config, resuming)
    saved = checkpoints.open_checkpoints(
        directory / run_directory.CHECKPOINTS,
        keep=config.training.keep,
        best="min" if is_better_lower(best_metric(config)) else "max",
    )
    complete = completion.make_complete(model, config, sets.tokenizer, console)
    fixed = (config, console, task, sets, plan, model, frozen, mesh, train_step, predict, complete)
    return Run(*fixed, directory, saved), state


def answer(run: Run, trainable: Any, *, few: bool) -> Answers:
    """What the model says of the evaluation rows, and what it writes."""
    return Answers(run.predict(trainable), write(run, trainable, few=few))


def write(run: Run, trainable: Any, *, few: bool) -> tuple[str, ...]:
    """What the model writes, if the task asks it to."""

    def complete(prompts: Any) -> list[str]:
        return run.complete(lora_jax.combine(run.frozen, trainable), prompts)

    return run.task.write(run.sets, run.config, complete, few=few)


def resume(run: Run, begin: training.TrainState) -> training.TrainState:
    """The state of the last checkpoint, if there is one; else the state to begin with.

    Raises:
        ValueError: The checkpoint is of another config or other data; the message says which.
    """
    state, step, changed = begin, -1, []
    if run.saved.latest_step() is not None:
        step, state, notes = checkpoints.restore(run.saved, begin)
        changed = differences(from_plain(notes["config"]), run.config)
        changed += [
            f"the {name} data: hash {notes['data'][name]} -> {found}"
            for name, found in fingerprints(run).items()
            if notes["data"][name] != found
        ]
        run.console.say(f"resuming at step {step} of {run.plan.steps}")
    if changed:
        raise ValueError(
            f"{run.directory} cannot be resumed: with these changes it would be another run.\n  "
            + "\n  ".join(changed)
            + "\nUndo them, or start anew with --overwrite or another output.directory."
        )
    run_directory.write_config(run.config)
    run_directory.cut_rows(run.directory, step)
    return state


def train(run: Run, state: training.TrainState) -> training.TrainState:
    """The loop: a step, and now and then a look at the loss, an evaluation, a checkpoint."""
    section, plan = run.config.training, run.plan
    batches, rates = make_batches(run), make_rates(run)
    first, pending, since = int(state.step) + 1, [], clock(run.console)
    with run.console.progress(first - 1, plan.steps), jax.transfer_guard("disallow"):
        for step in range(first, plan.steps + 1):
            batch = batches[step - 1]
            state, figures = run.train_step(
                state, run.frozen, training.shard_batch(batch, run.mesh)
            )
            tokens = int(batch["attention_mask"].sum())
            pending.append(
                {"step": step, **figures, "learning_rate": rates[step - 1], "tokens": tokens}
            )
            evaluating = step % plan.evaluate_every == 0 or step == plan.steps
            saving = step % plan.save_every == 0 or evaluating
            if not (saving or step % section.log_every == 0):
                continue
            log(run, jax.device_get(pending), (clock(run.console) - since) / len(pending))
            score = evaluate(run, step, run.predict(state.trainable)) if evaluating else None
            if saving:
                save(run, step, state, score)
            pending, since = [], clock(run.console)
    return state


def make_batches(run: Run) -> Batches:
    """The batches of training."""
    section = run.config.training
    return Batches(
        run.sets.train,
        section.batch_size,
        section.seed,
        run.task.make_order,
        group_by_length=section.group_by_length,
    )


def make_rates(run: Run) -> np.ndarray:
    """The learning rate of each step: ``(steps,)``."""
    schedule = learning_rate_schedule(run.config.training, run.plan.steps)
    return jax.device_get(jax.vmap(schedule)(np.arange(run.plan.steps)))


def clock(console: Console) -> float:
    """Seconds on a clock that stands while anything compiles."""
    return time.perf_counter() - console.compile_seconds


def log(run: Run, figures: list[dict[str, Any]], seconds: float) -> None:
    """Writes and shows the figures of some steps, which took ``seconds`` each.

    Raises:
        NotFiniteError: A loss or a gradient is not finite.
    """
    rows = write_rows(run, figures, seconds)
    for row in rows:
        if not is_finite(row):
            raise NotFiniteError(stopped(run, row))
    run.console.step(
        rows[-1]["step"],
        run.plan.steps,
        loss=float(np.mean([row["loss"] for row in rows])),
        learning_rate=rows[-1]["learning_rate"],
        tokens_per_second=sum(row["tokens"] for row in rows) / (seconds * len(rows)),
        seconds_left=seconds * (run.plan.steps - rows[-1]["step"]),
    )


def write_rows(run: Run, figures: list[dict[str, Any]], seconds: float) -> list[dict[str, Any]]:
    """Adds the figures of some steps to the metrics."""
    rows = [
        {
            "step": row["step"],
            "epoch": round(row["step"] / run.plan.epoch, 4),
            "loss": float(row["loss"]),
            "grad_norm": float(row["grad_norm"]),
            "learning_rate": float(row["learning_rate"]),
            "tokens": row["tokens"],
            "seconds": seconds,
        }
        for row in figures
    ]
    run_directory.append_rows(run.directory, rows)
    return rows


def is_finite(row: dict[str, Any]) -> bool:
    """Whether a step went well."""
    return math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])


def stopped(run: Run, row: dict[str, Any]) -> str:
    """What to say, and to leave in `result.json`, when a step was not finite."""
    last = run.saved.latest_step()
    kept = f"The checkpoint of step {last} is kept." if last else "There is no checkpoint yet."
    message = (
        f"Stopped at step {row['step']}: the loss is {row['loss']} and the gradient's norm is "
        f"{row['grad_norm']}. {kept} Try a lower training.learning_rate, a longer "
        "training.warmup, or float32 for model.dtype."
    )
    stop = {"status": "not finite", "step": row["step"], "last_good_step": last}
    run_directory.write_json(run.directory / run_directory.RESULT, {**stop, "message": message})
    return message


def evaluate(run: Run, step: int, outputs: np.ndarray) -> float:
    """Writes and shows the metrics of some outputs; returns the one that the best is chosen by."""
    metrics = run.task.metrics(outputs, run.sets.evaluation)
    run_directory.append_rows(run.directory, [{"step": step, "evaluation": metrics}])
    run.console.evaluation(step, metrics)
    return metrics[best_metric(run.config)]


def save(run: Run, step: int, state: training.TrainState, score: float | None) -> None:
    """Saves a checkpoint, with what must be equal for a run to go on from it."""
    notes = {"config": run.config.model_dump(mode="json"), "data": fingerprints(run)}
    checkpoints.save(run.saved, step, state, notes=notes, score=score)


def fingerprints(run: Run) -> dict[str, str]:
    """A short hash of each set, to know it by when a run resumes."""
    sets = {"training": run.sets.train, "evaluation": run.sets.evaluation}
    return {name: run.task.fingerprint(encoded) for name, encoded in sets.items()}


def finish(
    run: Run, state: training.TrainState, before: Answers, after: Answers, started: float
) -> dict[str, Any]:
    """Saves the adapter, checks it, and writes the result and the report."""
    directory, task, sets = run.directory, run.task, run.sets
    metrics = task.metrics(after.outputs, sets.evaluation) | task.scores(sets, after.texts)
    check = adapter.export(
        directory / run_directory.ADAPTER, run.model, state.trainable, run.config, sets, metrics
    )
    rows, summary = run_directory.read_rows(directory), summarise(run.model, run.config)
    result = {
        "status": "finished",
        "classes": sets.names,
        task.HEADLINE: metrics[task.HEADLINE],
        "metrics": metrics,
        **report.figures(run.model, state, rows, summary),
        "checkpoint_bytes": check.bytes,
        "self_check": check._asdict(),
        "compile_seconds": run.console.compile_seconds,
        "seconds": time.perf_counter() - started,
    }
    run_directory.write_json(directory / run_directory.RESULT, result)
    report.write(directory, run.config, result, rows, summary, sets, before, after)
    return result
