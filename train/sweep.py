"""A sweep, top to bottom: many runs in one program, on one frozen base.

    state, metrics = sweep_step(state, frozen, batches)      (members, ...), frozen as ever

Every member is the run that `finetune` would make of its config, to rounding: its weights, dropout
and the order of its rows follow from its own seed, and it leaves a run's directory of its own. One
whose loss or gradient is not finite stops; the others go on.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from lora_jax import models, training
from lora_jax.io import checkpoints

from . import adapter, completion, finetune, run_directory, stopping, sweep_report
from .batches import Batch, Batches
from .config import Config
from .console import Console
from .exit_codes import NotFiniteError, StoppedError
from .finetune import Run
from .identity import hashes_of
from .members import members, swept
from .model import (
    are_cut,
    load_model,
    make_loss,
    make_mesh,
    make_outputs,
    run_keys,
    split_model,
    summarise,
)
from .optimizer import make_optimizer
from .plan import check_vocabulary, make_plan, sized
from .predictions import compiled_once, predictions
from .sweep_figures import figures_of, until_stopped
from .sweep_resume import check_directory, open_directory, resume
from .tasks import Answers, Task, task_of

OF_OPTIMIZER = ("learning_rate", "weight_decay")


class Sweep(NamedTuple):
    """All that stays the same while a sweep trains.

    Attributes:
        config: As it was given.
        console: Where to print.
        mesh: The devices.
        at_once: How many members are computed at once.
        runs: Name -> the member as a run; the steps of a single run are not among it.
        train_step: ``(state, frozen, chosen, batch) -> (state, metrics)``.
        predict: A state -> outputs ``(rows, members, n)``.
        apart: A state -> the members' own.
        together: The members' own states, and who is running -> a state.
    """

    config: Config
    console: Console
    mesh: jax.sharding.Mesh
    at_once: int
    runs: dict[str, Run]
    train_step: Callable[..., Any]
    predict: Callable[[training.SweepState], np.ndarray]
    apart: Callable[[training.SweepState], list[training.TrainState]]
    together: Callable[..., training.SweepState]

    @property
    def members(self) -> list[Run]:
        """The runs in order."""
        return list(self.runs.values())


def run(config: Config, console: Console) -> dict[str, Any]:
    """Trains, evaluates, saves and reports all members.

    Returns:
        The contents of `sweep.json`.

    Raises:
        ValueError: The config, the data, the model or the output directory does not fit.
        NotFiniteError: Of every member the loss or the gradient is not finite.
    """
    started = time.perf_counter()
    sweep, begin = prepare(config, console)
    step, states, running = resume(sweep.members, begin)
    before = answer(sweep, sweep.together(begin), few=True)
    if step == 0:
        evaluate(sweep, 0, [own.outputs for own in before], running)
    del begin
    state = train(sweep, sweep.together(states, running), step, running)
    del states
    if config.output.weights == "best":
        state = restore_best(sweep, state, running)
    after = answer(sweep, state, few=False)
    for place, member in enumerate(sweep.members):
        member.saved.close()
        if running[place]:
            own = sweep.apart(state)[place]
            try:
                finetune.finish(member, own, before[place], after[place], started)
            except ValueError as error:  # its adapter is of no use, and the others' may be
                console.warn(str(error))
                failed = {"status": "failed", "step": int(own.step), "message": str(error)}
                run_directory.write_json(member.directory / run_directory.RESULT, failed)
    result = sweep_report.write(config, sweep.runs, time.perf_counter() - started, console)
    if not any(running):
        raise NotFiniteError(f"All {len(running)} members stopped: see {config.output.directory}.")
    return result


def prepare(config: Config, console: Console) -> tuple[Sweep, list[training.TrainState]]:
    """Everything before the first step. Nothing is written until all of it has been checked."""
    resuming = check_directory(config)
    mesh = make_mesh(config)
    check_devices(config, mesh)
    configs = members(sized(config, mesh))
    first = next(iter(configs.values()))
    task = task_of(first)
    sets = task.load_sets(first)
    plan = make_plan(first, len(sets.train.sizes))
    console.say(f"a sweep of {len(configs)} runs, of {plan.steps} steps each")
    for line in task.describe(sets, first):
        console.say(line)
    model = load_model(first, len(sets.names) or None)
    check_vocabulary((sets.train, sets.evaluation), model.config.vocab_size)
    task.write(sets, first, completion.make_check(model, first, sets.tokenizer), few=False)
    if model.new:
        console.say(f"new head, drawn from each seed: {', '.join(model.new)}")
    models = [model.redrawn(run_keys(own.training.seed).head) for own in configs.values()]
    halves = [split_model(*pair) for pair in zip(models, configs.values(), strict=True)]
    for own_model, own, (_, trainable) in zip(models, configs.values(), halves, strict=True):
        adapter.check_savable(own_model, trainable, own)
    console.say(f"\n{summarise(model, first)}\n")

    # All that differs between the members' models trains, so what is frozen is alike.
    frozen = training.replicate(halves[0][0], mesh)
    at_once = config.sweep.at_once or computed_at_once(len(configs))
    steps = make_steps(task, model, first, plan.steps, mesh, at_once)
    train_step = compiled_once(steps[0], "training", console)
    eval_step = compiled_once(steps[1], "evaluation", console)
    begin = [
        training.init_state(
            trainable, make_optimizer(own.training, plan.steps), run_keys(own.training.seed).steps
        )
        for own, (_, trainable) in zip(configs.values(), halves, strict=True)
    ]
    settings = {
        name: [getattr(own.training, name) for own in configs.values()]
        for name in OF_OPTIMIZER
        if name in swept(config)
    }
    shapes = jax.eval_shape(lambda states: states, begin)

    def predict(state: training.SweepState) -> np.ndarray:
        def call(batch: Any) -> jax.Array:
            return eval_step(state, frozen, training.shard_batch(batch, mesh))

        rows = first.training.batch_size // first.training.accumulate
        return predictions(call, sets.evaluation, rows)

    @jax.jit
    def apart(state: training.SweepState) -> list[training.TrainState]:
        return [training.member_state(state, place, like) for place, like in enumerate(shapes)]

    def together(states: Sequence[training.TrainState], running: Any = None) -> Any:
        return training.replicate(training.stack_states(states, settings, running), mesh)

    run_directory.start_directory(config, resuming)
    complete = completion.make_complete(model, first, sets.tokenizer, console)
    fixed = {"console": console, "task": task, "sets": sets, "plan": plan, "frozen": frozen}
    fixed |= {"mesh": mesh, "train_step": None, "predict": None, "complete": complete}
    runs = {
        name: Run(
            **fixed, config=own, model=own_model, hashes=hashes_of(task, sets, own_model.params),
            **open_directory(own, resuming),
        )
        for (name, own), own_model in zip(configs.items(), models, strict=True)
    }  # fmt: skip
    functions = (train_step, predict, apart, together)
    return Sweep(config, console, mesh, at_once, runs, *functions), begin


def check_devices(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuses what a sweep cannot do yet.

    Raises:
        ValueError: Says what, and what to do instead.
    """
    problems = {
        "weights that are cut over devices (mesh.fsdp, mesh.tensor)": are_cut(mesh),
        "several processes": jax.process_count() > 1,
        "training.skip_not_finite": config.training.skip_not_finite > 0,
    }
    if found := [what for what, is_asked in problems.items() if is_asked]:
        raise ValueError(
            f"A sweep does not go together with {' or '.join(found)}: leave that out, or train its "
            "members one by one."
        )


