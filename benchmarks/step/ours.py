"""Our step, through the public API alone: a model, `split`, `adapt`, `combine`, the train step."""

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lora_jax
from lora_jax import models, training

from ..stopwatch import Stopwatch
from .batches import batches, endless
from .cases import ALPHA, LEARNING_RATE, WEIGHT_DECAY, Case
from .job import Job
from .loss import make_loss
from .timing import timed_steps
from .weights import random_weights

MATMUL = {"gpu": 8192}  # sizes of the product whose rate a step is compared with
CHAIN = 20


def measure(job: Job) -> dict[str, Any]:
    """All figures of our step; see `benchmarks.step` for what each of them is."""
    use_cache(job.cache)
    mesh = training.make_mesh(devices=jax.devices()[:1])
    stopwatch = Stopwatch()
    say("drawing weights")
    model = make_model(job)
    state, frozen, tx = make_state(model, job.work, mesh)
    jax.block_until_ready((state, frozen))
    figures = {"setup_seconds": stopwatch.lap(), "setup_peak_bytes": peak_bytes()}
    figures["trained"] = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    data = [training.shard_batch(batch, mesh) for batch in batches(job.work)]

    say("compiling")
    stopwatch.lap()
    chunk = job.work.chunk if job.chunk is None else job.chunk
    step = training.make_train_step(make_loss(model, chunk), tx, mesh)
    lowered = step.lower(state, frozen, data[0])
    figures["trace_seconds"] = stopwatch.lap()
    compiled = lowered.compile(compiler_options=job.xla)
    figures |= {"compile_seconds": stopwatch.lap(), "planned": planned(compiled)}

    say("running")
    advance = stepper(compiled, state, frozen, data)
    del state, frozen
    figures |= timed_steps(job, advance, float)
    parts = ("trace_seconds", "compile_seconds", "first_run_seconds")
    figures["first_step_seconds"] = sum(figures[part] for part in parts)
    figures["peak_bytes"] = peak_bytes()
    if job.profile:
        from .profiling import profile

        profile(compiled, advance, Path(job.profile))
    del advance
    return figures | machine(matmul=not job.start_only)


def make_model(job: Job) -> models.Pretrained:
    """The model of a job: shapes in place of weights."""
    case = job.work
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(case.fields), encoding="utf-8")
        return models.from_pretrained(
            directory,
            case.shape.task,
            dtype=jnp.bfloat16,
            **layers(job.layers),
            remat=job.remat or ("full" if case.remat else case.policy),
            abstract=True,
            quantize=case.scheme,
        )


def layers(option: str) -> dict[str, Any]:
    """The option ``--layers`` as models take it.

    >>> layers("4")
    {'scan_layers': True, 'layers_per_step': 4}
    """
    if option == "unrolled":
        return {"scan_layers": False}
    return {"scan_layers": True, "layers_per_step": 1 if option == "scanned" else int(option)}


def make_state(
    model: models.Pretrained, case: Case, mesh: Any
) -> tuple[training.TrainState, Any, optax.GradientTransformation]:
    """Weights, taken apart: what trains with its optimizer's state, and what is frozen."""
    shape = case.shape
    config = lora_jax.LoraConfig(rank=shape.rank, alpha=ALPHA, **shape.lora)
    params = random_weights(model.params, case.scheme)
    frozen, trainable = lora_jax.split(params, config, jax.random.key(1), layouts=model.layouts)
    tx = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    state = training.init_state(trainable, tx, jax.random.key(2))
    state, frozen = training.replicate((state, frozen), mesh)
    return state, frozen, tx


def stepper(compiled: Any, state: Any, frozen: Any, data: list) -> Callable[[], jax.Array]:
    """A function that takes one step further each time, and gives the loss."""
    held, coming = [state], endless(data)

    def advance() -> jax.Array:
        held[0], metrics = compiled(held[0], frozen, next(coming))
        return metrics["loss"]

    return advance


def use_cache(directory: str | None) -> None:
    """Has everything that is compiled kept in a directory, and found there."""
    if directory is not None:
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def planned(compiled: Any) -> dict[str, int]:
    """What XLA plans to hold, in bytes: arguments + outputs - what they share + temporaries."""
    plan = compiled.memory_analysis()
    parts = {
        "arguments": plan.argument_size_in_bytes,
        "outputs": plan.output_size_in_bytes,
        "shared": plan.alias_size_in_bytes,
        "temporaries": plan.temp_size_in_bytes,
    }
    held = parts["arguments"] + parts["outputs"] - parts["shared"]
    return parts | {"total": held + parts["temporaries"]}


def peak_bytes(devices: Sequence[Any] | None = None) -> int | None:
    """The most bytes that a device has held since the process began; None if none can tell.

    Args:
        devices: Which; the first one if None.
    """
    stats = [device.memory_stats() or {} for device in devices or jax.devices()[:1]]
    found = [one["peak_bytes_in_use"] for one in stats if "peak_bytes_in_use" in one]
    return max(found, default=None)


def machine(*, matmul: bool) -> dict[str, Any]:
    """What this ran on, and how fast that multiplies matrices."""
    device = jax.devices()[0]
    found = {"device": device.device_kind, "versions": {"jax": jax.__version__}}
    return found | ({"matmul_flops": matmul_flops()} if matmul else {})


def matmul_flops() -> float:
    """Flops a second of one product of square bfloat16 matrices after another."""
    size = MATMUL.get(jax.default_backend(), 256)
    keys = jax.random.split(jax.random.key(0))
    x, w = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    w = w * jnp.bfloat16(size**-0.5)  # what comes out is as large as what went in
    multiply = jax.jit(lambda x, w: x @ w)

    def chain(x: jax.Array) -> jax.Array:
        for _ in range(CHAIN):
            x = multiply(x, w)
        return jax.block_until_ready(x)

    x = chain(x)
    stopwatch = Stopwatch()
    chain(x)
    return 2 * size**3 * CHAIN / stopwatch.lap()


def say(what: str) -> None:
    """Tells the log how far it has come."""
    print(what, file=sys.stderr, flush=True)
