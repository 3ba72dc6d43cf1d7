"""One contraction of two arrays whose axes have names: ``einsum`` as a single ``dot_general``.

contract(x, ["t", "in"], a, ["in", "rank"], ["t", "rank"])   ==   x @ a
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax import lax

Axes = Sequence[Hashable]


def contract(
    x: jax.Array,
    x_axes: Axes,
    y: jax.Array,
    y_axes: Axes,
    out_axes: Axes,
    *,
    precision: Any = None,
    dtype: Any = None,
    place: Callable[[Axes], Any] | None = None,
) -> jax.Array:
    """Contracts ``x`` and ``y`` over the axes that ``out_axes`` does not name.

    Args:
        x: An array with one axis for each name in ``x_axes``.
        x_axes: Its names, each once.
        y: The other array.
        y_axes: Its names, each once.
        out_axes: Names of the result's axes, in order; each stands in ``x_axes`` or ``y_axes``.
        precision: As in ``jax.lax.dot_general``.
        dtype: Of the accumulation and the result, ``preferred_element_type``.
        place: Names of axes, in order -> the sharding of an array that has these: where the result
            is, on a mesh with explicit axes. None, and a None that it gives, leave it to JAX.
    """
    x, x_axes = _sum_out(x, x_axes, {*y_axes, *out_axes})
    y, y_axes = _sum_out(y, y_axes, {*x_axes, *out_axes})
    if list(out_axes[-1:]) == list(x_axes[-1:]) and x_axes[-1] not in y_axes:
        x, x_axes, y, y_axes = y, y_axes, x, x_axes
    shared = [name for name in x_axes if name in y_axes]
    batch = [name for name in shared if name in out_axes]
    summed = [name for name in shared if name not in out_axes]
    made = [*batch, *(name for name in (*x_axes, *y_axes) if name not in shared)]
    result = lax.dot_general(
        x,
        y,
        (
            ([x_axes.index(n) for n in summed], [y_axes.index(n) for n in summed]),
            ([x_axes.index(n) for n in batch], [y_axes.index(n) for n in batch]),
        ),
        precision=precision,
        preferred_element_type=dtype,
        out_sharding=place(made) if place else None,
    )
    order = [made.index(name) for name in out_axes]
    return result if order == sorted(order) else lax.transpose(result, order)


def _sum_out(x: jax.Array, axes: Axes, wanted: set[Hashable]) -> tuple[jax.Array, list[Hashable]]:
    """Sums ``x`` over the axes that nothing else names."""
    lone = [i for i, name in enumerate(axes) if name not in wanted]
    kept = [name for name in axes if name in wanted]
    return (x.sum(lone) if lone else x), kept
