"""What the compiler is told about a step over several GPUs, where it would choose worse.

Where nothing is gathered, it need not order a step for communication beside arithmetic: the one
reduction at the end would let it put off the gradients of factors until then, and keep alive what
they are made of. A Llama of 1B takes 16.0 GiB so, as on one device, and 23.5 GiB otherwise.

Weights that are cut over ``fsdp`` are gathered by the layer, in place of one at a time: a product
fills a GPU, so that a gather waits until one has ended, and fewer gathers wait less often. On
H200s a step of a Llama of 8B takes 2.6 % less (benchmarks/NOTES.md).
"""

from collections.abc import Mapping
from types import MappingProxyType

from jax.sharding import Mesh

Options = Mapping[str, bool | int]

PLATFORMS = ("gpu",)
WITHOUT_GATHERS: Options = MappingProxyType({"xla_gpu_enable_latency_hiding_scheduler": False})
WITH_GATHERS: Options = MappingProxyType(
    {"xla_gpu_all_gather_combine_threshold_bytes": 400_000_000}
)
"""All weights of a layer of 8B in 16 bits, and a little; XLA's own is 30 MB."""


def compiler_options(mesh: Mesh) -> dict[str, bool | int]:
    """The options of ``jax.jit`` for a step over this mesh; none are XLA's own.

    Args:
        mesh: The mesh of `make_mesh`.
    """
    if mesh.devices.flat[0].platform not in PLATFORMS or mesh.shape["tensor"] > 1:
        return {}
    if mesh.shape["fsdp"] > 1:
        return dict(WITH_GATHERS)
    return dict(WITHOUT_GATHERS) if mesh.shape["data"] > 1 else {}
