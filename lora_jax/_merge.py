"""Merging: the factors folded into the weights they adapt.

merge:     w + scale * a @ b      plain weights, for the unmodified model
unmerge:   w - scale * a @ b      back to the frozen half
"""

import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.core import Tracer

from ._partition import _frozen_leaves
from ._paths import flatten, nearest
from ._quantized import is_quantized
from ._weights import Factors, delta

Tree = TypeVar("Tree")


class DequantizedMergeWarning(UserWarning):
    """An update was merged into a dequantised weight: the base's quantisation error stays in it."""


def merge(
    frozen: Tree, trainable: Mapping[str, Any], *, dtype: Any = None, base: Any = None
) -> Tree:
    """Folds the trainable half into the frozen one: plain weights, as they were before `split`.

    Computed in float32 and rounded once, to the dtype of the weight. In bfloat16 an update below
    about ``w / 256`` is therefore lost: ``dtype=jnp.float32`` keeps it.

    Args:
        frozen: The frozen half of `split`.
        trainable: The trainable half.
        dtype: Of all merged weights of a float dtype; None keeps each weight's own.
        base: The parameters as they were before `quantize`, for a quantised ``frozen``: its
            quantised weights are replaced by these. None dequantises them, and warns.

    Returns:
        The structure and shapes of the original parameters, and their dtypes if ``dtype`` is
        None. A weight whose update is zero then comes back bit for bit.

    Raises:
        ValueError: The halves do not belong together, nor ``base`` to them, ``dtype`` is not a
            float dtype, or a merged weight is not finite (checked on concrete arrays; under a
            transformation there are no values to check).

    Warns:
        DequantizedMergeWarning: Weights are quantised and there is no ``base``.
    """
    check_float(dtype)
    leaves, treedef = _frozen_leaves(frozen, trainable)
    leaves = plain_leaves(leaves, base)
    merged = (merge_leaf(path, w, trainable.get(path), dtype) for path, w in leaves.items())
    return treedef.unflatten(merged)


def plain_leaves(leaves: Mapping[str, Any], base: Any) -> dict[str, Any]:
    """Replaces quantised weights by those of ``base``; without it they stay, to be dequantised.

    Args:
        leaves: Path -> weight.
        base: A tree that has them in full precision, or None.

    Raises:
        ValueError: ``base`` lacks one of them, or has it quantised, of another shape or no floats.

    Warns:
        DequantizedMergeWarning: Weights are quantised and there is no ``base``.
    """
    quantized = [path for path, leaf in leaves.items() if is_quantized(leaf)]
    if not quantized:
        return dict(leaves)
    if base is None:
        warnings.warn(
            f"{len(quantized)} weights are quantised, {quantized[0]!r} first: merging into their "
            "dequantised values. Pass the original weights as `base` to merge into those.",
            DequantizedMergeWarning,
            stacklevel=3,
        )
        return dict(leaves)
    found, _ = flatten(base)
    for path in quantized:
        weight = found.get(path)
        if weight is None or not _is_plain(weight) or weight.shape != leaves[path].shape:
            problem = "has no such weight" if weight is None else "has it " + _described(weight)
            raise ValueError(
                f"{path!r} is quantised, of shape {leaves[path].shape}, and `base` {problem}. "
                "Pass the parameters that were quantised."
            )
    return {path: found[path] if path in quantized else leaf for path, leaf in leaves.items()}


def _is_plain(weight: Any) -> bool:
    is_array = hasattr(weight, "shape") and not is_quantized(weight)
    return is_array and jnp.issubdtype(weight.dtype, jnp.floating)


def _described(weight: Any) -> str:
    if is_quantized(weight):
        return "quantised too"
    if not hasattr(weight, "shape"):
        return f"as a {type(weight).__name__}"
    return f"as {weight.dtype} of shape {tuple(weight.shape)}"


def merge_leaf(path: str, w: Any, trained: Any, dtype: Any = None) -> Any:
    """One leaf of the merged tree.

    Args:
        path: Its path.
        w: The frozen leaf; None where it trains in full.
        trained: What trains of it: `Factors`, the whole weight, or None for nothing.
        dtype: As `merge` takes it.

    Raises:
        ValueError: The merged weight is not finite.
    """
    if isinstance(trained, Factors):
        merged = merge_weight(w, trained, dtype=dtype)
    elif is_quantized(w):
        merged = w.astype(w.dtype if dtype is None else dtype).dequantize()
    else:
        merged = _cast(w if trained is None else trained, dtype)
    if merged is not w:
        _check_finite(path, merged)
    return merged


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
        is_adapted = isinstance(factors, Factors)
        leaves[path] = merge_weight(leaves[path], factors, sign=-1) if is_adapted else None
    return treedef.unflatten(leaves.values())


def merge_weight(w: Any, factors: Factors, sign: int = 1, dtype: Any = None) -> jax.Array:
    """``w + sign * scale * a @ b``, rounded once.

    Computed in float32, or in float64 where the weight or its factors have it. The result has
    ``dtype``, or that of ``w`` if None. Codes are dequantised to the wide dtype first.
    """
    dtypes = (w.dtype, factors.a.dtype, factors.b.dtype)
    wide = jnp.float64 if jnp.float64 in dtypes else jnp.float32
    update = sign * delta(jax.tree.map(lambda factor: factor.astype(wide), factors.whole()))
    dtype = w.dtype if dtype is None else dtype
    base = w.astype(wide)
    if is_quantized(base):
        base = base.dequantize()
    merged = (base + update).astype(dtype)
    lost_sign = (merged == 0) & (update == 0) & jnp.signbit(base)  # -0.0 + 0.0 is 0.0
    return jnp.where(lost_sign, base.astype(dtype), merged)


def check_float(dtype: Any) -> None:
    """Refuses a dtype that weights cannot be rounded to.

    Raises:
        ValueError: It is neither None nor a float dtype, or jax would narrow it.
    """
    if dtype is None:
        return
    try:
        is_float = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        is_float = False
    if not is_float:
        raise ValueError(f"`dtype` must be a float dtype such as jnp.bfloat16, got {dtype!r}.")
    if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
        raise ValueError(f"`dtype` {jnp.dtype(dtype).name} needs jax_enable_x64, which is off.")


def _cast(leaf: Any, dtype: Any) -> Any:
    is_float = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    if dtype is None or not is_float or leaf.dtype == dtype:
        return leaf
    return leaf.astype(dtype)


def _check_finite(path: str, weight: Any) -> None:
    if isinstance(weight, Tracer) or not hasattr(weight, "dtype"):
        return
    if not jnp.isfinite(weight).all():
        raise ValueError(
            f"{path!r} is not finite after merging in {weight.dtype}. Its factors have diverged, "
            "or the sum leaves the range of the dtype: merge an earlier checkpoint, or with "
            "dtype=jnp.float32."
        )
