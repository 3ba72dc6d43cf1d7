"""How the axes of an array move through the primitives that only rearrange it.

A *part* of a weight (its ``a``, its ``b``) has the weight's axes, of size 1 where the part does
not vary, and perhaps more behind them. What a primitive does to the weight it does to each part,
on the axes that the part owns:

    w: (8, 6)   transpose ->  (6, 8)
    a: (8, 1, rank)       ->  (1, 8, rank)
    b: (1, 6, rank)       ->  (6, 1, rank)

Each rule here returns one `Move` for each output of its primitive: where every new axis comes
from, and the function that takes a part along.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

Owned = Sequence[bool]


class Move(NamedTuple):
    """One output of a rearrangement.

    Attributes:
        sources: For each axis of the output, the input axes that it is made of; none for an axis
            along which the input is repeated.
        apply: ``(part, owned) -> part``; ``owned[i]`` says whether the part varies along the
            input's axis ``i``.
    """

    sources: tuple[tuple[int, ...], ...]
    apply: Callable[[jax.Array, Owned], jax.Array]


def moves(eqn: Any, operands: Sequence[Any]) -> list[Move] | None:
    """The moves of an equation that rearranges its first operand, or None if it does not."""
    rule = _RULES.get(eqn.primitive.name)
    shape = eqn.invars[0].aval.shape
    if rule is None or math.prod(shape) == 0:
        return None
    return rule(eqn, shape, operands)


def takes_rows(numbers: Any, sizes: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a gather is ``take(w, ids, axis)``: whole rows along one axis."""
    rows = tuple(numbers.start_index_map)
    whole = all(
        n == size for i, (n, size) in enumerate(zip(shape, sizes, strict=True)) if i not in rows
    )
    is_plain = not numbers.operand_batching_dims and not numbers.start_indices_batching_dims
    return len(rows) == 1 and tuple(numbers.collapsed_slice_dims) == rows and whole and is_plain


def _transpose(eqn, shape, operands):
    order = tuple(eqn.params["permutation"])

    def apply(part, owned):
        return lax.transpose(part, order + _trailing(part, owned))

    return [Move(tuple((axis,) for axis in order), apply)]


