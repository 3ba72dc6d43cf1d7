"""Merged weights cost nothing more: the same program as the base weights', on other numbers.

base      fn(params)                             fn is the unmodified model
again     fn(params)                             the same once more: what noise looks like
merged    fn(merge(frozen, trainable))
factors   adapt(fn)(combine(frozen, trainable))  x @ w + (x @ a) @ b
"""

from collections.abc import Callable
from typing import Any

import jax

import lora_jax

from . import clock, contenders
from .jobs import Job
from .shapes import SHAPES


class OtherProgramError(AssertionError):
    """Merged weights and base weights do not compile to one program."""


def measure(job: Job) -> dict[str, Any]:
    """Compiles and times the three ways in turns.

    Raises:
        OtherProgramError: The merged weights' program is not the base weights'.
    """
    shape = SHAPES[job.size]
    model = contenders.abstract_model(shape, dtype=job.dtype, scan_layers=job.scan_layers)
    params = contenders.weights_of(model)
    frozen, trainable = contenders.halves(model, params, shape, "lora", job.rank)
    trainable = _moved(trainable)
    ids = contenders.batch_of(shape, job.batch, job.length)["input_ids"]
    combined = lora_jax.combine(frozen, trainable)
    merged = lora_jax.merge(frozen, trainable)

    def plain(weights: Any, ids: jax.Array) -> jax.Array:
        return model.module.apply({"params": weights}, ids)  # pyright: ignore

    adapted = lora_jax.adapt(plain, on_materialize="error")
    ways = [(plain, params), (plain, merged), (adapted, combined)]
    lowered = [jax.jit(fn).lower(weights, ids) for fn, weights in ways]
    base, of_merged, factors = [one.compile() for one in lowered]
    if lowered[0].as_text() != lowered[1].as_text():
        raise OtherProgramError(f"{job.size}: merged weights have another program than the base's")
    calls = {
        "base": _call(base, params, ids),
        "again": _call(base, params, ids),
        "merged": _call(of_merged, merged, ids),
        "factors": _call(factors, combined, ids),
    }
    seconds = clock.rounds(calls, seconds=job.seconds, least=20, burst=0.05)
    return {
        "same_hlo": base.as_text() == of_merged.as_text(),
        "rounds": len(seconds["base"]),
        "seconds": clock.spread(seconds["base"])._asdict(),
        **{
            f"{name}_ratio": clock.ratio(seconds[name], seconds["base"])._asdict()
            for name in ("again", "merged", "factors")
        },
    }


def _call(compiled: Any, weights: Any, ids: jax.Array) -> Callable[[], Any]:
    """One call, waited for: latency, not throughput."""
    return lambda: jax.block_until_ready(compiled(weights, ids))


def _moved(trainable: Any) -> Any:
    """Factors as if trained: with ``b`` at zero merged weights would be the base's."""
    return jax.tree.map(lambda leaf: leaf + 0.01, trainable)
