"""Flops of a gradient step: through the adapted function, through merged weights, and in full.

    python -m benchmarks.flops

Counts are XLA's own, for the compiled gradient. The low-rank path leaves out the product
``x^T dy`` of every adapted weight, so it needs about 4 flops a parameter a token against 6.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import lora_jax

from .functions import OUR_OWN, THEIRS, WIDTH, Function

RANK = 4


class Flops(NamedTuple):
    """Flops of one gradient of the same loss, three ways.

    Attributes:
        adapted: With respect to the factors, through ``adapt(fn)(combine(...))``.
        merged: With respect to the factors, through ``fn(merge(...))``.
        full: With respect to all parameters, through ``fn``.
    """

    adapted: float
    merged: float
    full: float


def halves(function: Function, noise: float = 0.1) -> tuple[Any, Any]:
    """``split`` at every target, plus noise: with ``b`` not zero, gradients reach ``a``."""
    layouts = lora_jax.layouts(lambda params: function.call(function.fn, params), function.params)
    config = lora_jax.LoraConfig(rank=RANK, alpha=2 * RANK, targets=function.targets)
    frozen, trainable = lora_jax.split(function.params, config, jax.random.key(2), layouts=layouts)
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    noisy = [
        leaf + noise * jax.random.normal(key, leaf.shape, leaf.dtype)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return frozen, jax.tree.unflatten(treedef, noisy)


def losses(function: Function) -> tuple[Callable[[Any, Any], Any], ...]:
    """A loss of ``(trainable, frozen)`` through the adapted function, and one through merge."""
    adapted = lora_jax.adapt(function.fn, on_materialize="error")

    def through_adapt(trainable: Any, frozen: Any) -> jax.Array:
        return mean_square(function.call(adapted, lora_jax.combine(frozen, trainable)))

    def through_merge(trainable: Any, frozen: Any) -> jax.Array:
        return mean_square(function.call(function.fn, lora_jax.merge(frozen, trainable)))

    return through_adapt, through_merge


def mean_square(outputs: Any) -> jax.Array:
    """A loss of whatever a model returns: the mean square of its floating-point arrays."""
    arrays = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]
    return sum((jnp.mean(jnp.square(x)) for x in arrays), start=jnp.zeros(()))


def count(function: Function) -> Flops:
    """Compiles the three gradients and reads XLA's count of their flops."""
    frozen, trainable = halves(function)
    through_adapt, through_merge = losses(function)
    full = lambda params: mean_square(function.call(function.fn, params))  # noqa: E731
    return Flops(
        _flops(jax.grad(through_adapt), trainable, frozen),
        _flops(jax.grad(through_merge), trainable, frozen),
        _flops(jax.grad(full), function.params),
    )


def main() -> int:
    """Prints the table, for every function whose library is installed."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    print(f"Megaflops of one gradient, at rank {RANK} and width {WIDTH}")
    print(_line("function", "weights", "adapted", "merged", "full", "ad/merged", "ad/full"))
    for name, build in (THEIRS | OUR_OWN).items():
        if importlib.util.find_spec(name.split()[0].split(".")[0]) is None:
            print(f"{name}: not installed")
            continue
        function = build()
        flops = count(function)
        counts = (f"{number / 1e6:.1f}" for number in flops)
        ratios = (f"{flops.adapted / other:.3f}" for other in flops[1:])
        print(_line(name, str(function.count), *counts, *ratios), flush=True)
    return 0


def _line(name: str, *cells: str) -> str:
    return f"{name:<58}" + "".join(f"{cell:>10}" for cell in cells)


def _flops(fn: Callable[..., Any], *arguments: Any) -> float:
    analysis = jax.jit(fn).lower(*arguments).compile().cost_analysis()
    assert analysis is not None
    return float(analysis["flops"])


if __name__ == "__main__":
    sys.exit(main())
