"""From a config's patterns to the weights that they name; one that names none is an error.

targets=("query",)   ->   {"layers/0/query/kernel": Target(layout=("in", "out"), rank=8, ...)}
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from ._config import ALL_LINEAR, Layout, LoraConfig, Parts, parse_layout
from ._paths import IMPLIED_NAMES, nearest
from ._quantized import is_quantized

_NOT_MATRICES = ("bias", "scale", "mean", "var")
_EMBEDDINGS = re.compile(r"embed|^wte$|^wpe$")
_HEADS = ("lm_head", "classifier", "score", "qa_outputs", "head", "heads", "logits", "output_head")


class Target(NamedTuple):
    """One weight to adapt: its layout, its own rank and alpha, and the scale they make.

    ``parts`` says which of the equal parts of the out axis get factors; None, the whole weight.
    """

    layout: Layout
    rank: int
    alpha: float
    scale: float
    parts: Parts | None = None


class Selection(NamedTuple):
    """What a config selects among a model's weights."""

    adapted: dict[str, Target]
    trained: tuple[str, ...]


def select(
    weights: Mapping[str, Any], config: LoraConfig, layouts: Mapping[str, Layout] | None = None
) -> Selection:
    """Selects the weights that ``config`` adapts and trains, or says why it cannot.

    Args:
        weights: Path -> array, or anything with ``shape`` and ``dtype``.
        config: The patterns.
        layouts: Path -> layout, as `layouts` measures it. A pattern in ``config.layouts`` wins.

    Raises:
        ValueError: A pattern matches nothing, or a weight cannot be adapted as asked.
    """
    layouts = layouts or {}
    adapted = choose(weights, config.targets, config.exclude, layouts)
    trained = _matched(weights, config.train, "`train` pattern")
    if both := sorted(adapted & trained):
        raise ValueError(
            f"{both[0]!r} is both a target and trained in full. "
            "Name it in `exclude`, or take it out of `train`."
        )
    paths = [path for path in weights if path in adapted]
    for field in ("rank_pattern", "alpha_pattern", "parts"):
        _matched(paths, getattr(config, field), f"`{field}` key", among="adapted weights")
    _matched(weights, config.layouts, "`layouts` key")
    for path in trained:
        _check_trainable(path, weights[path])
    targets = {path: _target(path, weights[path], config, layouts) for path in paths}
    return Selection(targets, tuple(path for path in weights if path in trained))


def choose(
    weights: Mapping[str, Any],
    targets: tuple[str, ...],
    exclude: tuple[str, ...],
    layouts: Mapping[str, Layout],
    excluded_by: str = "exclude",
) -> set[str]:
    """The paths that ``targets`` match and ``exclude`` does not.

    Args:
        weights: Path -> weight.
        targets: Patterns.
        exclude: Patterns.
        layouts: Path -> layout, as far as it is known.
        excluded_by: What users call ``exclude``.

    Raises:
        ValueError: A pattern matches nothing, or ``exclude`` leaves nothing.
    """
    chosen = _matched(weights, (t for t in targets if t != ALL_LINEAR), "Target")
    if ALL_LINEAR in targets:
        chosen |= _all_linear(weights, layouts)
    excluded = _matched(weights, exclude, f"`{excluded_by}` pattern")
    if chosen and not chosen - excluded:
        raise ValueError(
            f"`{excluded_by}` {exclude} leaves none of the {len(chosen)} weights that the "
            f"targets {targets} match. Make one of them narrower."
        )
    return chosen - excluded


def matches(pattern: str, path: str) -> bool:
    """Whether ``pattern`` matches the whole ``path`` or a whole run of its last segments."""
    return _compiled(pattern).fullmatch(path) is not None


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:.*/)?(?:{pattern})(?:/(?:{'|'.join(IMPLIED_NAMES)}))?")


def _matched(
    paths: Iterable[str], patterns: Iterable[str], what: str, *, among: str = "weights"
) -> set[str]:
    """The paths that the patterns match; a pattern that matches none is an error."""
    paths = list(paths)
    found: set[str] = set()
    for pattern in patterns:
        hits = {path for path in paths if matches(pattern, path)}
        if not hits:
            raise ValueError(_no_match(f"{what} {pattern!r}", pattern, paths, among))
        found |= hits
    return found


def _all_linear(weights: Mapping[str, Any], layouts: Mapping[str, Layout]) -> set[str]:
    """Every matrix that the model multiplies by, output head and embeddings excepted."""
    hits = {
        path
        for path, weight in weights.items()
        if len(weight.shape) > 1
        and jnp.issubdtype(weight.dtype, jnp.floating)
        and {"in", "out"} <= set(layouts.get(path, ("in", "out")))
        and not _is_special(path.split("/"))
    }
    if not hits:
        raise ValueError(_no_match(f"Target {ALL_LINEAR!r}", "kernel", list(weights), "weights"))
    return hits


