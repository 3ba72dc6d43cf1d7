"""``lora-jax doctor``: is this machine ready? Each check is a function; the last one trains.

A check returns what it found as one line and as values for ``--json``; one that raises failed.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import _output
from ._application import EXTRAS
from ._step import training_step

Found = tuple[str, dict[str, Any]]
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "safetensors", "numpy")
WIDTH = 1024  # of the matrices that are multiplied to measure a rate


class Result(NamedTuple):
    """What one check found; ``ok`` is False if it raised."""

    name: str
    ok: bool
    text: str
    values: dict[str, Any]


def add_command(commands: Any) -> None:
    """Adds ``doctor`` to the commands of a parser."""
    parser = commands.add_parser(
        "doctor",
        help="check this machine, with one real training step",
        description="Checks versions, devices, memory, bfloat16, disk, the compilation cache and "
        "the training extras, and trains a small LoRA model for one step. "
        "Exit code 1 if a check fails.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs all checks and prints them; 1 if one failed."""
    results = [_run(name, check) for name, check in CHECKS.items()]
    ok = all(result.ok for result in results)
    if options.json:
        checks = {result.name: {"ok": result.ok, **result.values} for result in results}
        _output.print_json({"ok": ok, "checks": checks})
    else:
        rows = [("ok" if ok else "FAILED", name, text) for name, ok, text, _ in results]
        _output.print_table(("", "check", "found"), rows)
    return 0 if ok else 1


def _run(name: str, check: Callable[[], Found]) -> Result:
    try:
        return Result(name, True, *check())
    except Exception as error:  # a doctor reports what is broken, whatever it is
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        return Result(name, False, message, {"error": message})


def _python() -> Found:
    version, system = platform.python_version(), f"{platform.system()} {platform.machine()}"
    return f"{version} on {system}", {"version": version, "system": system}


def _libraries() -> Found:
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return ", ".join(f"{name} {version}" for name, version in versions.items()), versions


def _devices() -> Found:
    kinds: dict[str, int] = {}
    for device in jax.devices():
        kinds[device.device_kind] = kinds.get(device.device_kind, 0) + 1
    text = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    values = {"platform": jax.default_backend(), "count": jax.device_count(), "kinds": kinds}
    return f"{text} ({jax.default_backend()}, {jax.process_count()} process)", values


def _memory() -> Found:
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    values = {"host_bytes": host}
    text = f"host {_gib(host)}"
    if limit := (jax.devices()[0].memory_stats() or {}).get("bytes_limit"):
        values["device_bytes"] = limit
        text += f", each device {_gib(limit)}"
    return text, values


def _bfloat16() -> Found:
    rates = {dtype: _matmul_rate(dtype) for dtype in ("float32", "bfloat16")}
    ratio = rates["bfloat16"] / rates["float32"]
    text = f"works, {ratio:.2g} times the rate of float32 ({rates['float32']:.3g} GFLOP/s)"
    values = {f"{dtype}_gflops": rate for dtype, rate in rates.items()}
    return text, values | {"ratio": ratio}


def _matmul_rate(dtype: str, seconds: float = 0.2) -> float:
    """GFLOP/s of a square matmul, measured for about ``seconds``."""
    x = jnp.ones((WIDTH, WIDTH), dtype)
    multiply = jax.jit(jnp.matmul)
    if float(multiply(x, x)[0, 0]) != WIDTH:
        raise ArithmeticError(f"a {dtype} matmul of ones gave {multiply(x, x)[0, 0]}")
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        multiply(x, x).block_until_ready()
        count += 1
    return 2e-9 * WIDTH**3 * count / (time.perf_counter() - start)


def _disk() -> Found:
    free = shutil.disk_usage(".").free
    return f"{_gib(free)} free here", {"free_bytes": free}


def _compilation_cache() -> Found:
    directory = jax.config.values["jax_compilation_cache_dir"]
    if not directory:
        return "off; JAX_COMPILATION_CACHE_DIR=DIRECTORY keeps compiled steps", {"directory": None}
    return directory, {"directory": directory}


def _training_extras() -> Found:
    versions = {name: _version(name) for name in EXTRAS}
    if missing := [name for name, version in versions.items() if version is None]:
        text = f"{', '.join(missing)} not installed; pip install 'lora_jax[train]' to train"
    else:
        text = ", ".join(f"{name} {version}" for name, version in versions.items())
    return text, {"installed": not missing, "versions": versions}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _training_step() -> Found:
    step = training_step()
    text = (
        f"{step.trained:,} of {step.total:,} parameters trained, loss {step.losses[0]:.4f} -> "
        f"{step.losses[-1]:.4f}, {1e3 * step.seconds:.2g} ms a step after "
        f"{step.compile_seconds:.2g} s to compile"
    )
    return text, step._asdict()


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"


CHECKS: dict[str, Callable[[], Found]] = {
    "python": _python,
    "libraries": _libraries,
    "devices": _devices,
    "memory": _memory,
    "bfloat16": _bfloat16,
    "disk": _disk,
    "compilation cache": _compilation_cache,
    "training extras": _training_extras,
    "training step": _training_step,
}
