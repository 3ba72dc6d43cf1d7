"""Our step over a mesh, through the public API alone; weights are drawn where they belong."""

import functools
from typing import Any

import jax
import optax

import lora_jax
from benchmarks.step.batches import batches
from benchmarks.step.cases import ALPHA, LEARNING_RATE, WEIGHT_DECAY
from benchmarks.step.loss import make_loss
from benchmarks.step.ours import machine, make_model, peak_bytes, planned, say, stepper, use_cache
from benchmarks.step.timing import timed_steps
from benchmarks.step.weights import random_weights
from benchmarks.stopwatch import Stopwatch
from lora_jax import models, training

from .points import Point
from .wire import moved

TX = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def measure(point: Point) -> dict[str, Any]:
    """All figures of a point; see `benchmarks.scaling` for what each of them is."""
    use_cache(point.cache)
    devices = jax.devices()[: point.devices]
    mesh = training.make_mesh(**{point.way: point.devices}, devices=devices)
    stopwatch = Stopwatch()
    say("drawing weights")
    model = make_model(point)
    state, frozen, placement = make_state(model, point, mesh)
    jax.block_until_ready((state, frozen))
    figures = {"setup_seconds": stopwatch.lap(), "setup_peak_bytes": peak_bytes(devices)}
    figures["trained"] = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    figures["trained_bytes"] = sum(leaf.nbytes for leaf in jax.tree.leaves(state.trainable))
    data = [training.shard_batch(batch, mesh) for batch in batches(point.work)]

    say("compiling")
    stopwatch.lap()
    step = make_step(model, point, mesh, placement)
    lowered = step.lower(state, frozen, data[0])
    figures["trace_seconds"] = stopwatch.lap()
    compiled = lowered.compile()
    figures |= {"compile_seconds": stopwatch.lap(), "planned": planned(compiled)}
    figures |= {"compile_peak_bytes": peak_bytes(devices), "wire": moved(compiled.as_text())}

    say("running")
    advance = stepper(compiled, state, frozen, data)
    del state, frozen
    figures |= timed_steps(point, advance, float)
    parts = ("trace_seconds", "compile_seconds", "first_run_seconds")
    figures["first_step_seconds"] = sum(figures[part] for part in parts)
    figures["peak_bytes"] = peak_bytes(devices)
    return figures | machine(matmul=False)


def make_step(
    model: models.Pretrained, point: Point, mesh: Any, placement: training.Placement
) -> Any:
    """The jitted train step of a point."""
    chunk = point.work.chunk if point.chunk is None else point.chunk
    return training.make_train_step(
        make_loss(model, chunk * point.devices),  # as many tokens on a device as on one alone
        TX,
        mesh,
        placement=placement,
        accumulate=point.passes,
    )


def split(model: models.Pretrained, point: Point, params: Any) -> tuple[Any, Any]:
    """Both halves of a model's weights."""
    shape = point.work.shape
    config = lora_jax.LoraConfig(rank=shape.rank, alpha=ALPHA, **shape.lora)
    return lora_jax.split(params, config, jax.random.key(1), layouts=model.layouts)


def make_state(
    model: models.Pretrained, point: Point, mesh: Any
) -> tuple[training.TrainState, Any, training.Placement]:
    """Both halves where they belong, and their places.

    No device ever holds more of the base than its part, and the weight that is being drawn.
    """
    taken_apart = functools.partial(split, model, point)
    kept, trained = jax.eval_shape(taken_apart, model.params)
    placement = training.placements(kept, trained, mesh, layouts=model.layouts)
    params = random_weights(model.params, point.work.scheme, placement.frozen)
    frozen, trainable = taken_apart(params)
    state = training.init_state(trainable, TX, jax.random.key(2))
    state = training.place(state, training.state_placement(state, placement))
    return state, frozen, placement
