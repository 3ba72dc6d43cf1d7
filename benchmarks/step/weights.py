"""Random weights of a model, drawn on the device one by one, and quantised there where asked.

A weight is dropped before the next one is drawn, so the device holds what it holds in the end and
one weight in full precision: a model of 8B parameters in nf4 never exists in bfloat16.
"""

import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import ops

from .cases import STD

# The fast generator of the hardware: threefry needs as much memory again as the largest weight.
KEY = "rbg"


def random_weights(abstract: Any, scheme: str | None, places: Any = None) -> Any:
    """Weights in place of shapes.

    Args:
        abstract: A tree of shapes, quantised weights among them.
        scheme: That of the quantised ones.
        places: A sharding for each array, as `lora_jax.training.placements` gives them; each is
            drawn there, and one of codes goes there before the next is drawn. None is the
            default device.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=_is_quantized)
    where = [None] * len(leaves)
    if places is not None:
        where = jax.tree.leaves(places, is_leaf=_is_quantized)
    # The largest first: what drawing takes beside a weight is then taken while there is room.
    order = sorted(range(len(leaves)), key=lambda index: -leaves[index][1].size)
    drawn = {index: _weight(*leaves[index], scheme, where[index]) for index in order}
    return treedef.unflatten(drawn[index] for index in range(len(leaves)))


def _weight(path: tuple, leaf: Any, scheme: str | None, place: Any) -> Any:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    key = jax.random.key(zlib.crc32(name.encode()), impl=KEY)
    what = name.rpartition("/")[2], leaf.shape, jnp.dtype(leaf.dtype)
    if not _is_quantized(leaf):
        return jax.block_until_ready(_drawer(place)(key, *what))
    codes = ops.quantize_weight(_drawer(None)(key, *what), leaf.layout, scheme or "")
    return jax.block_until_ready(codes if place is None else jax.device_put(codes, place))


@functools.cache
def _drawer(place: jax.sharding.Sharding | None) -> Any:
    """`_draw` to a place."""
    return jax.jit(_draw, static_argnums=(1, 2, 3), out_shardings=place)


def _draw(key: jax.Array, kind: str, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Ones of a scale, zeros of a bias, normal otherwise."""
    if kind in ("scale", "bias"):
        return jnp.full(shape, kind == "scale", dtype)
    return STD * jax.random.normal(key, shape, dtype)


def _is_quantized(leaf: Any) -> bool:
    return hasattr(leaf, "codes")
