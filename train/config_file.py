"""From a YAML file and the command line to a `Config`, or to one list of all that is wrong."""

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from .config import PATHS, SWEPT, Config
from .yaml_loader import Document, KeyPath, Problem, override, place_of, read

FILE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt", ".gz", ".gguf")


class ConfigError(ValueError):
    """Everything that is wrong with a config, a line for each."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(dict.fromkeys(problems))
        count = len(self.problems)
        title = f"The config has {count} problem{'s' * (count > 1)}:"
        super().__init__("\n".join([title, *(f"  {problem}" for problem in self.problems)]))


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a config.

    Args:
        path: The YAML file. Paths in it are relative to its directory.
        overrides: `section.key=value` each. Paths in them are relative to the current directory.

    Returns:
        The config, checked, its paths absolute.

    Raises:
        ConfigError: Lists unknown keys (with the nearest known one), wrong types, keys given
            twice, missing keys, files that do not exist, and overrides that cannot be read.
    """
    document = read(path)
    override(document, list(overrides))
    if not document.values and document.problems:
        raise ConfigError(document.problems)
    values = {key: {} if value is None else value for key, value in document.values.items()}
    problems = [*document.problems, *_resolve_paths(values, document, Path(path).parent)]
    try:
        config = from_plain(values)
    except pydantic.ValidationError as error:
        raise ConfigError([*problems, *_translate(error, document, str(path))]) from None
    if problems:
        raise ConfigError(problems)
    return config


def from_plain(values: dict[str, Any]) -> Config:
    """A config from plain values, as YAML and JSON hold them."""
    return Config.model_validate(_as_tuples(values))


def to_yaml(config: Config, directory: Path) -> str:
    """The whole config as YAML that means the same where it is read from `directory`."""
    values = config.model_dump(mode="json")
    for section, key in PATHS:
        value = values[section][key]
        if value is not None and Path(value).is_absolute():
            values[section][key] = os.path.relpath(value, directory)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def differences(before: Config, after: Config) -> list[str]:
    """The settings that differ, `section.key: before -> after`, but for those free to change.

    Where the output goes, how often the loss is looked at and what is kept change no number of
    the run. Data is known by its content, not by its file's name.
    """
    free = {
        *(("training", key) for key in ("log_every", "save_every", "keep")),
        *(("data", key) for key in ("train", "validation")),
    }
    old, new = before.model_dump(), after.model_dump()
    return [
        f"{section}.{key}: {old[section][key]!r} -> {new[section][key]!r}"
        for section in ("model", "lora", "data", "training")
        for key in old[section]
        if (section, key) not in free and old[section][key] != new[section][key]
    ]


def _resolve_paths(values: dict, document: Document, base: Path) -> Iterator[Problem]:
    """Makes paths absolute in place; yields those that should exist and do not."""
    for path in PATHS:
        section, key = path
        value = values[section].get(key) if isinstance(values.get(section), dict) else None
        if not isinstance(value, str):
            continue
        place = place_of(document, path)
        file = Path(value).expanduser()
        file = (Path.cwd() if place.startswith("command line") else base).resolve() / file
        if path == ("output", "directory") or file.exists():
            values[section][key] = str(file.resolve())
        elif _names_a_file(value):
            yield Problem(place, path, f"no such file or directory: {file}")


def _names_a_file(value: str) -> bool:
    """Whether a name that does not exist was meant as a file, and not as a hub name."""
    return (
        value.startswith((".", "/", "~"))
        or value.endswith(FILE_SUFFIXES)
        or value.count("/") > 1
        or not value
    )


def _as_tuples(value: Any) -> Any:
    """Lists as tuples: the config's sequences do not change."""
    if isinstance(value, dict):
        return {key: _as_tuples(item) for key, item in value.items()}
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value


def _translate(error: pydantic.ValidationError, document: Document, file: str) -> Iterator[Problem]:
    """What pydantic found, each error with its place and what to do."""
    for detail in error.errors(include_url=False):
        path = tuple(str(part) for part in detail["loc"] if part != "[key]")
        place = place_of(document, path) or file
        yield Problem(place, path, _message(detail, path))


def _message(detail: Any, path: KeyPath) -> str:
    kind, message, value = detail["type"], detail["msg"], detail["input"]
    if kind == "extra_forbidden":
        return _unknown_key(path)
    if kind == "missing":
        return f"is required: {_meaning(path)}"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    if kind == "model_type":
        return f"is a section: write its keys below it, indented, not {value!r}"
    message = message.replace("Input should be", "must be").replace("tuple", "list")
    found = f"{type(value).__name__} {value!r}".replace("tuple", "list", 1)
    hint = _nearest(value, str(detail.get("ctx", {}).get("expected", "")).split("'")[1::2])
    return f"{message[0].lower()}{message[1:]}, got {found}{hint}"


def _unknown_key(path: KeyPath) -> str:
    """Names the nearest key of the section, else the section where the key belongs."""
    fields: Any = Config.model_fields
    sections = {name: list(field.annotation.model_fields) for name, field in fields.items()}
    known = list(sections) if len(path) == 1 else sections.get(path[0], [])
    if path[0] == "sweep":
        return f"cannot be swept; what can be: {', '.join(SWEPT)}"
    if hint := _nearest(path[-1], known, prefix=path[:-1]):
        return f"unknown key{hint}"
    for name, keys in sections.items():
        if hint := _nearest(path[-1], keys, prefix=(name,)):
            return f"unknown key{hint}"
    return f"unknown key; known here: {', '.join(known)}"


def _meaning(path: KeyPath) -> str:
    section, *keys = path
    fields = Config.model_fields[section].annotation.model_fields  # pyright: ignore
    if keys:
        return " ".join(fields[keys[0]].description.split())
    return f"the section {section!r}, with {', '.join(fields)}"


def _nearest(word: Any, known: Sequence[str], prefix: KeyPath = ()) -> str:
    near = difflib.get_close_matches(str(word), known, n=1)
    return f"; did you mean {'.'.join((*prefix, near[0]))!r}?" if near else ""
