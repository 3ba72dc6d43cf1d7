"""Where a sweep goes on from: the last step of which every member that ran has a checkpoint."""

import json
from pathlib import Path
from typing import Any

from lora_jax import training
from lora_jax.io import checkpoints

from . import finetune, run_directory
from .config import Config, best_metric
from .finetune import Run
from .members import swept
from .traits import is_better_lower
from .yaml_loader import read

KEEP = 2  # checkpoints: a kill while members are saved leaves the one before to all of them


def check_directory(config: Config) -> bool:
    """Decides what happens to the directory, and whether there is a sweep to resume.

    Raises:
        ValueError: As `run_directory.check_directory`; or another sweep is in it.
    """
    resuming = run_directory.check_directory(config)
    if not resuming:
        return False
    path = Path(config.output.directory) / run_directory.CONFIG
    found = {name: tuple(own) for name, own in read(path).values.get("sweep", {}).items() if own}
    if found != swept(config):
        raise ValueError(
            f"{path.parent} cannot be resumed: in it `sweep` is {found}. Give the same values, or "
            "start anew with --overwrite or another output.directory."
        )
    return True


def open_directory(config: Config, resuming: bool) -> dict[str, Any]:
    """A member's directory, and its checkpoints."""
    there = Path(config.output.directory).is_dir()
    directory = run_directory.start_directory(config, resuming and there)
    saved = checkpoints.open_checkpoints(
        directory / run_directory.CHECKPOINTS,
        keep=max(KEEP, config.training.keep),
        best="min" if is_better_lower(best_metric(config)) else "max",
    )
    return {"directory": directory, "saved": saved}


def resume(
    members: list[Run], begin: list[training.TrainState]
) -> tuple[int, list[training.TrainState], list[bool]]:
    """The step that all go on from, their states there, and who is running.

    It is the last one of which all that had not stopped have a checkpoint; later ones are removed.

    Raises:
        ValueError: As `finetune.resume`.
    """
    latest = [member.saved.latest_step() or 0 for member in members]
    stops = [stop_of(member) for member in members]
    going = [own for own, stop in zip(latest, stops, strict=True) if stop is None]
    step = min(going, default=max(latest))
    running = [stop is None or stop > step for stop in stops]
    states = []
    for member, state, goes_on in zip(members, begin, running, strict=True):
        for own in member.saved.all_steps():
            if own > step:
                member.saved.delete(own)
        if goes_on:
            (member.directory / run_directory.RESULT).unlink(missing_ok=True)
            state = finetune.resume(member, state)
        states.append(state)
    return step, states, running


def stop_of(member: Run) -> int | None:
    """The step in which a member stopped, if it did."""
    path = member.directory / run_directory.RESULT
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return result["step"] if result.get("status") == "not finite" else None
