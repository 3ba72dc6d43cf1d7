"""What a run would do, without its weights: settings, weights that train, an example, memory.

The memory is XLA's own figure for the very step that would run, compiled on shapes.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax import training

from . import run_directory
from .batches import collate
from .config import Config
from .config_file import to_yaml
from .console import Console, size
from .model import load_model, make_mesh, make_train_step, put, run_keys, split_model, summarise
from .optimizer import make_optimizer
from .plan import check_vocabulary, make_plan, sized
from .report import weight_bytes
from .tasks import Sets, shapes_of, task_of


def dry_run(config: Config, console: Console) -> dict[str, Any]:
    """Checks everything that `finetune.run` would, and prints what it would do.

    Returns:
        The same, for programs.

    Raises:
        ValueError: The config, the data or the model does not fit.
    """
    mesh = make_mesh(config)
    config = sized(config, mesh)
    task = task_of(config)
    sets = task.load_sets(config)
    plan = make_plan(config, len(sets.train.sizes))
    model = load_model(config, len(sets.names) or None, abstract=True)
    check_vocabulary((sets.train, sets.evaluation), model.config.vocab_size)
    frozen, trainable = split_model(model, config)
    summary = summarise(model, config)

    console.say(to_yaml(config, Path.cwd()))
    console.say(f"{summary}\n")
    console.say(f"the model's weights take {size(weight_bytes(model.params))}\n")
    shown = task.example(sets, config)
    console.table("The first training example", shown)
    sizes = sets.train.sizes
    tokens = round(plan.steps * config.training.batch_size * sum(sizes) / len(sizes))
    for line in task.describe(sets, config):
        console.say(line)
    console.say(
        f"{plan.steps} steps of {config.training.batch_size} rows, about {tokens:,} tokens; "
        f"evaluated every {plan.evaluate_every} steps, saved every {plan.save_every}"
    )

    tx = make_optimizer(config.training, plan.steps)
    section, key = config.training, run_keys(config.training.seed).steps
    state = jax.eval_shape(lambda trainable: training.init_state(trainable, tx, key), trainable)
    state, frozen, placement = put(state, frozen, tx, mesh, model.layouts)
    step = make_train_step(
        task, model, tx, mesh, section.label_smoothing,
        accumulate=section.accumulate, placement=placement,
    )  # fmt: skip

    def bytes_of(batch_size: int) -> dict[str, int]:
        shapes = batch_shapes(sets, batch_size)
        with console.compiling(f"training, {batch_size} x {sets.train.lengths[-1]} tokens"):
            return memory(step.lower(state, frozen, shapes).compile())

    parts = training.batch_shards(mesh) * section.accumulate
    needs = memory_plan(bytes_of, section.batch_size, parts)
    console.table("Memory of the training step, on each device", readable(needs))
    try:
        run_directory.check_directory(config)
    except ValueError as error:
        console.warn(str(error))
    return {
        "status": "dry run",
        "config": config.model_dump(mode="json"),
        "trained_parameters": summary.trained,
        "total_parameters": summary.total,
        "weight_bytes": weight_bytes(model.params),
        "steps": plan.steps,
        "tokens": tokens,
        "example": shown,
        "memory": needs,
    }


def batch_shapes(sets: Sets, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of the longest batch."""
    longest = int(np.argmax(sets.train.sizes))
    return shapes_of(collate(sets.train, [longest] * batch_size, sets.train.lengths[-1:]))


def memory(program: Any) -> dict[str, int]:
    """XLA's figures for a compiled step, in bytes on each device.

    What goes in is the weights, the optimizer's state and the batch; what comes out takes the
    place of the donated part of it.
    """
    analysis = program.memory_analysis()
    arguments = analysis.argument_size_in_bytes
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    temporary = analysis.temp_size_in_bytes
    return {"arguments": arguments, "temporary": temporary, "total": arguments + fresh + temporary}


def memory_plan(
    bytes_of: Callable[[int], dict[str, int]], batch_size: int, parts: int
) -> dict[str, int]:
    """Memory at this batch size, the device's own, and the largest batch that fits by a line.

    Bytes grow linearly with the batch; the line goes through two batch sizes, both compiled.
    """
    here, double = bytes_of(batch_size), bytes_of(2 * batch_size)
    each = max(1, double["total"] - here["total"]) / batch_size
    free = device_bytes() - here["total"]
    largest = int(batch_size + free / each) // parts * parts
    return {**here, "device": device_bytes(), "largest_batch": max(0, largest)}


def device_bytes() -> int:
    """The memory of one device: what its runtime may use, or on a CPU the machine's share."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return machine // jax.local_device_count()


def readable(needs: dict[str, int]) -> dict[str, str]:
    """The figures of `memory_plan` in words."""
    return {
        "weights, optimizer, batch": size(needs["arguments"]),
        "activations and the like": size(needs["temporary"]),
        "together": f"{size(needs['total'])} of the device's {size(needs['device'])}",
        "largest batch that fits": f"about {needs['largest_batch']:,} rows",
    }
