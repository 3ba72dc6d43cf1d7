"""Quantising: chosen weights of a tree become codes, and plain weights come back.

quantize:     w  ->  QuantizedWeight       one weight at a time, a stacked one a layer at a time
dequantize:   QuantizedWeight  ->  w
"""

import functools
import math
import numbers
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from ..._config import ALL_LINEAR, Layout, _patterns, parse_layout
from ..._paths import flatten
from ..._quantized import QuantizedWeight, is_quantized, matrices_of
from ..._targets import _matched, choose, layout_of
from ..._weights import Factors, is_node
from ._fp8 import Fp8Weight
from ._int8 import Int8Weight
from ._nf4 import Nf4Weight

Tree = TypeVar("Tree")

SCHEMES = MappingProxyType({"nf4": Nf4Weight, "int8": Int8Weight, "fp8": Fp8Weight})
"""Name -> the class of its weights."""

_BLOCK, _DOUBLE = 64, True
_LARGEST = 1e30  # sums of as many blocks as fit into memory, and reciprocals, are still float32


def quantize(
    params: Tree,
    scheme: str = "nf4",
    *,
    block: int = _BLOCK,
    double: bool = _DOUBLE,
    targets: str | Iterable[str] = (ALL_LINEAR,),
    exclude: str | Iterable[str] = (),
    layouts: Mapping[str, str | Layout] | None = None,
) -> Tree:
    """Quantises chosen weights; everything else stays the array that it was.

    Functions that `adapt` has lifted take the result in place of ``params``, and so does `split`.
    The codes are computed where each weight is; beside it and its codes the device holds what one
    layer of one weight needs.

    Args:
        params: A tree of arrays, on the host or on devices. Not yet split.
        scheme: ``"nf4"`` (4.13 bits an entry; 4.5 without ``double``), ``"int8"`` or ``"fp8"``.
        block: Of nf4: entries that share a scale, even; 64 is the paper's.
        double: Of nf4: whether the scales are quantised too.
        targets: Patterns of the weights, as in `LoraConfig`.
        exclude: Patterns of weights that no target quantises.
        layouts: Path -> layout, as `lora_jax.layouts` measures it, or pattern -> words, such as
            ``"stack in out"``: needed for weights of three axes or more. Words win.

    Returns:
        The structure of ``params``, a `QuantizedWeight` in place of each chosen weight.

    Raises:
        ValueError: A pattern matches nothing; a chosen weight is no matrix of floats, is not
            finite (checked on concrete arrays), or is quantised or adapted already; the scheme
            is unknown or takes no such option; nf4 of a weight, or a stack, that is cut
            along explicit axes.

    Example:
        >>> params = {"query": {"kernel": jnp.eye(64), "bias": jnp.zeros(64)}}
        >>> codes = quantize(params)["query"]["kernel"]
        >>> codes.shape, codes.dtype, codes.nbytes
        ((64, 64), dtype('float32'), 2120)
        >>> bool((codes.dequantize() == jnp.eye(64)).all())
        True
    """
    _check_options(scheme, block, double)
    leaves, treedef = flatten(params, is_leaf=lambda leaf: is_node(leaf) or _is_factors(leaf))
    if adapted := [path for path, leaf in leaves.items() if is_node(leaf) or _is_factors(leaf)]:
        raise ValueError(
            f"{adapted[0]!r} is adapted already. Quantise the plain parameters, then split them."
        )
    weights = {path: leaf for path, leaf in leaves.items() if hasattr(leaf, "dtype")}
    chosen = _choose(weights, targets, exclude, layouts or {})
    codes = {
        path: _encode(repr(path), weights[path], layout, scheme, block, double)
        for path, layout in chosen.items()
    }
    return treedef.unflatten((leaves | codes).values())


def dequantize(tree: Tree) -> Tree:
    """Gives plain weights back: of the original shapes and dtypes, with the codes' values.

    Args:
        tree: Any tree with quantised weights in it, frozen or combined ones too. Other leaves
            are returned as they are.
    """
    return jax.tree.map(
        lambda leaf: _dequantize(leaf) if is_quantized(leaf) else leaf, tree, is_leaf=is_quantized
    )


def quantize_weight(
    weight: Any,
    layout: str | Layout,
    scheme: str = "nf4",
    *,
    block: int = _BLOCK,
    double: bool = _DOUBLE,
) -> QuantizedWeight:
    """Quantises one weight. Runs under `jax.jit`, and under `jax.eval_shape` on mere shapes.

    Args:
        weight: A JAX or NumPy array of any float dtype. float64 is rounded to float32 first, and
            given back as float64.
        layout: What each axis does, as words or one by one.
        scheme: As in `quantize`, like the rest.
        block: Of nf4.
        double: Of nf4.

    Raises:
        ValueError: As in `quantize`.
    """
    _check_options(scheme, block, double)
    return _encode("The weight", weight, parse_layout(layout), scheme, block, double)


