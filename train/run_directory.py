"""A run's directory: what may be there before, and the plain files that the run writes into it.

config.yaml     every setting, defaults included; can be run again as it is
metrics.jsonl   a line for each step and each evaluation
checkpoints/    the trainable state: the latest and the best
adapter/        what was trained, for PEFT, vLLM and lora_jax
result.json     the figures of the finished run
curves.png      loss, learning rate and metrics over steps
report.html     all of it on one page
"""

import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from .config import PATHS, Config, DistributedSection
from .config_file import to_yaml
from .processes import agreed_word, is_first, wait_for_all
from .supervisor import WATCHED
from .yaml_loader import read

CONFIG, METRICS, RESULT = "config.yaml", "metrics.jsonl", "result.json"
TOGETHER = ".together"
CHECKPOINTS, ADAPTER, CURVES, REPORT = "checkpoints", "adapter", "curves.png", "report.html"


def check_directory(config: Config) -> bool:
    """Decides what happens to an output directory, before anything is written or deleted.

    Returns:
        Whether there is a run to resume.

    Raises:
        ValueError: It is in use and the config does not say what to do, or it holds something
            that is not a run and may therefore not be replaced.
    """
    directory, choice = Path(config.output.directory), config.output.on_existing
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"`output.directory` {directory} is a file.")
    if not directory.exists() or not any(directory.iterdir()):
        return False
    if _token(directory).is_file() and _token(directory).read_text() == os.environ.get(WATCHED):
        return True
    if choice == "error":
        raise ValueError(
            f"{directory} is not empty. Add --resume to go on with the run in it, --overwrite "
            f"to replace it, or give a new name: output.directory={_free_name(directory)}"
        )
    if not (directory / CONFIG).is_file():
        raise ValueError(
            f"{directory} holds files but no {CONFIG}, so it is not a run: it is left as it is. "
            f"Give a new name: output.directory={_free_name(directory)}"
        )
    return choice == "resume"


def start_directory(config: Config, resume: bool) -> Path:
    """Makes the directory; what an older run left is removed, unless it is resumed."""
    directory = Path(config.output.directory)
    if not resume and is_first():
        if directory.exists():
            shutil.rmtree(directory)
        directory.mkdir(parents=True)
        write_config(config)
    check_shared(directory)
    if WATCHED in os.environ:
        _token(directory).write_text(os.environ[WATCHED])
    return directory


def check_shared(directory: Path) -> None:
    """Waits for all processes, and makes sure that they see one directory.

    Raises:
        ValueError: They do not.
    """
    if (word := agreed_word()) is None:
        return
    note = directory / TOGETHER
    if is_first():
        note.write_text(word)
    wait_for_all("the output directory is there")
    if not note.is_file() or note.read_text() != word:
        raise ValueError(
            f"Process 0 has made {directory}, and this process does not see it: "
            "`output.directory` must be on a disk that all processes share."
        )
    wait_for_all("all have seen the output directory")
    if is_first():
        note.unlink()


def batch_size_before(config: Config) -> int | None:
    """The batch size of the run in the directory, if there is one."""
    path = Path(config.output.directory) / CONFIG
    if not path.is_file():
        return None
    return (read(path).values.get("training") or {}).get("batch_size")


def _token(directory: Path) -> Path:
    """Where a watched run leaves its word, each process its own."""
    return directory / f".attempt-{jax.process_index()}"


def write_config(config: Config) -> None:
    """Writes the resolved config, without who took part: it can be run again anywhere."""
    directory = Path(config.output.directory)
    config = config.model_copy(update={"distributed": DistributedSection()})
    write_text(directory / CONFIG, to_yaml(config, directory))


def comparable(config: Config) -> str:
    """All settings that processes of a run must share: files may have other names elsewhere."""
    values = config.model_dump(mode="json", exclude={"distributed": True, "output": {"directory"}})
    for section, key in PATHS:
        values[section].pop(key, None)
    return json.dumps(values, sort_keys=True)


def append_rows(directory: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds lines to the metrics; they are on disk when this returns."""
    if not is_first():
        return
    with (directory / METRICS).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(_finite(row)) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def read_rows(directory: Path) -> list[dict[str, Any]]:
    """The metrics so far; a last line that a crash cut short is left out."""
    path = directory / METRICS
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [_as_numbers(json.loads(line)) for line in lines]


def cut_rows(directory: Path, step: int) -> None:
    """Drops the lines after a step, which a resumed run is about to write again."""
    rows = [row for row in read_rows(directory) if row["step"] <= step]
    write_text(directory / METRICS, "".join(json.dumps(_finite(row)) + "\n" for row in rows))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes JSON, whole or not at all."""
    write_text(path, json.dumps(_finite(values), indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all; of several processes the first does."""
    if not is_first():
        return
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _finite(value: Any) -> Any:
    """JSON has no word for what is not finite: it is written as a string."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _as_numbers(row: dict[str, Any]) -> dict[str, Any]:
    """Undoes `_finite`."""
    return {key: float(v) if v in ("nan", "inf", "-inf") else v for key, v in row.items()}


def _free_name(directory: Path) -> str:
    number = 2
    while (name := directory.with_name(f"{directory.name}-{number}")).exists():
        number += 1
    return os.path.relpath(name)
