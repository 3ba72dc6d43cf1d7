"""The key-value cache: what decoding has computed already, as one tree of arrays.

    slot         0      1      2      3      4           S = 5 slots
    tokens       pad    the    cat    sat                length = 4
    valid        False  True   True   True   False
    positions    0      0      1      2      0

Every call writes its T tokens to the slots ``length`` to ``length + T`` of every row, so rows
stay aligned and one compiled step serves all of them. Prompts are therefore padded at the left.
Rows are reordered by `jax.tree.map` over the batch axis: axis 1 of keys and values, axis 0 of
``valid`` and ``positions``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike


class Cache(NamedTuple):
    """Keys and values of every layer, and which token each slot holds.

    Attributes:
        key: ``(layers, B, S, kv_heads, head_dim)``, after the rotary embedding if there is one.
        value: Likewise.
        valid: ``(B, S)`` bool: whether the slot holds a token that may be attended to.
        positions: ``(B, S)`` int32: the token's position in its row.
        length: ``()`` int32: how many slots are taken, the same in every row.
    """

    key: jax.Array
    value: jax.Array
    valid: jax.Array
    positions: jax.Array
    length: jax.Array


def init_cache(config: Any, batch: int, length: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """An empty cache.

    Args:
        config: A decoder's config; ``num_hidden_layers``, ``num_key_value_heads``, ``head_dim``
            and ``max_length`` are read.
        batch: Rows.
        length: Slots of each row: the padded prompt and all tokens to come.
        dtype: Of keys and values.

    Raises:
        ValueError: ``length`` is more than the model has positions for, or not positive.
    """
    if not 1 <= length <= config.max_length:
        raise ValueError(
            f"A cache needs between 1 and {config.max_length} slots, the positions that the "
            f"model has; got {length}."
        )
    shape = (config.num_hidden_layers, batch, length, config.num_key_value_heads, config.head_dim)
    return Cache(
        key=jnp.zeros(shape, dtype),
        value=jnp.zeros(shape, dtype),
        valid=jnp.zeros((batch, length), bool),
        positions=jnp.zeros((batch, length), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


def reserve(cache: Cache, kept: jax.Array, positions: jax.Array) -> Cache:
    """Gives T new tokens their slots: the first thing that a call does.

    Args:
        cache: With ``length`` slots taken.
        kept: ``(B, T)`` bool: False where padded.
        positions: ``(B, T)`` int32.

    Returns:
        The cache with ``length + T`` slots taken, whose keys and values `store` fills in.

    Raises:
        ValueError: The tokens do not fit, as far as that is known while tracing. Where
            ``length`` is traced `store` makes what does not fit NaN.
    """
    slots, new = cache.valid.shape[1], kept.shape[1]
    taken = 0 if isinstance(cache.length, Tracer) else int(cache.length)
    if taken + new > slots:
        raise ValueError(
            f"{new} tokens do not fit into a cache of {slots} slots, {taken} of them taken: "
            "make it longer."
        )
    return cache._replace(
        valid=lax.dynamic_update_slice_in_dim(cache.valid, kept, cache.length, axis=1),
        positions=lax.dynamic_update_slice_in_dim(cache.positions, positions, cache.length, axis=1),
        length=cache.length + new,
    )


def store(
    cache: Cache, layer: int | jax.Array, key: jax.Array, value: jax.Array
) -> tuple[Cache, jax.Array, jax.Array]:
    """Writes one layer's new keys and values into the slots that `reserve` gave.

    Args:
        cache: After `reserve`.
        layer: Its index, which may be traced.
        key: ``(B, T, kv_heads, head_dim)`` of the new tokens.
        value: Likewise.

    Returns:
        The cache, and all of the layer's keys and values, ``(B, S, kv_heads, head_dim)``, in
        the dtypes of ``key`` and ``value``. If the slots overflow, values are NaN.
    """
    fits = cache.length <= cache.valid.shape[1]
    zero = jnp.zeros((), jnp.int32)
    start = (jnp.asarray(layer, jnp.int32), zero, cache.length - key.shape[1], zero, zero)

    def write(held: jax.Array, new: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(held, new.astype(held.dtype)[None], start)

    cache = cache._replace(
        key=write(cache.key, key),
        value=write(cache.value, jnp.where(fits, value, jnp.nan)),
    )
    whole = (
        lax.dynamic_index_in_dim(held, layer, keepdims=False).astype(new.dtype)
        for held, new in ((cache.key, key), (cache.value, value))
    )
    return cache, *whole
