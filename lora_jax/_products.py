"""Products spend a factored weight: the input meets the factors one after the other.

    x @ (w + scale * a @ b)   ->   x @ w + (x @ a) @ (scale * b)

The factors are cast to the weight's dtype when they are spent. A complex input, which has no use
for real factors of that dtype, materialises the weight.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ._axes import takes_rows
from ._compat import varying_axes
from ._contract import contract
from ._factored import RANK, REPEATED, Factored
from ._joined import joined, pays, row_shards
from ._packed import Packed
from ._ranks import filled
from ._tracked import Step, Tracked

LOW_RANK = "low_rank"
"""What ``x @ a`` is named for policies of `jax.checkpoint`."""


def _dot_general(weight: Factored, step: Step) -> list[Any] | None:
    contracting, batch = step.eqn.params["dimension_numbers"]
    me, other = step.position, 1 - step.position
    x = step.operands[other]
    x_axes: list[Hashable] = [f"x{axis}" for axis in range(x.ndim)]
    for mine, theirs in (*zip(contracting[me], contracting[other], strict=True),
                         *zip(batch[me], batch[other], strict=True)):  # fmt: skip
        x_axes[theirs] = mine
    spent = contracting[me]
    ahead = list(batch[me])
    frees = {
        me: [axis for axis in range(weight.w.ndim) if axis not in (*spent, *ahead)],
        other: [axis for axis in x_axes if isinstance(axis, str)],
    }
    out_axes = [*ahead, *frees[0], *frees[1]]
    order = _order(weight, spent)
    if order is None or _is_complex(x):
        return None
    if _can_join(weight, step, order):
        return [_join(weight, step)]
    base = step.bind(weight.w)[0]
    update = _low_rank(weight, step, _dropped(weight, step, x), x_axes, out_axes, order, base)
    return [base + update]


def _can_join(weight: Factored, step: Step, order: tuple[int, int]) -> bool:
    """Whether it is ``x @ w`` of a matrix, whole when it is read, and `_joined` pays."""
    (contracting, batch), x = step.eqn.params["dimension_numbers"], step.operands[0]
    is_plain = step.position == 1 and weight.w.ndim == 2 and _is_moved_at_most(weight.w)
    if not (is_plain and order == (0, 1) and len(contracting[0]) == 1 and not batch[0]):
        return False
    (spent,) = contracting[1]
    ins, outs = weight.w.shape[spent], weight.w.shape[1 - spent]
    matches = weight.labels[spent] == "in" and weight.labels[1 - spent] == "out"
    # Joining what is cut along its in axis would move it, and GSPMD does not say what is.
    weights = jax.tree.leaves((weight.w, weight.a, weight.b))
    left = any(_is_left_to_gspmd(one) for one in (x, *weights))
    shards = row_shards() if left else 1
    if shards is None:
        return False
    cut = [any(jax.typeof(one).sharding.spec) for one in weights]
    cut += [bool(jax.typeof(x).sharding.spec[contracting[0][0]])]
    cut += [step.eqn.params.get("out_sharding") is not None]
    matches = matches and not any(cut) and x.dtype == weight.w.dtype
    rows = x.size // max(1, ins) // (shards * _shards(x))
    return matches and pays(rows, ins, outs)


def _is_moved_at_most(w: Any) -> bool:
    """Whether it is an array, or one that is gathered: what is computed costs a copy more."""
    return not isinstance(w, Tracked) or (isinstance(w, Packed) and not w.w.is_computed)


def _shards(x: jax.Array) -> int:
    """Into how many parts an array is cut, as far as JAX knows."""
    found = jax.typeof(x).sharding
    names = [name for part in found.spec if part for name in jax.tree.leaves(part)]
    return math.prod(found.mesh.shape[name] for name in names)


def _is_left_to_gspmd(x: jax.Array) -> bool:
    """Whether it is on several devices, and JAX does not know which part is where."""
    mesh = jax.typeof(x).sharding.mesh
    sizes = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return any(size > 1 and kind == AxisType.Auto for size, kind in sizes)


def _join(weight: Factored, step: Step) -> jax.Array:
    """``[x (x @ a)] @ [w; scale * b]``."""
    params = step.eqn.params
    ((mine,), (spent,)), _ = params["dimension_numbers"]
    x, dtype = step.operands[0], weight.w.dtype
    a, b = (filled(weight.compact(part)[0]) for part in (0, 1))
    t = lax.dot_general(
        _dropped(weight, step, x), a.astype(dtype), (((mine,), (0,)), ((), ())),
        precision=params["precision"],
    )  # fmt: skip
    t = checkpoint_name(jnp.moveaxis(t.astype(dtype), -1, mine), LOW_RANK)
    b = jnp.moveaxis((weight.scale * b).astype(dtype), -1, spent)
    wanted = {name: params[name] for name in ("precision", "preferred_element_type")}

    def whole(w: jax.Array, x: jax.Array, t: jax.Array, b: jax.Array) -> jax.Array:
        return joined(x, t, w, b, (mine, spent), **wanted)

    w = weight.w
    return w.read(whole, x, t, b) if isinstance(w, Packed) else whole(w, x, t, b)


def _order(weight: Factored, spent: Sequence[int]) -> tuple[int, int] | None:
    """Which factor meets the input first: the one that shrinks it most."""
    sizes = {"in": 1, "out": 1}
    for axis in spent:
        if (label := weight.labels[axis]) in sizes:
            sizes[str(label)] *= weight.w.shape[axis]
    touched = [weight.labels[axis] for axis in spent]
    if "in" not in touched and "out" not in touched:
        return None
    first_is_a = "in" in touched and sizes["in"] >= sizes["out"]
    return (0, 1) if first_is_a else (1, 0)


def _low_rank(
    weight: Factored,
    step: Step,
    x: jax.Array,
    x_axes: list[Hashable],
    out_axes: list[Hashable],
    order: tuple[int, int],
    base: jax.Array,
) -> jax.Array:
    """``(x @ first) @ (scale * second)``, laid out as ``base`` and of its dtype."""
    (first, first_axes), (second, second_axes) = (weight.compact(part) for part in order)
    precision = step.eqn.params["precision"]
    first, second = filled(first), filled(second)
    wanted = {*second_axes, *out_axes}
    t_axes = [axis for axis in dict.fromkeys((*x_axes, *first_axes)) if axis in wanted]
    dtype, place = weight.w.dtype, _places(base, out_axes)
    t = contract(
        x, x_axes, first.astype(dtype), first_axes, t_axes,
        precision=precision, place=place,
    )  # fmt: skip
    t = checkpoint_name(t.astype(dtype), LOW_RANK)  # small, and the gradient of `second` reads it
    second = (weight.scale * second).astype(dtype)
    made = [axis for axis in out_axes if axis in t_axes or axis in second_axes]
    update = contract(
        t, t_axes, second, second_axes, made,
        precision=precision, dtype=base.dtype, place=place,
    )  # fmt: skip
    if made != out_axes:
        axes = [axis for axis, name in enumerate(out_axes) if name in made]
        update = lax.broadcast_in_dim(update, base.shape, axes)
    return update


def _places(base: jax.Array, out_axes: list[Hashable]) -> Callable[[Sequence[Hashable]], Any]:
    """Where an array with some of the base's axes is: there where the base is.

    Only where JAX knows that, on a mesh with explicit axes: the product may have been told, and
    products with the factors could not be told otherwise.
    """
    found = jax.typeof(base).sharding
    if AxisType.Explicit not in found.mesh.axis_types:
        return lambda axes: None
    places = dict(zip(out_axes, found.spec, strict=True))
    return lambda axes: NamedSharding(found.mesh, PartitionSpec(*map(places.get, axes)))


def _dropped(weight: Factored, step: Step, x: jax.Array) -> jax.Array:
    """The input of ``a`` under dropout: kept entries grow by ``1 / (1 - dropout)``."""
    if weight.keys is None:
        return x
    key = jax.random.fold_in(weight.keys.reshape(-1)[0], step.index)
    for axis in sorted(varying_axes(x)):  # the shards of x differ: so do masks
        key = jax.random.fold_in(key, lax.axis_index(axis))
    keep = jax.random.bernoulli(key, 1 - weight.dropout, x.shape)
    return x * (keep.astype(x.dtype) / (1 - weight.dropout))


def _is_complex(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.complexfloating)


def _ragged_dot(weight: Factored, step: Step) -> list[Any] | None:
    """Experts: rows of ``x`` in groups, ``w: (experts, in, out)``, own factors for each expert."""
    numbers = step.eqn.params["ragged_dot_dimension_numbers"]
    plain = (((1,), (1,)), ((), ()))
    dims = tuple(tuple(map(tuple, pair)) for pair in numbers.dot_dimension_numbers)
    is_plain = dims == plain and tuple(numbers.lhs_ragged_dimensions) == (0,)
    ins, outs = weight.labels[1], weight.labels[2]
    fits = is_plain and weight.labels[0] == "stack" and {ins, outs} == {"in", "out"}
    if step.position != 1 or not fits or _is_complex(step.operands[0]):
        return None
    x, _, group_sizes = step.operands
    order = (0, 1) if ins == "in" else (1, 0)
    (first, _), (second, _) = (weight.compact(part) for part in order)
    precision = step.eqn.params["precision"]
    base = step.bind(weight.w)[0]
    dtype = weight.w.dtype
    second = jnp.moveaxis(weight.scale * second, -1, 1).astype(dtype)
    x = _dropped(weight, step, x)
    t = lax.ragged_dot(x, first.astype(dtype), group_sizes, precision=precision).astype(dtype)
    update = lax.ragged_dot(
        t, second, group_sizes, precision=precision, preferred_element_type=base.dtype
    )
    return [base + update]


def _conv(weight: Factored, step: Step) -> list[Any] | None:
    """``conv(x, w) + conv(x, a) @ b``: ``a`` is a kernel with rank output features."""
    params = step.eqn.params
    out_axis, *in_axes = params["dimension_numbers"].rhs_spec
    labels = weight.labels
    fits = labels[out_axis] == "out" and all(labels[axis] == "in" for axis in in_axes)
    if step.position != 1 or not fits or params["batch_group_count"] != 1:
        return None
    if _is_complex(step.operands[0]):
        return None
    groups, features = params["feature_group_count"], params["dimension_numbers"].out_spec[1]
    (a, _), (b, _) = weight.compact(0), weight.compact(1)
    base = step.bind(weight.w)[0]
    dtype = weight.w.dtype
    kernel = jnp.concatenate([jnp.moveaxis(a, -1, out_axis).astype(dtype)] * groups, out_axis)
    operands = [_dropped(weight, step, step.operands[0]), kernel]
    t = jnp.moveaxis(step.eqn.primitive.bind(*operands, **params), features, -1).astype(dtype)
    t = t.reshape(*t.shape[:-1], groups, -1)
    b = (weight.scale * b).astype(dtype).reshape(groups, -1, b.shape[-1])
    names = [f"x{axis}" for axis in range(t.ndim - 2)]
    update = contract(
        t, [*names, "group", RANK], b, ["group", "out", RANK], [*names, "group", "out"],
        precision=params["precision"], dtype=base.dtype,
    )  # fmt: skip
    update = update.reshape(*update.shape[:-2], -1)
    return [base + jnp.moveaxis(update, -1, features)]


def _gather(weight: Factored, step: Step) -> list[Any] | None:
    """Rows by index: a stack stays factored (``w[layer]``), an embedding is looked up.

    w[ids]   ->   w[ids] + a[ids] @ (scale * b)
    """
    params = step.eqn.params
    numbers = params["dimension_numbers"]
    if step.position != 0 or not takes_rows(numbers, params["slice_sizes"], weight.w.shape):
        return None
    (axis,) = numbers.start_index_map
    label = weight.labels[axis]
    base = step.bind(weight.w)[0]
    rest = [label for i, label in enumerate(weight.labels) if i != axis]
    labels: list[Hashable] = [label] * base.ndim
    for place, kind in zip(numbers.offset_dims, rest, strict=True):
        labels[place] = kind
    parts = [
        None if part is None else _gather_part(weight.owned(i)[axis], part, axis, step, base.ndim)
        for i, part in enumerate(weight.parts)
    ]
    taken = weight.rebuild(base, parts, tuple(labels))
    if label == "stack":
        return [taken]
    if REPEATED in labels:
        return None
    (a, a_axes), (b, b_axes) = taken.compact(0), taken.compact(1)
    dtype = base.dtype
    b = (weight.scale * b).astype(dtype)
    return [base + contract(a.astype(dtype), a_axes, b, b_axes, range(base.ndim), dtype=dtype)]


def _gather_part(owned: bool, part: jax.Array, axis: int, step: Step, ndim: int) -> jax.Array:
    """Takes the same rows of a part, or drops the axis where the part does not vary along it."""
    params, indices = step.eqn.params, step.operands[1]
    numbers = params["dimension_numbers"]
    if not owned:
        places = set(range(ndim)) - set(numbers.offset_dims)
        return lax.expand_dims(lax.squeeze(part, (axis,)), sorted(places))
    tail = part.shape[len(params["slice_sizes"]) :]
    sizes = [1 if i == axis else n for i, n in enumerate(part.shape)]
    offsets = (*numbers.offset_dims, *range(ndim, ndim + len(tail)))
    return lax.gather(
        part,
        indices,
        numbers._replace(offset_dims=offsets),
        sizes,
        unique_indices=params["unique_indices"],
        indices_are_sorted=params["indices_are_sorted"],
        mode=params["mode"],
        fill_value=0,  # the base has the fill: a row that is not there has no update
    )


Factored.rules.update(
    dot_general=_dot_general,
    ragged_dot_general=_ragged_dot,
    conv_general_dilated=_conv,
    gather=_gather,
)