def _is_special(segments: list[str]) -> bool:
    """Whether a weight's name says that it is a bias, a norm, an embedding or the output head."""
    return (
        segments[-1] in _NOT_MATRICES
        or any(_EMBEDDINGS.search(segment) for segment in segments[-2:])
        or any(segment in _HEADS for segment in segments)
    )


def _no_match(what: str, pattern: str, paths: list[str], among: str) -> str:
    near = " or ".join(repr(path) for path in nearest(pattern, paths, 2))
    hint = f"The nearest is {near}." if near else "There are none."
    return f"{what} matches none of the {len(paths)} {among}. {hint}"


def _target(path: str, weight: Any, config: LoraConfig, layouts: Mapping[str, Layout]) -> Target:
    _check_adaptable(path, weight)
    layout = layout_of(path, weight, config.layouts, layouts)
    rank = _first_match(config.rank_pattern, path, config.rank)
    alpha = _first_match(config.alpha_pattern, path, config.alpha)
    parts = _first_match(config.parts, path, None)
    sizes = {kind: _size(weight.shape, layout, kind) for kind in ("in", "out")}
    if parts:
        _check_parts(path, layout, sizes["out"], parts)
        sizes["out"] //= len(parts)
    if rank > min(sizes.values()):
        raise ValueError(
            f"{path!r} is {f'{len(parts)} parts, each ' if parts else ''}a {sizes['in']} by "
            f"{sizes['out']} matrix, so its rank can be at most {min(sizes.values())}, got {rank}. "
            "Lower it in `rank_pattern`, or name the weight in `exclude`."
        )
    return Target(layout, rank, alpha, config.scale(rank, alpha), parts)


def _check_parts(path: str, layout: Layout, size: int, parts: Parts) -> None:
    if layout.count("out") != 1:
        raise ValueError(
            f"{path!r} has {layout.count('out')} out axes (its axes are {' '.join(layout)}), and "
            "`parts` are counted along one. Adapt the whole weight, or reshape it to one out axis."
        )
    if size % len(parts):
        raise ValueError(
            f"The out axis of {path!r} has size {size}, which does not divide into the "
            f"{len(parts)} equal parts of {parts}. Give one True or False for each part."
        )


def layout_of(
    path: str, weight: Any, patterns: Mapping[str, Any], measured: Mapping[str, Any]
) -> Layout:
    """The layout of one weight: that of the first pattern to match it, else the measured one.

    Raises:
        ValueError: There is none for a weight of three axes or more, or it does not fit.
    """
    given = _first_match(patterns, path, measured.get(path))
    if given is None and len(weight.shape) == 2:
        return ("in", "out")
    if given is None:
        raise ValueError(
            f"{path!r} of shape {tuple(weight.shape)} has {len(weight.shape)} axes, and which are "
            "in, out or stacked cannot be told from that. Pass "
            "`layouts=lora_jax.layouts(apply_fn, params, *inputs)`, or name the axes yourself: "
            f"`layouts={{{path!r}: 'stack in out'}}`."
        )
    words = given.split() if isinstance(given, str) else given
    if not {"in", "out"} <= set(words):
        raise ValueError(
            f"{path!r} cannot be chosen: the model never multiplies its input by it "
            f"(its axes are {' '.join(words)}). Take it out of `targets`; a `LoraConfig` can train "
            "it in full."
        )
    layout = parse_layout(words)
    if len(layout) != len(weight.shape):
        raise ValueError(
            f"{path!r} of shape {tuple(weight.shape)} has {len(weight.shape)} axes, but its "
            f"layout {' '.join(layout)!r} names {len(layout)}."
        )
    return layout


def _check_adaptable(path: str, weight: Any) -> None:
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(
            f"{path!r} holds {weight.dtype} and cannot be adapted: only floating-point weights "
            "have gradients. Name it in `exclude`."
        )
    if len(weight.shape) < 2:
        raise ValueError(
            f"{path!r} of shape {tuple(weight.shape)} cannot be adapted: a low-rank update needs "
            "an in and an out axis. Name it in `exclude`, or in `train` to train it in full."
        )


def _check_trainable(path: str, weight: Any) -> None:
    if not jnp.issubdtype(weight.dtype, jnp.floating):
        raise ValueError(
            f"{path!r} holds {weight.dtype} and cannot be trained: only floating-point weights "
            "have gradients. Make the `train` pattern narrower."
        )
    if is_quantized(weight):
        raise ValueError(
            f"{path!r} is quantised and cannot be trained in full: codes have no gradients. Adapt "
            "it as a target, or leave it out when you quantise."
        )


def _first_match(table: Mapping[str, Any], path: str, default: Any) -> Any:
    return next((value for pattern, value in table.items() if matches(pattern, path)), default)


def _size(shape: tuple[int, ...], layout: Layout, kind: str) -> int:
    return math.prod(size for size, axis in zip(shape, layout, strict=True) if axis == kind)