def computed_at_once(members: int) -> int:
    """All on an accelerator, which a single one would not fill, and one on a CPU, which it does."""
    return 1 if jax.default_backend() == "cpu" else members


def make_steps(
    task: Task,
    model: models.Pretrained,
    config: Config,
    steps: int,
    mesh: jax.sharding.Mesh,
    at_once: int,
) -> tuple[Any, Any]:
    """The train step, `(state, frozen, chosen, batch) -> (state, metrics)`, and the eval step.

    Args:
        task: What is learned.
        model: The base.
        config: A member's, for all that is alike in all.
        steps: Of a member.
        mesh: The devices.
        at_once: How many members are computed at once.
    """

    def make_tx(settings: Mapping[str, jax.Array]) -> optax.GradientTransformation:
        # What is swept is known while the program runs, so it is not checked here again.
        return make_optimizer(config.training.model_copy(update=settings), steps)

    loss = make_loss(task, model, mesh, config.training.label_smoothing)
    step = training.make_sweep_train_step(
        loss, make_tx, mesh, at_once=at_once, accumulate=config.training.accumulate
    )

    def train_step(state: training.SweepState, frozen: Any, chosen: Any, batch: Any) -> Any:
        return step(state, frozen, batch, chosen)

    outputs = make_outputs(task, model, mesh)
    eval_step = training.make_sweep_eval_step(outputs, mesh, at_once=at_once)
    return jax.jit(train_step, donate_argnums=0), eval_step


def restore_best(
    sweep: Sweep, state: training.SweepState, running: list[bool]
) -> training.SweepState:
    """The state of each member's best checkpoint."""
    states = [
        checkpoints.restore(member.saved, own, member.saved.best_step()).state if goes_on else own
        for member, own, goes_on in zip(sweep.members, sweep.apart(state), running, strict=True)
    ]
    return sweep.together(states, running)


def answer(sweep: Sweep, state: training.SweepState, *, few: bool) -> list[Answers]:
    """What each member says of the evaluation rows, and what it writes."""
    outputs, states = sweep.predict(state), sweep.apart(state)
    return [
        Answers(outputs[:, place], finetune.write(member, states[place].trainable, few=few))
        for place, member in enumerate(sweep.members)
    ]


