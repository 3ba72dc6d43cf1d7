"""What one process measures: plain values, handed to it as JSON."""

import dataclasses
import json
from typing import Any, Self

from .cases import CASES, Case


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One contender on one case.

    Attributes:
        case: A name of `CASES`.
        contender: A name of `contenders.CONTENDERS`.
        warmup: Steps before any is timed, the first one among them.
        rounds: How often a block of steps is timed.
        steps: How many steps a block has. They follow each other without a wait, as in training.
        start_only: Stop after the first step: what remains is what it took to get there.
        layers: Of ours: ``"unrolled"``, ``"scanned"``, or how many a step of the scan has.
        remat: Of ours: the policy; None is that of the case.
        chunk: Of ours: tokens whose logits exist at a time; None is what the case says.
        xla: Of ours: options of the compiler, by name.
        cache: Directory of JAX's compilation cache; None is none.
        profile: Directory for a trace and a memory report in place of figures; None is none.
    """

    case: str
    contender: str
    warmup: int = 3
    rounds: int = 5
    steps: int = 8
    start_only: bool = False
    layers: str = "unrolled"
    remat: str | None = None
    chunk: int | None = None
    xla: dict[str, str] = dataclasses.field(default_factory=dict)
    cache: str | None = None
    profile: str | None = None

    @property
    def work(self) -> Case:
        """The case itself."""
        return CASES[self.case]

    @property
    def title(self) -> str:
        """What the log calls it."""
        return f"{self.case}, {self.contender}"

    def replace(self, **changes: Any) -> Self:
        """Another job, these fields changed."""
        return dataclasses.replace(self, **changes)

    def fields(self) -> dict[str, Any]:
        """Itself as JSON has it."""
        return dataclasses.asdict(self)


def changes_of(variant: str) -> dict[str, Any]:
    """What a variant of ours changes.

    >>> changes_of("remat=named,chunk=8192")
    {'remat': 'named', 'chunk': 8192}
    >>> changes_of("xla_gpu_enable_triton_gemm=False")
    {'xla': {'xla_gpu_enable_triton_gemm': 'False'}}

    Raises:
        ValueError: It names something else than an option of ours.
    """
    pairs = [part.partition("=") for part in variant.split(",")]
    changes: dict[str, Any] = {name: value for name, _, value in pairs}
    xla = {name: changes.pop(name) for name in list(changes) if name.startswith("xla_")}
    if unknown := sorted(set(changes) - {"layers", "remat", "chunk"}):
        raise ValueError(
            f"A variant sets layers, remat, chunk or options of XLA, as in "
            f"'remat=named,chunk=8192'; it does not set {', '.join(unknown)}."
        )
    if "chunk" in changes:
        changes["chunk"] = tokens(changes["chunk"])
    return changes | ({"xla": xla} if xla else {})


def tokens(text: str) -> int:
    """A number of tokens, 0 for all.

    Raises:
        ValueError: It is none.
    """
    if (number := int(text)) < 0:
        raise ValueError(f"tokens are counted from 0, got {number}.")
    return number


def read(text: str) -> Job:
    """The job of a process's argument."""
    return Job(**json.loads(text))
