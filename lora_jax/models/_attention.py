"""Causal attention for decoders: positions, masks, and the call of the fast kernel.

    placed = place(input_ids, attention_mask, positions, segment_ids, cache, max_length=...)
    mask = causal_mask(placed)                          once a call
    x = attend(query, key, value, mask)                 once a layer

Where nothing but the causal order restricts attention there is no mask array at all, and a
kernel may skip the half that nobody sees.
"""

import re
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from lora_jax.models._cache import Cache, reserve
from lora_jax.models._inputs import check_ids, check_length, check_shapes


class Placement(NamedTuple):
    """Where each token of a batch stands, and with whom.

    Attributes:
        positions: ``(B, T)`` int32, or ``(1, T)`` where all rows are alike.
        in_order: Whether positions are 0, 1, 2, ... in every row.
        kept: ``(B, T)`` bool, False where padded; None if no token is.
        segment_ids: ``(B, T)`` ints; None if a row is one sequence.
        cache: With the tokens' slots reserved; None without one.
    """

    positions: jax.Array
    in_order: bool
    kept: jax.Array | None
    segment_ids: jax.Array | None
    cache: Cache | None


def place(
    input_ids: jax.Array,
    attention_mask: jax.Array | None,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    cache: Cache | None,
    *,
    max_length: int,
) -> Placement:
    """Checks a decoder's inputs and gives every token its position.

    Args:
        input_ids: Ints ``(B, T)``.
        attention_mask: ``(B, T)``, zero where padded; None if nothing is.
        positions: Ints ``(B, T)``; None counts with `count_positions`, in a cache from the
            row's tokens that it holds.
        segment_ids: Ints ``(B, T)``: packed sequences, each one run of an id of its own; 0 is
            padding. None if a row is one sequence.
        cache: What came before; None if nothing did.
        max_length: How many positions the model has.

    Raises:
        ValueError: An input is not of the shape of ``input_ids`` or not of integers, a row is
            longer than ``max_length``, or segments meet a cache.
    """
    _check_inputs(input_ids, attention_mask, positions, segment_ids, cache)
    if positions is None and segment_ids is None:
        check_length(input_ids, max_length)
    kept = _kept(attention_mask, segment_ids)
    in_order = positions is None and kept is None and cache is None
    if positions is None:
        positions = _default_positions(input_ids.shape[1], kept, segment_ids, cache)
    positions = positions.astype(jnp.int32)
    if cache is not None:
        kept = jnp.ones(input_ids.shape, bool) if kept is None else kept
        cache = reserve(cache, kept, jnp.broadcast_to(positions, kept.shape))
    return Placement(positions, in_order, kept, segment_ids, cache)


def count_positions(kept: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """How many kept tokens stand before each token, in its row or in its segment.

        kept           0 0 1 1 1        1 1 1 1 1 0
        segment_ids                     1 1 1 2 2 0
        positions      0 0 0 1 2        0 1 2 0 1 0

    Args:
        kept: ``(B, T)`` bool.
        segment_ids: ``(B, T)`` ints, each segment one run; None if a row is one sequence.

    Returns:
        ``(B, T)`` int32.
    """
    counted = kept.astype(jnp.int32)
    before = jnp.cumsum(counted, axis=1) - counted
    if segment_ids is None:
        return before
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    return before - lax.cummax(jnp.where(starts, before, 0), axis=1)


def causal_mask(placed: Placement, window: int | None = None) -> jax.Array | None:
    """Which keys each query attends to, or None where that is every key up to itself.

    Args:
        placed: The tokens.
        window: How many positions a query sees, its own included; None is all.

    Returns:
        None, for `attend` to be causal by itself, or `explicit_mask`.
    """
    whole = window is None or (placed.in_order and placed.positions.shape[1] <= window)
    plain = placed.kept is None and placed.segment_ids is None and placed.cache is None
    return None if whole and plain else explicit_mask(placed, window)


def explicit_mask(placed: Placement, window: int | None = None) -> jax.Array:
    """Which keys each query attends to, as an array.

    A query sees the kept keys at its own slot and before it, of its own segment, that are
    fewer than ``window`` positions back. A query of padding may see nothing; its result is
    finite and means nothing.

    Returns:
        ``(B, 1, T, S)`` bool; S is T, or with a cache its slots. B is 1 where rows are alike.
    """
    cache, positions = placed.cache, placed.positions
    new = positions.shape[1]
    kept = placed.kept if cache is None else cache.valid
    key_positions = positions if cache is None else cache.positions
    slots = jnp.arange(key_positions.shape[1], dtype=jnp.int32)
    own = jnp.arange(new, dtype=jnp.int32) + (0 if cache is None else cache.length - new)
    mask = (slots[None, :] <= own[:, None])[None]
    if kept is not None:
        mask = mask & kept[:, None, :]
    if (segments := placed.segment_ids) is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    if window is not None:
        mask = mask & (positions[:, :, None] - key_positions[:, None, :] < window)
    return mask[:, None]


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    *,
    scale: float | None = None,
) -> jax.Array:
    """``softmax(scale * query @ key.T) @ value``, softmax in float32.

    Args:
        query: ``(B, T, heads, head_dim)``.
        key: ``(B, S, kv_heads, head_dim)``; each serves ``heads / kv_heads`` queries.
        value: Likewise.
        mask: Of `causal_mask`; None is causal, with T equal to S.
        scale: None is ``head_dim ** -0.5``.

    Returns:
        ``(B, T, heads, head_dim)``.
    """
    fits = fits_cudnn(
        getattr(default_device(), "compute_capability", ""),
        query.dtype,
        query.shape[-1],
        None if mask is None else (query.shape[1], key.shape[1]),
    )
    implementation: Literal["cudnn", "xla"] = "cudnn" if fits else "xla"
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=mask is None,
        scale=scale,
        implementation=implementation,
    )
    return mixed if fits else checkpoint_name(mixed, "attention")  # see `_remat`


