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

from . import adapter, completion, processes, report, run_directory, stopping
from .batches import Batches
from .config import Config, best_metric
from .console import Console
from .exit_codes import NotFiniteError, StoppedError
from .identity import WEIGHTS, check_unchanged, hashes_of
from .model import (
    load_model,
    make_eval_step,
    make_mesh,
    make_train_step,
    put,
    run_keys,
    split_model,
    summarise,
    where_weights_fit,
)
from .optimizer import learning_rate_schedule, left_out, make_optimizer
from .plan import Plan, check_vocabulary, make_plan, sized
from .predictions import compiled_once, predictions
from .tasks import Answers, Sets, Task, task_of
from .traits import is_better_lower


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
    hashes: dict[str, str]
    directory: Path
    saved: Any


def run(config: Config, console: Console) -> dict[str, Any]:
    """Trains, evaluates, saves and reports.

    Returns:
        The contents of `result.json`.

    Raises:
        ValueError: The config, the data, the model or the output directory does not fit.
        NotFiniteError: The loss or the gradient is not finite.
        StoppedError: A signal asked for it.
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
    mesh = make_mesh(config)
    config = sized(config, mesh, run_directory.batch_size_before(config) if resuming else None)
    task = task_of(config)
    sets = task.load_sets(config)
    plan = make_plan(config, len(sets.train.sizes))
    for line in task.describe(sets, config):
        console.say(line)
    with where_weights_fit(mesh):
        model = load_model(config, len(sets.names) or None)
        frozen, trainable = split_model(model, config)
    hashes = hashes_of(task, sets, model.params)
    check_vocabulary((sets.train, sets.evaluation), model.config.vocab_size)
    task.write(sets, config, completion.make_check(model, config, sets.tokenizer), few=False)
    if model.new:
        console.say(f"new head, drawn from the seed: {', '.join(model.new)}")
    adapter.check_savable(model, trainable, config)
    console.say(f"\n{summarise(model, config)}\n")

    section = config.training
    tx = make_optimizer(section, plan.steps)
    with where_weights_fit(mesh):
        state = training.init_state(trainable, tx, run_keys(section.seed).steps)
    state, frozen, placement = put(state, frozen, tx, mesh, model.layouts)
    step = make_train_step(
        task, model, tx, mesh, section.label_smoothing,
        accumulate=section.accumulate, placement=placement,
    )  # fmt: skip
    train_step = compiled_once(step, "training", console)
    step = make_eval_step(task, model, mesh, placement)
    eval_step = compiled_once(step, "evaluation", console)

    def predict(trainable: Any) -> np.ndarray:
        def call(batch: Any) -> jax.Array:
            return eval_step(trainable, frozen, training.shard_batch(batch, mesh))

        rows = section.batch_size // section.accumulate
        return predictions(call, sets.evaluation, rows, training.own_rows(rows, mesh))

    alike = {"the config": run_directory.comparable(config), "the base model": hashes[WEIGHTS]}
    alike |= {f"the {name} rows": hashes[f"data.{name}"] for name in ("train", "validation")}
    processes.check_alike(alike | {"whether it resumes": str(resuming)})
    directory = run_directory.start_directory(config, resuming)
    saved = checkpoints.open_checkpoints(
        directory / run_directory.CHECKPOINTS,
        keep=config.training.keep,
        best="min" if is_better_lower(best_metric(config)) else "max",
    )
    complete = completion.make_complete(model, config, sets.tokenizer, console)
    fixed = (config, console, task, sets, plan, model, frozen, mesh, train_step, predict, complete)
    return Run(*fixed, hashes, directory, saved), state


def answer(run: Run, trainable: Any, *, few: bool) -> Answers:
    """What the model says of the evaluation rows, and what it writes."""
    return Answers(run.predict(trainable), write(run, trainable, few=few))


def write(run: Run, trainable: Any, *, few: bool) -> tuple[str, ...]:
    """What the model writes, if the task asks it to."""

    def complete(prompts: Any) -> list[str]:
        return run.complete(lora_jax.combine(run.frozen, trainable), prompts)

    return run.task.write(run.sets, run.config, complete, few=few)


def resume(run: Run, begin: training.TrainState) -> training.TrainState:
    """The state of the last checkpoint that is whole, if there is any; else the one to begin with.

    Raises:
        ValueError: The checkpoint is of another config or other data, or none of them is whole;
            the message says which.
    """
    state, step = begin, -1
    last = run.saved.latest_step()
    if last is not None:
        if (notes := run.saved.last_notes()) is not None:
            for line in check_unchanged(notes, run.config, run.hashes):
                run.console.warn(f"changed, and allowed to: {line}")
        step, state, _ = checkpoints.restore(run.saved, begin)
        if step != last:
            run.console.warn(f"the checkpoint of step {last} is damaged: going back to {step}")
        run.console.say(f"resuming at step {step} of {run.plan.steps}")
    run_directory.write_config(run.config)
    run_directory.cut_rows(run.directory, step)
    return state


def train(run: Run, state: training.TrainState) -> training.TrainState:
    """The loop: a step, and now and then a look at the loss, an evaluation, a checkpoint."""
    section, plan = run.config.training, run.plan
    batches, rates = make_batches(run), make_rates(run)
    first, pending, since = int(state.step) + 1, [], clock(run.console)
    showing = run.console.progress(first - 1, plan.steps)
    with showing, stopping.noted() as asked, jax.transfer_guard("disallow"):
        for step in range(first, plan.steps + 1):
            batch = training.shard_batch(batches[step - 1], run.mesh)
            state, figures = run.train_step(state, run.frozen, batch)
            rows = batches.rows(step - 1)
            row = {"learning_rate": rates[step - 1], "rows": rows, "tokens": batches.tokens(rows)}
            pending.append({"step": step, **figures, **row})
            evaluating = step % plan.evaluate_every == 0 or step == plan.steps
            signal = asked(step)
            saving = step % plan.save_every == 0 or evaluating or signal
            if not (saving or step % section.log_every == 0):
                continue
            figures, gone = jax.device_get((pending, left_out(state.opt_state)))
            log(run, figures, (clock(run.console) - since) / len(pending), int(gone))
            score = evaluate(run, step, run.predict(state.trainable)) if evaluating else None
            if saving:
                save(run, step, state, score)
            if signal and step < plan.steps:
                raise StoppedError(step, plan.steps, signal)
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
        own=training.own_rows(section.batch_size, run.mesh),
        group_by_length=section.group_by_length,
    )


def make_rates(run: Run) -> np.ndarray:
    """The learning rate of each step: ``(steps,)``."""
    schedule = learning_rate_schedule(run.config.training, run.plan.steps)
    return jax.device_get(jax.vmap(schedule)(np.arange(run.plan.steps)))


def clock(console: Console) -> float:
    """Seconds on a clock that stands while anything compiles."""
    return time.perf_counter() - console.compile_seconds


def log(run: Run, figures: list[dict[str, Any]], seconds: float, gone: int = 0) -> None:
    """Writes and shows the figures of some steps, which took ``seconds`` each.

    Args:
        run: The run.
        figures: Of each step.
        seconds: Of each.
        gone: How many steps of the run have changed nothing so far.

    Raises:
        NotFiniteError: A loss or a gradient is not finite, and it is one too many.
    """
    rows = write_rows(run, figures, seconds)
    for row in rows:
        if is_finite(row):
            continue
        is_left_out = not math.isfinite(row["grad_norm"])
        if not is_left_out or not 0 < gone <= run.config.training.skip_not_finite:
            raise NotFiniteError(stopped(run, row))
        run.console.warn(
            f"step {row['step']} is left out: the gradient's norm is {row['grad_norm']}, of rows "
            f"{', '.join(map(str, row['rows']))}"
        )
    run.console.step(
        rows[-1]["step"],
        run.plan.steps,
        loss=float(np.mean([row["loss"] for row in rows if is_finite(row)] or [math.nan])),
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
        | ({} if is_finite(row) else {"rows": row["rows"].tolist()})
        for row in figures
    ]
    run_directory.append_rows(run.directory, rows)
    return rows


def is_finite(row: dict[str, Any]) -> bool:
    """Whether a step's loss and gradient are numbers."""
    return math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])


