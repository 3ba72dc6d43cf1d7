"""PEFT's step over several devices: `peft_step`'s models under DistributedDataParallel.

A process a device: NCCL between GPUs, gloo on a CPU. Each takes its part of every batch.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.nn.parallel import DistributedDataParallel

from benchmarks.scaling.points import Point

from .peft_step import SETTINGS, make_model, versions_of
from .torch_step import measure as measure_step


def measure(point: Point) -> dict[str, Any]:
    """All figures of a point: those of the first process, and the most memory of any."""
    with tempfile.TemporaryDirectory() as directory:
        processes: Any = torch.multiprocessing
        try:
            processes.spawn(_process, (point, directory), nprocs=point.devices)
        except processes.ProcessRaisedException as error:
            raise RuntimeError(str(error).strip().splitlines()[-1]) from error
        return json.loads(Path(directory, "figures.json").read_text(encoding="utf-8"))


def _process(rank: int, point: Point, directory: str) -> None:
    """What each process does; the first one writes the figures."""
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // point.devices))
    torch.distributed.init_process_group(
        "nccl" if on_gpus else "gloo",
        init_method=f"file://{directory}/meeting",
        rank=rank,
        world_size=point.devices,
    )
    figures = _measure(rank, point, on_gpus)
    peaks: list[Any] = [None] * point.devices
    torch.distributed.all_gather_object(peaks, figures["peak_bytes"])
    figures["peak_bytes"] = max(peaks) if on_gpus else None
    if rank == 0:
        Path(directory, "figures.json").write_text(json.dumps(figures), encoding="utf-8")
    torch.distributed.destroy_process_group()


def _measure(rank: int, point: Point, on_gpus: bool) -> dict[str, Any]:
    settings = SETTINGS[point.contender]

    def make(device: str) -> DistributedDataParallel:
        model = make_model(point.work, settings, device)
        return DistributedDataParallel(model, device_ids=[rank] if on_gpus else None)

    own = point.rows // point.devices
    return measure_step(
        point,
        make,
        versions_of(point.work, settings),
        autocast=settings.autocast,
        rows=slice(rank * own, (rank + 1) * own),
        passes=point.passes,
    )