def train(
    sweep: Sweep, state: training.SweepState, begin: int, running: list[bool]
) -> training.SweepState:
    """The loop. ``running`` is kept up to date: who stops is marked in it."""
    one = sweep.members[0]
    section, plan = one.config.training, one.plan
    batches = {run.config.training.seed: finetune.make_batches(run) for run in sweep.members}
    rates = [finetune.make_rates(run) for run in sweep.members]
    seeds = [run.config.training.seed for run in sweep.members]
    pending, since = [], finetune.clock(sweep.console)
    showing = sweep.console.progress(begin, plan.steps)
    with showing, stopping.noted() as asked, jax.transfer_guard("disallow"):
        for step in range(begin + 1, plan.steps + 1):
            if not any(running):
                break
            for chosen, rows in turns(sweep, batches, step - 1):
                subset = None if len(chosen) == len(running) else np.asarray(chosen, np.int32)
                state, figures = sweep.train_step(
                    state,
                    one.frozen,
                    training.replicate(subset, sweep.mesh),
                    training.shard_batches(rows, sweep.mesh),
                )
                own = [float(rates[member][step - 1]) for member in chosen]
                of_member = [batches[seeds[member]] for member in chosen]
                ids = [own.rows(step - 1) for own in of_member]
                tokens = [own.tokens(some) for own, some in zip(of_member, ids, strict=True)]
                figures = {**figures, "learning_rate": own, "tokens": tokens, "rows": ids}
                pending.append((step, chosen, figures))
            evaluating = step % plan.evaluate_every == 0 or step == plan.steps
            signal = asked(step)
            saving = step % plan.save_every == 0 or evaluating or signal
            if not (saving or step % section.log_every == 0):
                continue
            pending = jax.device_get(pending)
            seconds = finetune.clock(sweep.console) - since
            log(sweep, pending, seconds / (step - pending[0][0] + 1), running)
            scores: list[float | None] = [None] * len(running)
            if evaluating:
                outputs = sweep.predict(state)
                own = [outputs[:, place] for place in range(len(running))]
                scores = evaluate(sweep, step, own, running)
            if saving:
                save(sweep, step, state, scores, running)
            if signal and step < plan.steps:
                raise StoppedError(step, plan.steps, signal)
            pending, since = [], finetune.clock(sweep.console)
    return state


def turns(
    sweep: Sweep, batches: dict[int, Batches], step: int
) -> Iterator[tuple[list[int], list[Batch]]]:
    """Who takes a step together, and their batches: all, or the members of each seed in turn.

    Dropout depends on a batch's shape, so each is padded as in the member's own run; where the
    seeds' are of different lengths they take turns, and where there is nothing to gain from all.
    """
    own = {seed: of_seed[step] for seed, of_seed in batches.items()}
    seeds = [member.config.training.seed for member in sweep.members]
    everyone = list(range(len(seeds)))
    are_alike = len({batch["input_ids"].shape for batch in own.values()}) == 1
    if are_alike and sweep.at_once > len(seeds) // len(own):
        yield everyone, [own[seed] for seed in seeds]
        return
    for seed, batch in own.items():
        chosen = [place for place in everyone if seeds[place] == seed]
        yield chosen, [batch] * len(chosen)


def log(sweep: Sweep, pending: list[Any], seconds: float, running: list[bool]) -> None:
    """Writes and shows the figures of some steps, which took ``seconds`` each for all members.

    A member's own seconds are its share. Who stopped is marked in ``running``.
    """
    losses = {}
    for place, (name, member) in enumerate(sweep.runs.items()):
        if not running[place]:
            continue
        figures = until_stopped(figures_of(pending, place))
        rows = finetune.write_rows(member, figures, seconds / len(running))
        losses[place] = float(np.mean([row["loss"] for row in rows]))
        if not finetune.is_finite(rows[-1]):
            running[place] = False
            sweep.console.warn(f"{name}: {finetune.stopped(member, rows[-1])}")
    best = min((place for place in losses if running[place]), key=losses.__getitem__, default=None)
    if best is None:
        return
    step, plan = pending[-1][0], sweep.members[0].plan
    steps = step - pending[0][0] + 1
    sweep.console.step(
        step,
        plan.steps,
        loss=losses[best],
        learning_rate=figures_of(pending, best)[-1]["learning_rate"],
        tokens_per_second=sum(sum(own["tokens"]) for _, _, own in pending) / (seconds * steps),
        seconds_left=seconds * (plan.steps - step),
    )


def evaluate(
    sweep: Sweep, step: int, outputs: Sequence[np.ndarray], running: list[bool]
) -> list[float | None]:
    """Writes and shows the metrics of those that run; what the best is chosen by, of each."""
    scores: list[float | None] = []
    for own, (name, member), goes_on in zip(outputs, sweep.runs.items(), running, strict=True):
        if goes_on:
            sweep.console.say(name)
        score = finetune.evaluate(member, step, own) if goes_on else math.nan
        scores.append(score if math.isfinite(score) else None)
    return scores


def save(
    sweep: Sweep,
    step: int,
    state: training.SweepState,
    scores: Sequence[float | None],
    running: list[bool],
) -> None:
    """Saves a checkpoint of each that runs, as its own run would."""
    states = sweep.apart(state)
    for own, score, member, goes_on in zip(states, scores, sweep.members, running, strict=True):
        if goes_on:
            finetune.save(member, step, own, score)
