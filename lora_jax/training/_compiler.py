"""What the compiler is told about a step over several GPUs, where it would choose worse.

Where nothing is gathered, it need not order a step for communication beside arithmetic: the one
reduction at the end would let it put off the gradients of factors until then, and keep alive what
they are made of. A Llama of 1B takes 16.0 GiB so, as on one device, and 23.5 GiB otherwise.

Weights that are cut over ``fsdp`` are gathered by the layer, in place of one at a time: a product
fills a GPU, so that a gather waits until one has ended, and fewer gathers wait less often. On
H200s a step of a Llama of 8B takes 2.7 % less (benchmarks/NOTES.md).
"""

import functools
import os
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
from jax.sharding import Mesh

from .._compat import is_tracing

Options = Mapping[str, bool | int]

PLATFORMS = ("gpu",)
WITHOUT_GATHERS: Options = MappingProxyType({"xla_gpu_enable_latency_hiding_scheduler": False})
WITH_GATHERS: Options = MappingProxyType(
    {"xla_gpu_all_gather_combine_threshold_bytes": 400_000_000}
)
"""Most weights of a layer of 8B in 16 bits; XLA's own is 30 MB."""


def jit_over(mesh: Mesh, fn: Callable[..., Any], **settings: Any) -> Any:
    """``jax.jit``, with `compiler_options`.

    JAX takes options for whole programs alone: where something else traces the function, as one
    step of many or to differentiate it, there are none.

    Args:
        mesh: The mesh of `make_mesh`.
        fn: The function.
        **settings: Of ``jax.jit``.

    Returns:
        A function with ``lower``, ``trace`` and ``eval_shape``, as ``jax.jit`` gives it.
    """
    alone = jax.jit(fn, **settings)
    if not (options := compiler_options(mesh)):
        return alone
    told = jax.jit(fn, compiler_options=options, **settings)

    @functools.wraps(fn)
    def call(*args: Any, **named: Any) -> Any:
        return (alone if is_tracing() else told)(*args, **named)

    vars(call).update(lower=told.lower, trace=told.trace, eval_shape=told.eval_shape)
    return call


def compiler_options(mesh: Mesh) -> dict[str, bool | int]:
    """The options for a step over this mesh; none are XLA's own.

    What ``XLA_FLAGS`` names stays as it is there.

    Args:
        mesh: The mesh of `make_mesh`.
    """
    chosen = _options(mesh)
    named = re.findall(r"--(\w+)", os.environ.get("XLA_FLAGS", ""))
    return {name: value for name, value in chosen.items() if name not in named}


def _options(mesh: Mesh) -> Options:
    if mesh.devices.flat[0].platform not in PLATFORMS or mesh.shape["tensor"] > 1:
        return {}
    if mesh.shape["fsdp"] > 1:
        return WITH_GATHERS
    return WITHOUT_GATHERS if mesh.shape["data"] > 1 else {}
