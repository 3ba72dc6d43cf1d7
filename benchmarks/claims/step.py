"""One training step, measured: seconds, and bytes where the compiler and the device say them.

memory = arguments + outputs - what outputs share with arguments + temporaries
"""

from collections.abc import Callable
from typing import Any

import jax

from lora_jax import training

from ..stopwatch import Stopwatch
from . import arithmetic, clock, contenders
from .jobs import Job
from .shapes import SHAPES, Shape


def measure(job: Job) -> dict[str, Any]:
    """Compiles and runs the train step of a job."""
    shape = SHAPES[job.size]
    options = {"scan_layers": job.scan_layers, "remat": job.remat}
    model = contenders.abstract_model(shape, dtype=job.dtype, **options)
    loss, mesh = contenders.make_loss(model), contenders.one_device()
    tx = contenders.optimizer()
    frozen, trainable = contenders.halves(
        model, contenders.weights_of(model), shape, job.method, job.rank
    )
    state = training.init_state(trainable, tx, jax.random.key(3))
    del trainable  # the state has a copy, and the base's own would be counted in the peak
    state, frozen = training.replicate((state, frozen), mesh)
    batch = training.shard_batch(contenders.batch_of(shape, job.batch, job.length), mesh)
    figures: dict[str, Any] = {
        "trained": arithmetic.count(state.trainable),
        "optimizer_bytes": arithmetic.nbytes(state.opt_state),
        "activation_bytes": activation_bytes(loss, state.trainable, frozen, shape, job),
    }
    before = peak_bytes()
    timed = Stopwatch()
    compiled = training.make_train_step(loss, tx, mesh).lower(state, frozen, batch).compile()
    figures |= {"compile_seconds": timed.lap(), **memory(compiled)}
    advance = stepper(compiled, state, frozen, batch)
    del state, frozen, batch  # the stepper has them
    figures["loss"] = float(advance())
    figures["first_step_seconds"] = timed.lap()
    seconds = clock.rounds({"step": advance}, seconds=job.seconds)["step"]
    after = peak_bytes()
    figures["device_peak_bytes"] = after if before is None or after != before else None
    return figures | {"step_seconds": clock.spread(seconds)._asdict(), "rounds": len(seconds)}


def stepper(compiled: Any, state: Any, frozen: Any, batch: Any) -> Callable[[], jax.Array]:
    """A function that takes one step further each time, and gives the loss."""
    held = [state]

    def advance() -> jax.Array:
        held[0], metrics = compiled(held[0], frozen, batch)
        return metrics["loss"]

    return advance


def memory(compiled: Any) -> dict[str, int]:
    """What XLA plans to hold while the program runs, in bytes."""
    plan = compiled.memory_analysis()
    parts = {
        "argument_bytes": plan.argument_size_in_bytes,
        "output_bytes": plan.output_size_in_bytes,
        "shared_bytes": plan.alias_size_in_bytes,
        "temp_bytes": plan.temp_size_in_bytes,
    }
    held = parts["argument_bytes"] + parts["output_bytes"] - parts["shared_bytes"]
    return parts | {"memory_bytes": held + parts["temp_bytes"]}


def activation_bytes(
    loss: Callable[..., jax.Array], trainable: Any, frozen: Any, shape: Shape, job: Job
) -> int:
    """What differentiation keeps of the forward pass for the backward pass, in bytes.

    Counted on shapes, before the compiler leaves out what it can compute again. Weights are kept
    too, but do not grow with the batch: what a second batch would add is the activations.
    """

    def kept(rows: int) -> int:
        batch = jax.eval_shape(lambda: contenders.batch_of(shape, rows, job.length))
        residuals = jax.eval_shape(
            lambda t, f, b: jax.vjp(lambda t: loss(t, f, b), t)[1], trainable, frozen, batch
        )
        return arithmetic.nbytes(residuals)

    return kept(2 * job.batch) - kept(job.batch)


def peak_bytes() -> int | None:
    """The most bytes that the device has held since the process began; None if it cannot tell."""
    stats = jax.local_devices()[0].memory_stats()
    return None if not stats else stats.get("peak_bytes_in_use")
