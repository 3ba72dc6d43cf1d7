"""Names as PEFT matches them: last segments, whole names, or a regular expression.

    ["query", "output.dense"]     every module that ends with one of these, in whole segments
    "model.layers.[01].mlp.*"     every module whose whole name it matches

Ranks and alphas have tables of patterns, of which the first that matches the end of a name wins.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MAX_PATTERN = 10_000  # characters


def names_module(names: Sequence[str] | str | None, module: str) -> bool:
    """Whether ``target_modules`` or ``exclude_modules`` names ``module``."""
    if isinstance(names, str):
        return _compiled(names).fullmatch(module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def saves_module(names: Iterable[str], module: str) -> bool:
    """Whether ``modules_to_save`` names ``module`` or a module around it.

    PEFT compares the ends of names here, not whole segments: ``"norm"`` names
    ``"layers.0.input_layernorm"`` too.
    """
    parts = module.split(".")
    owners = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(owner.endswith(name) for owner in owners for name in names)


def in_layers(module: str, layers: Sequence[int], patterns: Sequence[str]) -> bool:
    """Whether ``layers_to_transform`` and ``layers_pattern`` let ``module`` be a target.

    Example:
        >>> in_layers("model.layers.1.mlp.up_proj", [0, 1], [])
        True
        >>> in_layers("model.layers.1.mlp.up_proj", [0, 1], ["blocks"])
        False
    """
    forms = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = (_compiled(form).match(module) for form in forms)
    first = next((match for match in found if match), None)
    return first is not None and int(first[first.lastindex or 0]) in layers


def resolve(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches ``module``, as PEFT resolves it.

    Example:
        >>> resolve({"layer.0.attention.self.query": 2}, "bert.layer.0.attention.self.query", 8)
        2
    """
    matching = (v for p, v in patterns.items() if _compiled(rf"(.*\.)?({p})$").match(module))
    return next(matching, default)


def covering_names(modules: Iterable[str], all_modules: Iterable[str]) -> list[str]:
    """A short list for ``target_modules`` that names ``modules`` and nothing else.

    Each is named by as few last segments as name none of the others among ``all_modules``.

    Example:
        >>> covering_names(["a.query", "b.query"], ["a.query", "b.query", "a.key"])
        ['query']
        >>> covering_names(["a.query"], ["a.query", "b.query", "a.key"])
        ['a.query']
    """
    wanted = set(modules)
    named_by: dict[str, set[str]] = defaultdict(set)
    for module in {*wanted, *all_modules}:
        for end in _ends(module):
            named_by[end].add(module)
    return sorted({next(e for e in _ends(m) if named_by[e] <= wanted) for m in wanted})


def _ends(module: str) -> list[str]:
    """``"a.b.c"`` -> ``["c", "b.c", "a.b.c"]``."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


@functools.lru_cache(maxsize=65536)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def fault(pattern: str, *, whole: bool) -> str | None:
    """Why a pattern from a file is not matched with anything, None if it can be.

    A group that repeats and holds another repeat, or a choice, can take time exponential in the
    length of a name: ``(a+)+``, ``(a|a)*``. No real adapter needs one.

    Args:
        pattern: The pattern.
        whole: Whether it is matched as it stands, and not as the end of a longer one.
    """
    if len(pattern) > MAX_PATTERN:
        return f"is longer than {MAX_PATTERN} characters"
    try:
        re.compile(pattern if whole else rf"(.*\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError) as error:
        return f"is not a regular expression ({error})"
    if _repeats_a_choice(pattern):
        return "repeats a group that holds a repeat or a choice, which may never end"
    return None


def _repeats_a_choice(pattern: str) -> bool:
    bare = re.sub(r"\\.|\[\^?\]?[^\]]*\]", "x", pattern)  # escapes and classes are one character
    branches = [False]
    closed = False  # whether a group with a repeat or a choice has just ended
    for place, char in enumerate(bare):
        repeats = char in "*+" or (char == "{" and re.match(r"{\d*,\d*}", bare[place:]))
        if repeats and closed:
            return True
        closed = False
        if char == "(":
            branches.append(False)
        elif char == ")" and len(branches) > 1:
            closed = branches.pop()
            branches[-1] |= closed
        elif repeats or char == "|":
            branches[-1] = True
    return False
