"""What a step will hold and send, as XLA plans it for GPUs that are not there.

    python -m benchmarks.plan --cases llama-8b --ways data fsdp --devices 1 8
    python -m benchmarks.plan --cases llama-1b --devices 4 --options xla_gpu_...=False

It needs the CUDA plugin of JAX (pip install "jax[cuda13]") and no GPU. Kernels are not searched
for, since that takes a card, so totals are up to 5 % below those of one. Nothing is timed.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import lora_jax.models._attention as attention
from lora_jax import _joined, _ranks, training

from .scaling.ours import TX, make_step, split
from .scaling.points import WAYS, Point
from .scaling.table import GIB
from .scaling.wire import moved
from .step.cases import CASES
from .step.ours import make_model, planned

# An H200, as XLA asks about one; figures of the vendor's datasheet and of CUDA's limits.
CARD = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 62914560
  clock_rate_ghz: 1.98
  device_memory_size: 150000000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
CAPABILITY = "9.0"
UNSEARCHED = {"xla_gpu_autotune_level": "0"}
COLUMNS = ("case", "way", "devices", "arguments", "temporaries", "all, GiB", "results, MB", "sent")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    chosen = parse(arguments)
    options = dict(option.split("=", 1) for option in chosen.options)
    print(f"| {' | '.join(COLUMNS)} |\n| {' | '.join(['---'] * 3 + ['---:'] * 5)} |")
    for case in chosen.cases:
        for count in chosen.devices:
            for way in chosen.ways if count > 1 else ("data",):
                point = point_of(case, way, count, chosen.layers)
                started = time.monotonic()
                with as_on_a_gpu():
                    found = plan(point, cards(count), UNSEARCHED | options)
                print(line(point, found), flush=True)
                print(f"compiled in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return 0


def point_of(case: str, way: str, devices: int, layers: str) -> Point:
    """A device's batch, on each of some devices."""
    rows = devices * CASES[case].shape.batch
    return Point(case=case, contender="ours", way=way, devices=devices, rows=rows, layers=layers)


def cards(count: int) -> list[Any]:
    """Devices that programs can be compiled for and not run on.

    Raises:
        SystemExit: JAX has no plugin for CUDA.
    """
    try:
        found = topologies.get_topology_desc(
            "", "cuda", target_config=CARD, topology=f"1x1x{count}"
        )
    except NotImplementedError as error:
        raise SystemExit(f'There is no CUDA plugin: pip install "jax[cuda13]" ({error})') from error
    return list(found.devices)


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """While it lasts, what is traced is what would be traced on a GPU."""
    before = _joined.BACKENDS, _ranks.BACKENDS, attention.default_device
    here = (jax.default_backend(),)
    card = type("Card", (), {"compute_capability": CAPABILITY})()
    _joined.BACKENDS = _ranks.BACKENDS = here
    attention.default_device = lambda: card
    try:
        yield
    finally:
        _joined.BACKENDS, _ranks.BACKENDS, attention.default_device = before


def plan(point: Point, devices: Sequence[Any], options: dict[str, str]) -> dict[str, Any]:
    """XLA's plan of a step: ``planned`` in bytes, and ``wire`` as in `benchmarks.scaling`.

    Args:
        point: What to compile.
        devices: For which devices.
        options: Of the compiler.
    """
    mesh = training.make_mesh(**{point.way: point.devices}, devices=devices)
    model = make_model(point)

    def begin(params: Any) -> tuple[Any, Any]:
        frozen, trainable = split(model, point, params)
        return frozen, training.init_state(trainable, TX, jax.random.key(2))

    frozen, state = jax.eval_shape(begin, model.params)
    placement = training.placements(frozen, state.trainable, mesh, layouts=model.layouts)
    state = _there(state, training.state_placement(state, placement))
    frozen = _there(frozen, placement.frozen)
    size = (point.rows, point.work.shape.length)
    rows = {"input_ids": jax.ShapeDtypeStruct(size, jnp.int32)}
    step = make_step(model, point, mesh, placement)
    compiled = step.lower(state, frozen, rows).compile(compiler_options=options)
    return {"planned": planned(compiled), "wire": moved(compiled.as_text())}


def line(point: Point, found: dict[str, Any]) -> str:
    """A row of the table."""
    sizes, wire = found["planned"], found["wire"]
    held = [f"{sizes[name] / GIB:.4g}" for name in ("arguments", "temporaries", "total")]
    results = ", ".join(f"{kind} {size / 1e6:,.1f}" for kind, size in wire["results"].items())
    names = (point.case, point.way, str(point.devices))
    return f"| {' | '.join([*names, *held, results or '-', format(wire['sent'] / 1e6, ',.1f')])} |"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    decoders = [name for name, one in CASES.items() if one.shape.task == "causal-lm"]
    add("--cases", nargs="+", choices=decoders, default=["tiny"], metavar="CASE")
    add("--ways", nargs="+", choices=WAYS, default=WAYS)
    add("--devices", nargs="+", type=int, default=[1, 8], metavar="N")
    add("--layers", default="unrolled", help="unrolled, scanned, or how many a step (%(default)s)")
    add("--options", nargs="+", default=[], metavar="NAME=VALUE", help="of the compiler")
    return parser.parse_args(arguments)


def _there(tree: Any, places: Any) -> Any:
    """Shapes of arrays that are where they belong."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        tree,
        places,
    )


if __name__ == "__main__":
    sys.exit(main())
