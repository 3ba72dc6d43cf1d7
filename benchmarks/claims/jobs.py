"""What is measured: one job is one point of one part, as plain values that pass between processes.

Job(part="d", kind="step", series="rank", size="llama-1b", method="lora", rank=64, ...)
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from .shapes import SHAPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One point.

    Attributes:
        part: The letter of its part.
        kind: What measures it: a name of `worker.KINDS`.
        series: Of part d, what grows.
        size: A name of `SHAPES`.
        method: ``"lora"`` or ``"full"``.
        batch: Rows.
        length: Tokens of a row.
        rank: Of the factors.
        dtype: Of weights and arithmetic.
        scan_layers: Whether the layers are one scan; unrolled ones run faster and compile longer.
        remat: What layers recompute.
        seconds: How long to measure, what compiles not counted.
    """

    part: str
    kind: str
    series: str = ""
    size: str = ""
    method: str = "lora"
    batch: int = 0
    length: int = 0
    rank: int = 0
    dtype: str = "float32"
    scan_layers: bool = True
    remat: str = "none"
    seconds: float = 3.0

    def fields(self) -> dict[str, Any]:
        """Itself as JSON has it."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """What depends on the machine.

    Attributes:
        dtype: Of weights and arithmetic.
        step: Models of part b.
        inference: Of part c: model, rows, tokens.
        growth: The model of part d.
        ranks: Of its series over ranks, on ``rank_batch`` rows of ``row`` tokens.
        rank_batch: See there.
        lengths: Tokens of one row.
        batches: Rows, of ``row`` tokens each.
        row: See there.
    """

    dtype: str
    step: tuple[str, ...]
    inference: tuple[tuple[str, int, int], ...]
    growth: str
    ranks: tuple[int, ...]
    rank_batch: int
    lengths: tuple[int, ...]
    batches: tuple[int, ...]
    row: int


GRIDS = {
    "gpu": Grid(
        dtype="bfloat16",
        step=(
            "gpt2-small",
            "gpt2-medium",
            "gpt2-large",
            "roberta-base",
            "roberta-large",
            "llama-1b",
            "llama-8b",
        ),
        # The paper's table 1 has these three of GPT-2 medium.
        inference=(
            ("gpt2-medium", 32, 512),
            ("gpt2-medium", 16, 256),
            ("gpt2-medium", 1, 128),
            ("llama-1b", 1, 128),
        ),
        growth="llama-1b",
        ranks=(1, 4, 16, 64, 256),
        rank_batch=4,
        lengths=(512, 1024, 2048, 4096, 8192, 16384, 32768),
        batches=(1, 2, 4, 8, 16),
        row=2048,
    ),
    "cpu": Grid(
        dtype="float32",
        step=("tiny", "minilm"),
        inference=(("tiny", 1, 32), ("minilm", 1, 64)),
        growth="tiny",
        ranks=(1, 4, 16, 64, 256),
        rank_batch=4,
        lengths=(32, 64, 128, 256),
        batches=(1, 2, 4, 8),
        row=32,
    ),
}


def groups(part: str, grid: Grid, sizes: Sequence[str], common: dict[str, Any]) -> list[list[Job]]:
    """The jobs of a part; each group runs in a process of its own.

    Args:
        part: Its letter.
        grid: The machine's.
        sizes: Models; none means the grid's.
        common: Fields that all jobs share.
    """
    common = {"dtype": grid.dtype} | common
    if part == "b":
        return [_step_jobs(name, common) for name in sizes or grid.step]
    if part == "c":
        places = [place for place in grid.inference if not sizes or place[0] in sizes]
        places += [(name, 1, 128) for name in sizes if name not in {p[0] for p in places}]
        return [[_inference_job(*place, common)] for place in places]
    if part == "d":
        return [_growth_jobs(name, grid, common) for name in sizes or (grid.growth,)]
    # A target hangs on these ratios: ten times as long.
    return [[Job(part="e", kind="cpu", size="minilm", method="", seconds=10 * common["seconds"])]]


def _step_jobs(name: str, common: dict[str, Any]) -> list[Job]:
    """LoRA first: its peak is the lower one, and a process can only tell when it rises."""
    shape = SHAPES[name]
    point = {"batch": shape.batch, "length": shape.length, "rank": shape.rank}
    methods = ("lora", "full")
    return [Job(part="b", kind="step", size=name, method=m, **point, **common) for m in methods]


def _inference_job(name: str, batch: int, length: int, common: dict[str, Any]) -> Job:
    point = {"batch": batch, "length": length, "rank": SHAPES[name].rank}
    return Job(part="c", kind="inference", size=name, **point, **common)


def _growth_jobs(name: str, grid: Grid, common: dict[str, Any]) -> list[Job]:
    """The smaller points first: so each may raise the peak, and time runs out on the largest."""
    own = SHAPES[name].rank
    points = [
        *(("rank", rank, grid.rank_batch, grid.row) for rank in grid.ranks),
        *(("length", own, 1, length) for length in grid.lengths),
        *(("batch", own, batch, grid.row) for batch in grid.batches),
    ]
    points.sort(key=lambda point: (point[2] * point[3], point[1]))
    return [
        Job(part="d", kind="step", series=series, size=name, rank=rank, batch=b, length=n, **common)
        for series, rank, b, n in points
    ]
