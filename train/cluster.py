"""Whether a process is one of several, and how they find each other.

explicit     distributed.coordinator, .process_id and .num_processes
environment  COORDINATOR_ADDRESS, PROCESS_ID (or the index of a Kubernetes job) and NUM_PROCESSES
cluster      SLURM and Open MPI, which `jax.distributed` reads itself
"""

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

NAMES = {
    "coordinator": ("JAX_COORDINATOR_ADDRESS", "COORDINATOR_ADDRESS"),
    "process_id": ("JAX_PROCESS_ID", "PROCESS_ID", "JOB_COMPLETION_INDEX"),
    "num_processes": ("JAX_NUM_PROCESSES", "NUM_PROCESSES"),
}
SIZES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")


class Section(Protocol):
    """The part of a config that says it; see `config.DistributedSection`."""

    @property
    def coordinator(self) -> str | None: ...  # noqa: D102

    @property
    def process_id(self) -> int | None: ...  # noqa: D102

    @property
    def num_processes(self) -> int | None: ...  # noqa: D102


class Group(NamedTuple):
    """What `jax.distributed.initialize` is told; None is what it finds out itself."""

    coordinator: str | None = None
    process_id: int | None = None
    num_processes: int | None = None


def group_of(section: Section, environment: Mapping[str, str]) -> Group | None:
    """How the processes of a run find each other; None of a process that is alone.

    Raises:
        ValueError: The environment says only some of it, or no numbers.

    >>> from train.config import DistributedSection as Section
    >>> said = {"COORDINATOR_ADDRESS": "host:1", "PROCESS_ID": "1", "NUM_PROCESSES": "2"}
    >>> group_of(Section(), said)
    Group(coordinator='host:1', process_id=1, num_processes=2)
    >>> group_of(Section(), {"SLURM_NTASKS": "4"})
    Group(coordinator=None, process_id=None, num_processes=None)
    >>> group_of(Section(), {"SLURM_NTASKS": "1"}) is None
    True
    """
    if section.coordinator is not None:
        return Group(section.coordinator, section.process_id, section.num_processes)
    found = {
        field: next(((name, environment[name]) for name in names if name in environment), None)
        for field, names in NAMES.items()
    }
    if found["coordinator"] is not None:
        if missing := [NAMES[field][0] for field, pair in found.items() if pair is None]:
            raise ValueError(
                f"{found['coordinator'][0]} is set, so this is one process of several: set "
                f"{' and '.join(missing)} too."
            )
        numbers = (_number(found[field]) for field in ("process_id", "num_processes"))
        return Group(found["coordinator"][1], *numbers)
    return Group() if _is_sized(environment) else None


def is_told(config: str | None, overrides: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether anything says so, before the config is understood."""
    said = any(override.startswith("distributed.") for override in overrides)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        text = Path(config or "").read_text(encoding="utf-8")
        said |= re.search(r"^\s+coordinator:[ \t]*(?!null|~)\S", text, re.MULTILINE) is not None
    return said or _is_sized(environment) or any(n in environment for n in NAMES["coordinator"])


def _is_sized(environment: Mapping[str, str]) -> bool:
    return any(environment.get(name, "1") != "1" for name in SIZES)


def _number(found: tuple[str, str] | None) -> int | None:
    if found is None:
        return None
    name, text = found
    if not text.isdecimal():
        raise ValueError(f"{name} must be a number, got {text!r}.")
    return int(text)