def default_device() -> Any:
    """The device of arrays that nobody has placed: that of `jax.default_device`, or the first.

    While tracing this is all that is known of where a computation will run, so who keeps a model
    on the CPU of a machine with a GPU says so by `jax.default_device`.
    """
    chosen = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if chosen is None or isinstance(chosen, str):  # a platform by its name
        return jax.local_devices(backend=chosen)[0]
    return chosen


def fits_cudnn(
    capability: str, dtype: DTypeLike, head_dim: int, masked: tuple[int, int] | None
) -> bool:
    """Whether cuDNN's flash attention takes these shapes, forwards and backwards.

    The limits are those that JAX checks before it calls cuDNN, which raises where they are
    exceeded.

    Args:
        capability: CUDA's name of the device's generation, such as ``"9.0"``; anything else
            for a device that is none of NVIDIA's.
        dtype: Of query, key and value.
        head_dim: Of each head.
        masked: The lengths of query and key if there is a mask array.
    """
    if not re.fullmatch(r"\d+\.\d+", capability):
        return False
    major = int(capability.partition(".")[0])
    return (
        major >= 8
        and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
        and head_dim % 8 == 0
        and head_dim <= (256 if major >= 9 else 128)
        and (masked is None or all(length % 2 == 0 for length in masked))
    )


def _kept(attention_mask: jax.Array | None, segment_ids: jax.Array | None) -> jax.Array | None:
    given = [array != 0 for array in (attention_mask, segment_ids) if array is not None]
    if not given:
        return None
    return given[0] if len(given) == 1 else given[0] & given[1]


def _default_positions(
    length: int, kept: jax.Array | None, segment_ids: jax.Array | None, cache: Cache | None
) -> jax.Array:
    kept = jnp.ones((1, length), bool) if kept is None else kept
    positions = count_positions(kept, segment_ids)
    if cache is None:
        return positions
    return positions + jnp.sum(cache.valid, axis=1, keepdims=True, dtype=jnp.int32)


def _check_inputs(
    input_ids: jax.Array,
    attention_mask: jax.Array | None,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    cache: Cache | None,
) -> None:
    check_ids(input_ids)
    others = {"attention_mask": attention_mask, "positions": positions, "segment_ids": segment_ids}
    check_shapes(input_ids, **others)
    for name in ("positions", "segment_ids"):
        other = others[name]
        if other is not None and not jnp.issubdtype(other.dtype, jnp.integer):
            raise ValueError(f"`{name}` must be integers, got {other.dtype}.")
    if cache is not None and segment_ids is not None:
        raise ValueError("`segment_ids` and a `cache` exclude each other: decode a row a sequence.")
    if cache is not None and cache.valid.shape[0] != input_ids.shape[0]:
        raise ValueError(
            f"`cache` has {cache.valid.shape[0]} rows and `input_ids` {input_ids.shape[0]}."
        )