def _check_options(scheme: str, block: int, double: bool) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"`scheme` is one of {', '.join(SCHEMES)}, got {scheme!r}.")
    if scheme != "nf4" and (block, double) != (_BLOCK, _DOUBLE):
        raise ValueError(
            f"{scheme} has one scale for each output, so `block` ({block}) and `double` ({double}) "
            "mean nothing to it. Leave them out."
        )
    if not isinstance(block, numbers.Integral) or block < 2 or block % 2:
        raise ValueError(f"`block` must be an even number of at least 2, got {block!r}.")
    if not isinstance(double, bool):
        raise ValueError(f"`double` must be True or False, got {double!r}.")


def _choose(
    weights: Mapping[str, Any],
    targets: str | Iterable[str],
    exclude: str | Iterable[str],
    layouts: Mapping[str, str | Layout],
) -> dict[str, Layout]:
    """The chosen weights and their layouts, in the tree's order."""
    targets, exclude = _patterns("targets", targets), _patterns("exclude", exclude)
    if not targets:
        raise ValueError("`targets` is empty: name the weights to quantise.")
    words = {pattern: given for pattern, given in layouts.items() if isinstance(given, str)}
    measured = {path: given for path, given in layouts.items() if not isinstance(given, str)}
    _matched(weights, _patterns("layouts", words), "`layouts` key")
    chosen = choose(weights, targets, exclude, measured)
    return {
        path: layout_of(path, _matrix(path, weight), words, measured)
        for path, weight in weights.items()
        if path in chosen
    }


def _matrix(path: str, weight: Any) -> Any:
    """The weight, if it can be quantised."""
    _check_kind(repr(path), weight)
    if len(weight.shape) < 2:
        raise ValueError(
            f"{path!r} of shape {tuple(weight.shape)} cannot be quantised: blocks need an in and "
            "an out axis. Name it in `exclude`."
        )
    return weight


def _check_kind(name: str, weight: Any) -> None:
    if is_quantized(weight):
        raise ValueError(f"{name} is quantised already. Exclude it, or dequantise it first.")
    if not hasattr(weight, "dtype") or not jnp.issubdtype(weight.dtype, jnp.floating):
        held = getattr(weight, "dtype", type(weight).__name__)
        raise ValueError(f"{name} holds {held} and cannot be quantised: only floats can.")


def _encode(
    name: str, weight: Any, layout: Layout, scheme: str, block: int, double: bool
) -> QuantizedWeight:
    _check_kind(name, weight)
    if len(layout) != len(weight.shape) or not weight.size:
        raise ValueError(
            f"{name} of shape {tuple(weight.shape)} cannot be quantised with the layout "
            f"{' '.join(layout)!r}: it takes an axis for each word, and none of size 0."
        )
    cut = jax.typeof(weight).sharding.spec  # known on a mesh with explicit axes alone
    wrong = [kind for kind, places in zip(layout, cut, strict=False) if places is not None]
    if "stack" in wrong or (scheme == "nf4" and wrong):
        raise ValueError(
            f"{name} is cut as {cut} on a mesh with explicit axes. There nf4 needs the whole "
            "weight, and every scheme whole stacked axes: call jax.sharding.reshard(weight, P()) "
            "first, or make the mesh with Auto axes."
        )
    codes, largest = _encode_stack(weight, layout, scheme, int(block), double)
    # A NaN is not at most anything.
    if not isinstance(largest, Tracer) and not largest <= _LARGEST:
        raise ValueError(
            f"{name} has a value that is not finite or beyond ±{_LARGEST:.0e}, and would quantise "
            "to nothing of use. Look at where it comes from."
        )
    return codes


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _encode_stack(
    weight: jax.Array, layout: Layout, scheme: str, block: int, double: bool
) -> tuple[QuantizedWeight, jax.Array]:
    """The codes, each stacked weight's computed after the other's, and the largest magnitude."""
    axes = range(weight.ndim)
    first = [axis for axis in axes if layout[axis] == "stack"]
    rest = [axis for axis in axes if layout[axis] != "stack"]
    stack, sizes = (tuple(weight.shape[axis] for axis in part) for part in (first, rest))
    inner: Layout = tuple(layout[axis] for axis in rest)
    options: dict[str, Any] = {"block": block, "double": double} if scheme == "nf4" else {}

    def encode(one: jax.Array) -> tuple[QuantizedWeight, jax.Array]:
        matrix = matrices_of(one, inner)
        fields: dict[str, Any] = {"sizes": sizes, "layout": layout, "dtype": weight.dtype}
        return SCHEMES[scheme].encode(matrix, **fields, **options), jnp.max(jnp.abs(matrix))

    each = jnp.transpose(weight, first + rest).reshape((math.prod(stack), *sizes))
    codes, largest = lax.map(encode, each)
    codes = jax.tree.map(lambda leaf: leaf.reshape((*stack, *leaf.shape[1:])), codes)
    return codes, jnp.max(largest)


@jax.jit
def _dequantize(weight: QuantizedWeight) -> jax.Array:
    return weight.dequantize()


def _is_factors(leaf: Any) -> bool:
    return isinstance(leaf, Factors)