def stopped(run: Run, row: dict[str, Any]) -> str:
    """What to say, and to leave in `result.json`, when a step was not finite."""
    last = run.saved.latest_step()
    kept = f"The checkpoint of step {last} is kept." if last else "There is no checkpoint yet."
    message = (
        f"Stopped at step {row['step']}: the loss is {row['loss']} and the gradient's norm is "
        f"{row['grad_norm']}, of rows {', '.join(map(str, row['rows']))}. {kept} Try a lower "
        "training.learning_rate, a longer training.warmup, or float32 for model.dtype; or start "
        "anew with training.skip_not_finite, to leave such steps out."
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
    notes = {"config": run.config.model_dump(mode="json"), "hashes": run.hashes}
    checkpoints.save(run.saved, step, state, notes=notes, score=score)


def finish(
    run: Run, state: training.TrainState, before: Answers, after: Answers, started: float
) -> dict[str, Any]:
    """Saves the adapter, checks it, and writes the result and the report."""
    directory, task, sets = run.directory, run.task, run.sets
    metrics = task.metrics(after.outputs, sets.evaluation) | task.scores(sets, after.texts)
    trainable = jax.device_get(training.replicate(state.trainable, run.mesh))
    if not processes.is_first():
        processes.wait_for_all("the run is finished")
        return {"status": "finished"}
    place = directory / run_directory.ADAPTER
    with where_weights_fit(run.mesh):
        check = adapter.export(place, run.model, trainable, run.config, sets, metrics)
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
    processes.wait_for_all("the run is finished")
    return result
