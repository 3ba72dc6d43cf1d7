"""A sweep in one program against its members one after the other, in the same process.

    python -m benchmarks.sweep --members 6

The application's own steps on a model of the quickstart's shape with random weights, the same
random tokens for both, learning rates that differ. `first` counts tracing and compiling, once for
the sweep and once for each run, as runs with a process of their own do; `steps` does not. Memory is
XLA's plan of the compiled step: all that goes in, comes out and is made on the way.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax import training
from train.config import Config
from train.dry_run import memory
from train.model import make_train_step, run_keys, split_model
from train.optimizer import make_optimizer
from train.sweep import computed_at_once, make_steps
from train.tasks import task_of

from .claims import contenders
from .claims.shapes import SHAPES, Shape
from .claims.tables import table
from .cpu import Side, batch_of, model_directory, prepare
from .stopwatch import Stopwatch


class Compiled(NamedTuple):
    """A way to train, compiled.

    Attributes:
        seconds: To trace and compile it.
        memory: XLA's plan of one step, in bytes, as `train.dry_run.memory` gives it.
        step: Takes a step, waits for it, and gives the losses.
    """

    seconds: float
    memory: dict[str, int]
    step: Callable[[], np.ndarray]


def measure(
    *,
    members: int = 6,
    steps: int = 20,
    batch: int = 32,
    length: int = 32,
    at_once: int | None = None,
    shape: Shape = SHAPES["minilm"],
) -> dict[str, Any]:
    """Trains a sweep, and then each of its members.

    Args:
        members: How many.
        steps: Of each.
        batch: Rows of a step of one member.
        length: Tokens of a row.
        at_once: Members that are computed at once; None as the application chooses.
        shape: Of the random model that stands in where the quickstart's is not installed.

    Returns:
        ``model``; ``compiling``, ``steps`` (seconds) and ``memory`` (bytes), of the sweep and of
        the members, together but for memory, which is of one; ``apart``, the largest relative
        difference between their losses in the last step; and ``table`` in Markdown.
    """
    with tempfile.TemporaryDirectory() as passing:
        directory, which = model_directory(Path(passing), shape)
        side = prepare("LoRA", directory)
    section = side.config.training.model_copy(update={"batch_size": batch})
    side = side._replace(config=side.config.model_copy(update={"training": section}))
    configs = [of_member(side.config, number) for number in range(members)]
    rows = batch_of(side, length)
    sweep = compile_sweep(side, configs, rows, steps, at_once)
    alone = [compile_alone(side, config, rows, steps) for config in configs]
    taken, losses = np.zeros(2), (np.zeros(members), np.zeros(members))
    for _ in range(steps):  # in turns, so that both see the same mood of the machine
        watch = Stopwatch()
        together = sweep.step(), watch.lap()
        one_by_one = np.concatenate([run.step() for run in alone]), watch.lap()
        losses = together[0], one_by_one[0]
        taken += together[1], one_by_one[1]
    found = {
        "model": which,
        "compiling": (sweep.seconds, sum(run.seconds for run in alone)),
        "steps": tuple(taken.tolist()),
        "memory": (sweep.memory["total"], alone[0].memory["total"]),
        "apart": float(np.abs(losses[0] / losses[1] - 1).max()),
    }
    return found | {"table": table_of(found, members)}


def of_member(config: Config, number: int) -> Config:
    """The config of one member: another learning rate and another seed."""
    rate = {"learning_rate": 1e-4 * 2**number, "seed": number}
    return config.model_copy(update={"training": config.training.model_copy(update=rate)})


def compile_sweep(
    side: Side, configs: Sequence[Config], rows: Any, steps: int, at_once: int | None
) -> Compiled:
    """All members in one program."""
    mesh = contenders.one_device()
    rates = [config.training.learning_rate for config in configs]
    states = [begin(side, config, steps) for config in configs]
    state = training.stack_states(states, {"learning_rate": rates})
    state, frozen = training.replicate((state, side.frozen), mesh)
    batch = training.shard_batches([rows] * len(configs), mesh)
    at_once = at_once or computed_at_once(len(configs))
    step, _ = make_steps(task_of(configs[0]), side.model, configs[0], steps, mesh, at_once)
    return compiled(step, state, frozen, None, batch)


def compile_alone(side: Side, config: Config, rows: Any, steps: int) -> Compiled:
    """One member by itself."""
    mesh = contenders.one_device()
    state, frozen = training.replicate((begin(side, config, steps), side.frozen), mesh)
    batch = training.shard_batch(rows, mesh)
    tx = make_optimizer(config.training, steps)
    step = make_train_step(task_of(config), side.model, tx, mesh, config.training.label_smoothing)
    return compiled(step, state, frozen, batch)


def compiled(step: Any, state: Any, *rest: Any) -> Compiled:
    """Compiles a train step; nothing that was traced before is found again."""
    jax.clear_caches()
    watch = Stopwatch()
    program = step.lower(state, *rest).compile()
    held = [state]

    def advance() -> np.ndarray:
        held[0], figures = program(held[0], *rest)
        return np.atleast_1d(jax.block_until_ready(figures["loss"]))

    return Compiled(watch.lap(), memory(program), advance)


def begin(side: Side, config: Config, steps: int) -> training.TrainState:
    """The state that a member begins with."""
    _, trainable = split_model(side.model, config)
    tx = make_optimizer(config.training, steps)
    return training.init_state(trainable, tx, run_keys(config.training.seed).steps)


def table_of(found: dict[str, Any], members: int) -> str:
    """Seconds and memory as Markdown."""
    steps, compiling, memory = (found[name] for name in ("steps", "compiling", "memory"))
    both = (steps[0] + compiling[0], steps[1] + compiling[1])
    rows = [
        (name, f"{sweep:.1f}", f"{alone:.1f}", f"{sweep / alone:.2f}")
        for name, (sweep, alone) in (
            ("steps, s", steps),
            ("tracing and compiling, s", compiling),
            ("both, s", both),
            ("memory of a step, MB", (memory[0] / 1e6, memory[1] / 1e6)),
        )
    ]
    header = ("", f"{members} at once", f"{members} one after the other", "ratio")
    return table(header, rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--members", type=int, default=6)
    parser.add_argument("--steps", type=int, default=20, help="of each member")
    parser.add_argument("--batch", type=int, default=32, help="rows of a step of one member")
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument("--at-once", type=int, help="members; all, or one on a CPU, if left out")
    found = measure(**vars(parser.parse_args(arguments)))
    print(f"Model: {found['model']}, on {jax.devices()[0].device_kind}")
    print(f"Losses of the last step differ by {found['apart']:.1e} at most.\n\n{found['table']}")


if __name__ == "__main__":
    main()
