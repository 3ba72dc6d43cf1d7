"""Merging: the factors folded into the weights they adapt.

merge:     w + scale * a @ b      plain weights, for the unmodified model
unmerge:   w - scale * a @ b      back to the frozen half
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ._partition import _frozen_leaves
from ._paths import flatten, nearest
from ._weights import LoraFactors, delta

Tree = TypeVar("Tree")


def merge(frozen: Tree, trainable: Mapping[str, Any]) -> Tree:
    """Folds the trainable half into the frozen one: plain weights, as they were before `split`.

    Computed in float32 and rounded once, to the dtype of the weight. In bfloat16 an update below
    about ``w / 256`` is therefore lost: merge into float32 weights to keep it.

    Args:
        frozen: The frozen half of `split`.
        trainable: The trainable half.

    Returns:
        The structure, shapes and dtypes of the original parameters. A weight whose update is
        zero comes back bit for bit.

    Raises:
        ValueError: The halves do not belong together, or a merged weight is not finite (checked
            on concrete arrays; under a transformation there are no values to check).
    """
    leaves, treedef = _frozen_leaves(frozen, trainable)
    for path, factors in trainable.items():
        w = leaves[path]
        merged = merge_weight(w, factors) if isinstance(factors, LoraFactors) else factors
        _check_finite(path, merged)
        leaves[path] = merged
    return treedef.unflatten(leaves.values())


def unmerge(params: Tree, trainable: Mapping[str, Any]) -> Tree:
    """Takes the update out of merged weights again: the frozen half that `merge` was given.

    Exact up to the two roundings to the weight's dtype.

    Args:
        params: What `merge` returned.
        trainable: The trainable half it was given.

    Raises:
        ValueError: A weight that trains is not in ``params``.
    """
    leaves, treedef = flatten(params)
    for path, factors in trainable.items():
        if path not in leaves:
            raise ValueError(
                f"{path!r} trains, but the merged tree has no such weight. "
                f"The nearest is {' or '.join(map(repr, nearest(path, leaves)))}."
            )
        is_adapted = isinstance(factors, LoraFactors)
        leaves[path] = merge_weight(leaves[path], factors, sign=-1) if is_adapted else None
    return treedef.unflatten(leaves.values())


def merge_weight(w: jax.Array, factors: LoraFactors, sign: int = 1) -> jax.Array:
    """``w + sign * scale * a @ b``, in the factors' dtype, rounded once to the dtype of ``w``."""
    update = sign * delta(factors)
    merged = (w.astype(update.dtype) + update).astype(w.dtype)
    lost_sign = (merged == 0) & (update == 0) & jnp.signbit(w)  # -0.0 + 0.0 is 0.0
    return jnp.where(lost_sign, w, merged)


def _check_finite(path: str, weight: Any) -> None:
    if isinstance(weight, Tracer) or not hasattr(weight, "dtype"):
        return
    if not jnp.isfinite(weight).all():
        raise ValueError(
            f"{path!r} is not finite after merging in {weight.dtype}. Its factors have diverged, "
            "or the sum leaves the range of the dtype: merge an earlier checkpoint, or into "
            "float32 weights."
        )
