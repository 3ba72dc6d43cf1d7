"""Rotary position embedding: pairs of features turned by an angle that grows with position.

    (x1, x2) -> (x1 cos t - x2 sin t, x2 cos t + x1 sin t)      t = position * frequency

The pairs are the two halves of a head's features, ``x[i]`` and ``x[i + head_dim / 2]``, as in
checkpoints of the Hugging Face layout. Su et al. 2021 (https://arxiv.org/abs/2104.09864),
section 3.2.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

RopeType = Literal["default", "linear", "llama3"]
_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
_NO_NUMBERS = ("rope_type", "type", "partial_rotary_factor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """The frequencies of a rotary embedding.

    Attributes:
        rope_theta: Base: pair ``i`` turns by ``rope_theta ** (-2 i / head_dim)`` a position.
        rope_type: ``"default"`` takes them as they are; ``"linear"`` divides all by ``factor``
            (Chen et al. 2023, https://arxiv.org/abs/2306.15595); ``"llama3"`` divides the slow
            ones, keeps the fast ones and interpolates between (Llama 3.1's model card).
        factor: By how much longer the context is than the one trained on first.
        low_freq_factor: Slow is what turns less than this many times in the first context.
        high_freq_factor: Fast is what turns more than this many times in it.
        original_max_position_embeddings: Length of the first context, in positions.
    """

    rope_theta: float
    rope_type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        if self.rope_type not in get_args(RopeType):
            raise ValueError(
                f"`rope_type` {self.rope_type!r} is not supported; known: {get_args(RopeType)}."
            )
        for name in ("rope_theta", "factor", "low_freq_factor", "original_max_position_embeddings"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"`high_freq_factor` {self.high_freq_factor} must be more than "
                f"`low_freq_factor` {self.low_freq_factor}."
            )


class Angles(NamedTuple):
    """Cosine and sine of every position's angles: ``(B, T, 1, head_dim / 2)`` float32."""

    cos: jax.Array
    sin: jax.Array


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Radians a position of every pair, ``(head_dim / 2,)`` float32, fastest first."""
    plain = rope.rope_theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if rope.rope_type == "llama3":
        turns = rope.original_max_position_embeddings * plain / (2 * math.pi)
        width = rope.high_freq_factor - rope.low_freq_factor
        fast = np.clip((turns - rope.low_freq_factor) / width, 0.0, 1.0)
        plain = plain * (fast + (1.0 - fast) / rope.factor)
    if rope.rope_type == "linear":
        plain = plain / rope.factor
    return plain.astype(np.float32)


def angles(rope: Rope, head_dim: int, positions: jax.Array) -> Angles:
    """The angles of positions, ``(B, T)`` ints."""
    turn = positions.astype(jnp.float32)[..., None, None]
    turn = turn * frequencies(rope, head_dim)[None, None, None, :]
    return Angles(jnp.cos(turn), jnp.sin(turn))


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """Turns ``x (B, T, heads, head_dim)`` by its positions' angles, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (
        first * angles.cos - second * angles.sin,
        second * angles.cos + first * angles.sin,
    )
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def read_rope(found: Mapping[str, Any], *, theta: float, max_positions: int) -> Rope:
    """The frequencies that a dictionary of ``config.json`` describes.

    Args:
        found: ``rope_scaling`` or ``rope_parameters``; old files write ``type`` for
            ``rope_type``.
        theta: Where it has no ``rope_theta`` of its own.
        max_positions: Length of the first context where it does not say.

    Raises:
        ValueError: Its type is unknown, or a key is missing, unknown or not a number.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"Rotary embedding: it must be an object, got {found!r:.80}.")
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in tuple(_KEYS):  # a tuple: what JSON holds may not hash
        raise ValueError(f"`rope_type` {kind!r:.80} is not supported; known: {tuple(_KEYS)}.")
    if found.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError("`partial_rotary_factor` must be 1.0: heads are turned whole.")
    numbers: dict[str, Any] = {"rope_theta": theta}
    numbers |= {name: value for name, value in found.items() if name not in _NO_NUMBERS}
    if kind == "llama3":
        numbers.setdefault("original_max_position_embeddings", max_positions)
    needed = {"rope_theta", *_KEYS[kind]}
    if odd := sorted(numbers.keys() ^ needed):
        raise ValueError(f"Rotary embedding of type {kind!r}: {odd} are missing or unknown.")
    for name, value in numbers.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or abs(value) > sys.float_info.max:
            raise ValueError(f"Rotary embedding: `{name}` must be a number, got {value!r:.80}.")
    return Rope(rope_type=kind, **numbers)


def rope_fields(rope: Rope) -> dict[str, Any]:
    """``rope_parameters`` of a ``config.json``: `read_rope` backwards."""
    kept = ("rope_type", "rope_theta", *_KEYS[rope.rope_type])
    return {name: getattr(rope, name) for name in kept}
