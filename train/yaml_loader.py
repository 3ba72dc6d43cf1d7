"""Strict YAML: what the file says, where it says it, and everything that is wrong with it.

PyYAML follows YAML 1.1: `1e-4` is a string, `off` is false, `1:30` is 90, and of two equal
keys the last one wins. Here scalars follow the YAML 1.2 core schema (a float may leave out its
dot, only `true` and `false` are booleans), an equal key is a problem, and every value's line is
remembered under its dotted path, `("training", "learning_rate")`.
"""

import re
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml

KeyPath = tuple[str, ...]


class Problem(NamedTuple):
    """One thing that is wrong with a config.

    Attributes:
        place: Where the user typed it: `run.yaml:3` or `command line`.
        path: The dotted path of the value, or an empty tuple for the whole file.
        message: What was found and what to do.
    """

    place: str
    path: KeyPath
    message: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.place, ".".join(self.path), self.message)))


class Document(NamedTuple):
    """A parsed config: plain values, the place of every key, and the problems met so far."""

    values: dict[str, Any]
    places: dict[KeyPath, str]
    problems: list[Problem]


class CoreLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


_FLOAT = r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
# The first pattern that matches names the type, so integers stand before floats.
for _tag, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
):
    CoreLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
    )


def _construct_int(loader: CoreLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # YAML 1.1 would read 010 as 8


CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse(text: str, name: str) -> Document:
    """Parses a config's text.

    Args:
        text: The YAML text.
        name: The file's name, for places: `name:line`.

    Returns:
        The values, with the place of every key. Problems are listed, never raised.
    """
    document = Document({}, {}, [])
    try:
        loader = CoreLoader(text)
        root = loader.get_single_node()
        if root is None:
            document.problems.append(Problem(name, (), "the file is empty"))
        elif not isinstance(root, yaml.MappingNode):
            message = "expected sections such as `model:` and `data:` at the top level"
            document.problems.append(Problem(f"{name}:1", (), message))
        else:
            document.values.update(_value(loader, root, (), name, document))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark else name
        message = f"not valid YAML: {error.problem or error.context}"
        document.problems.append(Problem(place, (), message))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        message = f"not valid YAML: {str(error).splitlines()[0]}"
        document.problems.append(Problem(name, (), message))
    return document


def read(path: str | Path) -> Document:
    """Reads and parses a config file (see `parse`)."""
    path = Path(path)
    try:
        return parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        return Document({}, {}, [Problem(str(path), (), f"cannot be read: {reason}")])


def override(document: Document, assignments: list[str]) -> None:
    """Applies `section.key=value` from the command line; values are YAML, `[a, b]` included."""
    for assignment in assignments:
        place = f"command line, {assignment!r}"
        dotted, equals, text = assignment.partition("=")
        # At most three parts, so that a mapping's key may hold dots: lora.rank_pattern.layer.0=4
        path = tuple(dotted.strip().split(".", 2))
        if not equals or len(path) < 2 or not all(path):
            message = "an override is written section.key=value"
            document.problems.append(Problem(place, (), message))
            continue
        parsed = parse(f"value: {text}", place)
        if parsed.problems:
            document.problems.extend(
                Problem(place, path, problem.message) for problem in parsed.problems
            )
            continue
        _assign(document, path, parsed.values["value"], place)


def _assign(document: Document, path: KeyPath, value: Any, place: str) -> None:
    """Sets one value, and makes the sections on the way to it."""
    section = document.values
    for depth, key in enumerate(path[:-1], start=1):
        if section.get(key) is None:
            section[key] = {}
            document.places[path[:depth]] = place
        section = section[key]
        if not isinstance(section, dict):
            message = f"{'.'.join(path[:depth])} holds a value, not keys"
            document.problems.append(Problem(place, path, message))
            return
    section[path[-1]] = value
    for known in [known for known in document.places if known[: len(path)] == path]:
        del document.places[known]
    document.places[path] = place


def _value(
    loader: CoreLoader, node: yaml.Node, path: KeyPath, name: str, document: Document
) -> Any:
    """The plain value of a node; its place and its problems go into `document`."""
    document.places.setdefault(path, f"{name}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.SequenceNode):
        return [
            _value(loader, item, (*path, str(index)), name, document)
            for index, item in enumerate(node.value)
        ]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    values = {}
    for key_node, value_node in node.value:
        place = f"{name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            document.problems.append(Problem(place, path, "a key must be a plain word"))
            continue
        key = str(key_node.value)
        key_path = (*path, key)
        if key in values:
            message = f"given twice; first at {document.places[key_path]}"
            document.problems.append(Problem(place, key_path, message))
            continue
        document.places[key_path] = place
        values[key] = _value(loader, value_node, key_path, name, document)
    return values


def place_of(document: Document, path: KeyPath) -> str:
    """Where a path was typed; for one that was not, where its section was."""
    while path and path not in document.places:
        path = path[:-1]
    return document.places.get(path, "")
