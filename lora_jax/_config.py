"""Which weights to adapt, and how much: ``LoraConfig``, checked when it is made."""

import dataclasses
import math
import numbers
import re
from collections.abc import Iterable, Mapping
from typing import Literal, cast, get_args

AxisKind = Literal["stack", "in", "out"]
Layout = tuple[AxisKind, ...]
"""What each axis of a weight does: ``in`` is contracted with the input, ``out`` is produced,
``stack`` counts independent weights (scanned layers, experts)."""

Parts = tuple[bool, ...]
"""Which of the equal parts that a weight's out axis falls into get factors."""

ALL_LINEAR = "all-linear"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adaptation of chosen weights: ``w + alpha / rank * a @ b`` (arXiv 2106.09685, 4.1).

    A *pattern* is a regular expression that matches a weight's whole path or a whole run of its
    last segments; a last ``kernel``, ``embedding`` or ``weight`` may be left out. ``"query"``,
    ``"attention/(query|value)"`` and ``"layers/[0-3]/.*/kernel"`` are patterns.

    Attributes:
        rank: Inner dimension of every adapter.
        alpha: Numerator of the update's scale.
        targets: Patterns of the weights to adapt. ``"all-linear"`` is every matrix that the model
            multiplies by, output head and embeddings excepted. Empty only if ``train`` is not.
        exclude: Patterns of weights that no target adapts.
        rank_pattern: Pattern -> rank, for the adapted weights that it matches. The first match in
            the mapping's order wins.
        alpha_pattern: Pattern -> alpha, likewise.
        use_rslora: Scale by ``alpha / sqrt(rank)`` (arXiv 2312.03732) in place of ``alpha / rank``.
        dropout: Probability of dropping an entry of a product's input before it meets the
            factors, in ``[0, 1)``. Active only where `combine` is given a key.
        train: Patterns of the weights to train in full: heads, biases, norms.
        layouts: Pattern -> what each axis does, as ``"in out"`` or ``"stack in out"``, for the
            weights whose layout is neither measured by `layouts` nor plain ``(in, out)``.
        parts: Pattern -> which of the equal parts of the out axis to adapt, for weights that
            are several matrices side by side. ``{"attention/qkv": (True, False, True)}`` gives
            query and value factors of their own, of ``rank`` each, and key none.

    Raises:
        ValueError: A value is out of its range, or a pattern is not a regular expression.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    dropout: float = 0.0
    train: tuple[str, ...] = ()
    layouts: Mapping[str, str | Layout] = dataclasses.field(default_factory=dict)
    parts: Mapping[str, Parts] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for field in ("targets", "exclude", "train"):
            object.__setattr__(self, field, _patterns(field, getattr(self, field)))
        for field in ("rank_pattern", "alpha_pattern", "layouts", "parts"):
            object.__setattr__(self, field, dict(getattr(self, field)))
            _patterns(field, getattr(self, field))
        for rank in (self.rank, *self.rank_pattern.values()):
            if not isinstance(rank, numbers.Integral) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"`rank` must be an integer of at least 1, got {rank!r}.")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not (_is_number(alpha) and alpha > 0 and math.isfinite(alpha)):
                raise ValueError(f"`alpha` must be positive and finite, got {alpha!r}.")
        if not (_is_number(self.dropout) and 0 <= self.dropout < 1):
            raise ValueError(f"`dropout` must be in [0, 1), got {self.dropout!r}.")
        if not self.targets and not self.train:
            raise ValueError("Nothing would train: give `targets` to adapt or weights to `train`.")
        for pattern, layout in self.layouts.items():
            self.layouts[pattern] = parse_layout(layout)  # type: ignore[index]
        for pattern, parts in self.parts.items():
            self.parts[pattern] = _parse_parts(pattern, parts)  # type: ignore[index]

    def scale(self, rank: int, alpha: float) -> float:
        """The factor of ``a @ b``: ``alpha / rank``, or ``alpha / sqrt(rank)`` with rsLoRA."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def parse_layout(layout: str | Iterable[str]) -> Layout:
    """Reads ``"stack in out"`` (or the words in a sequence) as a `Layout`.

    Raises:
        ValueError: A word is none of ``stack``, ``in`` and ``out``, or ``in`` or ``out`` lacks.
    """
    words = tuple(layout.split() if isinstance(layout, str) else layout)
    known = get_args(AxisKind)
    if unknown := [word for word in words if word not in known]:
        raise ValueError(f"Layout {layout!r} has {unknown[0]!r}; an axis is one of {known}.")
    if not {"in", "out"} <= set(words):
        raise ValueError(f"Layout {layout!r} needs at least one 'in' and one 'out' axis.")
    return cast(Layout, words)


def _parse_parts(pattern: str, parts: object) -> Parts:
    flags = tuple(parts) if isinstance(parts, list | tuple) else ()
    if not any(flags) or not all(isinstance(flag, bool) for flag in flags):
        raise ValueError(
            f"`parts` of {pattern!r} must be True or False for each part, at least one of them "
            f"True, got {parts!r}."
        )
    return flags


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _patterns(field: str, patterns: str | Iterable[str]) -> tuple[str, ...]:
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern:
            raise ValueError(f"`{field}` holds {pattern!r}; a pattern is a non-empty string.")
        try:
            re.compile(f"(?:{pattern})")  # as it will be matched, inside a longer one
        except re.error as error:
            raise ValueError(
                f"`{field}` holds {pattern!r}, which is not a regular expression: {error}."
            ) from None
    return patterns