def _reshape(eqn, shape, operands):
    if eqn.params.get("dimensions") is not None:
        return None
    blocks = _blocks(shape, eqn.outvars[0].aval.shape)

    def apply(part, owned):
        sizes: list[int] = []
        for old, new in blocks:
            varies = any(owned[axis] for axis in old)
            sizes += new if varies else [1] * len(new)
        return part.reshape(*sizes, *part.shape[len(owned) :])

    return [Move(tuple(old for old, new in blocks for _ in new), apply)]


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Cuts a reshape into the smallest blocks of axes with equal products.

    Axes of size 1 carry nothing: a block's sources leave them out unless they are all it has, and
    a new one is a block without sources.

    >>> _blocks((4, 6, 5), (4, 2, 3, 5))
    [((0,), [4]), ((1,), [2, 3]), ((2,), [5])]
    >>> _blocks((4, 1, 5), (1, 20))
    [((), [1]), ((0, 2), [20])]
    """
    blocks, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        if j < len(new) and new[j] == 1 and (i == len(old) or old[i] != 1):
            blocks.append(((), [1]))
            j += 1
            continue
        rows, sizes = [], []
        while not (rows or sizes) or _product(old, rows) != math.prod(sizes):
            if j == len(new) or (i < len(old) and _product(old, rows) <= math.prod(sizes)):
                rows.append(i)
                i += 1
            else:
                sizes.append(new[j])
                j += 1
        sources = tuple(axis for axis in rows if old[axis] > 1) or tuple(rows)
        blocks.append((sources, sizes))
    return blocks


def _product(sizes: Sequence[int], axes: Sequence[int]) -> int:
    return math.prod(sizes[axis] for axis in axes)


def _squeeze(eqn, shape, operands):
    dropped = eqn.params["dimensions"]
    kept = [axis for axis in range(len(shape)) if axis not in dropped]
    return [Move(tuple((axis,) for axis in kept), lambda part, owned: lax.squeeze(part, dropped))]


def _unstack(eqn, shape, operands):
    axis = eqn.params["axis"]
    sources = tuple((kept,) for kept in range(len(shape)) if kept != axis)

    def at(index):
        def apply(part, owned):
            one = lax.slice_in_dim(part, index, index + 1, axis=axis) if owned[axis] else part
            return lax.squeeze(one, (axis,))

        return apply

    return [Move(sources, at(index)) for index in range(shape[axis])]


def _broadcast_in_dim(eqn, shape, operands):
    target, placed = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    sources: list[tuple[int, ...]] = [()] * len(target)
    for axis, new in enumerate(placed):
        if shape[axis] == target[new]:
            sources[new] = (axis,)

    def apply(part, owned):
        sizes = [1] * len(target)
        for axis, new in enumerate(placed):
            sizes[new] = part.shape[axis]
        tail = part.shape[len(owned) :]
        behind = tuple(range(len(target), len(target) + len(tail)))
        return lax.broadcast_in_dim(part, (*sizes, *tail), (*placed, *behind))

    return [Move(tuple(sources), apply)]


def _slice(eqn, shape, operands):
    starts, limits = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(shape)
    return [_sliced(shape, list(zip(starts, limits, strides, strict=True)))]


def _split(eqn, shape, operands):
    axis, result, start = eqn.params["axis"], [], 0
    for size in eqn.params["sizes"]:
        bounds = [(0, extent, 1) for extent in shape]
        bounds[axis] = (start, start + size, 1)
        result.append(_sliced(shape, bounds))
        start += size
    return result


def _sliced(shape: Sequence[int], bounds: Sequence[tuple[int, int, int]]) -> Move:
    def apply(part, owned):
        for axis, (start, limit, stride) in enumerate(bounds):
            if owned[axis]:
                part = lax.slice_in_dim(part, start, limit, stride, axis)
        return part

    return Move(tuple((axis,) for axis in range(len(shape))), apply)


def _dynamic_slice(eqn, shape, operands):
    sizes, starts = eqn.params["slice_sizes"], operands[1:]

    def apply(part, owned):
        tail = part.shape[len(owned) :]
        begin = [start if own else start * 0 for start, own in zip(starts, owned, strict=True)]
        extent = [size if own else 1 for size, own in zip(sizes, owned, strict=True)]
        begin += [begin[0] * 0] * len(tail)
        return lax.dynamic_slice(part, begin, (*extent, *tail), allow_negative_indices=False)

    return [Move(tuple((axis,) for axis in range(len(shape))), apply)]


def _rev(eqn, shape, operands):
    def apply(part, owned):
        return lax.rev(part, [axis for axis in eqn.params["dimensions"] if owned[axis]])

    return [Move(tuple((axis,) for axis in range(len(shape))), apply)]


def _all_gather(eqn, shape, operands):
    axis = eqn.params["all_gather_dimension"]
    if not eqn.params["tiled"] or eqn.params["axis_index_groups"] is not None:
        return None

    def apply(part, owned):
        if not owned[axis]:
            return part
        return lax.all_gather(part, eqn.params["axis_name"], axis=axis, tiled=True)

    return [Move(tuple((axis,) for axis in range(len(shape))), apply)]


def _reshard(eqn, shape, operands):
    sharding = eqn.params["dst_sharding"]
    entries = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]

    def apply(part, owned):
        spec = [entry if own else None for entry, own in zip(entries, owned, strict=True)]
        return jax.sharding.reshard(part, NamedSharding(sharding.mesh, PartitionSpec(*spec)))

    return [Move(tuple((axis,) for axis in range(len(shape))), apply)]


def _stay(eqn, shape, operands):
    return [Move(tuple((axis,) for axis in range(len(shape))), lambda part, owned: part)]


def _stop_gradient(eqn, shape, operands):
    return [_stay(eqn, shape, operands)[0]._replace(apply=lambda part, owned: _stopped(part))]


def _stopped(part: jax.Array) -> jax.Array:
    is_key = jnp.issubdtype(part.dtype, jax.dtypes.prng_key)
    return part if is_key else lax.stop_gradient(part)


def _trailing(part: jax.Array, owned: Owned) -> tuple[int, ...]:
    return tuple(range(len(owned), part.ndim))


_RULES: dict[str, Callable[..., list[Move] | None]] = {
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast_in_dim,
    "slice": _slice,
    "split": _split,
    "unstack": _unstack,
    "dynamic_slice": _dynamic_slice,
    "rev": _rev,
    "reshard": _reshard,
    "all_gather": _all_gather,
    "stop_gradient": _stop_gradient,
    "copy": _stay,
    "copy_p": _stay,
    "name": _stay,
    "pvary": _stay,
    "sharding_constraint": _stay,
}
