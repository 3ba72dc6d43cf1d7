"""The factored weight ``w + scale * a @ b``, and what each primitive does to it.

The law of every rule: materialising after the rule equals the primitive after materialising.
Primitives that rearrange a weight keep it factored (`_axes`); those below scale it or spend it:

    x @ (w + scale * a @ b)   ->   x @ w + (x @ a) @ (scale * b)

A primitive without a rule makes the walk materialise the weight, which is never silent.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax

from ._config import AxisKind
from ._contract import contract
from ._tracked import Step, Tracked
from ._weights import LoraWeight

_RANK = "rank"
_REPEATED = ""
_A_AXES, _B_AXES, _KEY_AXES = ("stack", "in"), ("stack", "out"), ("stack",)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored(Tracked):
    """An adapted weight inside a jaxpr.

    Attributes:
        w: ``(*axes)``.
        a: ``(*axes, rank)``, of size 1 on every axis that is neither stacked nor in.
        b: ``(*axes, rank)``, of size 1 on every axis that is neither stacked nor out.
        keys: None, or dropout keys ``(*axes)``, of size 1 on every axis that is not stacked.
        labels: ``stack``, ``in`` or ``out`` for each axis, or empty where ``w`` only repeats.
        scale: Of the update.
        dropout: Probability of dropping an entry of the input of ``a``.
    """

    w: Any
    labels: tuple[Hashable, ...] = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})
    a: Any
    b: Any
    keys: Any
    scale: float = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(metadata={"static": True})

    rules: ClassVar[dict[str, Callable[..., list[Any] | None]]] = {}

    @property
    def parts(self) -> tuple[Any, ...]:
        return (self.a, self.b, self.keys)

    def owned(self, part: int) -> tuple[bool, ...]:
        kinds = (_A_AXES, _B_AXES, _KEY_AXES)[part]
        return tuple(label in kinds for label in self.labels)

    def rebuild(self, w: Any, parts: Sequence[Any], labels: tuple[Hashable, ...]) -> Self:
        a, b, keys = parts
        return dataclasses.replace(self, w=w, a=a, b=b, keys=keys, labels=labels)

    def join(self, labels: Sequence[Hashable]) -> Hashable | None:
        kinds = set(labels) or {_REPEATED}
        return kinds.pop() if len(kinds) == 1 else None

    def materialize(self) -> jax.Array:
        update = self.scale * jnp.sum(self.a * self.b, -1)
        return (self.w.astype(update.dtype) + update).astype(self.w.dtype)


def factor(weight: LoraWeight) -> Factored:
    """Lays the factors of a weight out along the weight's own axes."""
    layout, w, factors = weight.factors.layout, weight.w, weight.factors
    a, b, keys = (
        _lay_out(part, layout, kinds, rank_axis)
        for part, kinds, rank_axis in (
            (factors.a, _A_AXES, factors.a.ndim - 1),
            (factors.b, _B_AXES, layout.count("stack")),
            (weight.dropout_keys, _KEY_AXES, None),
        )
    )
    return Factored(w, layout, weight.path, a, b, keys, factors.scale, factors.dropout)


def _lay_out(
    part: jax.Array | None, layout: Sequence[AxisKind], kinds: Sequence[str], rank: int | None
) -> jax.Array | None:
    """Gives a part the weight's axes, with 1 where it has none, and its rank axis last.

    >>> _lay_out(jnp.ones((3, 2, 5)), ("out", "stack"), ("stack", "out"), 1).shape
    (5, 3, 2)
    """
    if part is None:
        return None
    if rank is not None:
        part = jnp.moveaxis(part, rank, -1)
    held = [kind for kind in ("stack", "in", "out") if kind in kinds]
    axes = [axis for kind in held for axis, label in enumerate(layout) if label == kind]
    tail = () if rank is None else (part.ndim - 1,)
    part = lax.transpose(part, (*(axes.index(axis) for axis in sorted(axes)), *tail))
    missing = [axis for axis in range(len(layout)) if axis not in axes]
    return lax.expand_dims(part, missing)


# --- rules that keep the weight factored ---------------------------------------------------------


def _convert(weight: Factored, step: Step) -> list[Any] | None:
    """A cast between floats: the factors keep their precision until they are spent."""
    if not jnp.issubdtype(step.eqn.params["new_dtype"], jnp.floating):
        return None
    return [dataclasses.replace(weight, w=step.bind(weight.w)[0])]


def _scale(weight: Factored, step: Step) -> list[Any] | None:
    """``mul``, ``div`` or ``neg`` by a scalar, or by what varies along the axes of one factor."""
    if step.eqn.primitive.name == "neg":
        return [dataclasses.replace(weight, w=step.bind(weight.w)[0], scale=-weight.scale)]
    if step.eqn.primitive.name == "div" and step.position == 1:
        return None
    factor = step.unbroadcast(1 - step.position)
    if factor is None or not jnp.issubdtype(factor.dtype, jnp.floating):
        return None
    operate: Callable[..., Any] = lax.mul if step.eqn.primitive.name == "mul" else lax.div
    varies = [n > 1 for n in factor.shape] or [False] * len(weight.labels)
    for name, part, owned in (("a", weight.a, 0), ("b", weight.b, 1)):
        if all(own or not vary for own, vary in zip(weight.owned(owned), varies, strict=True)):
            spread = jnp.broadcast_to(
                factor.reshape(*factor.shape, *[1] * bool(factor.ndim)), part.shape
            )
            scaled = operate(part, spread.astype(part.dtype))
            return [dataclasses.replace(weight, w=step.bind(weight.w)[0], **{name: scaled})]
    return None


# --- rules that spend the weight -----------------------------------------------------------------


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
    if order is None:
        return None
    base = step.bind(weight.w)[0]
    update = _low_rank(weight, step, _dropped(weight, step, x), x_axes, out_axes, order, base)
    return [base + update]


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
    (first, first_axes), (second, second_axes) = (_compact(weight, part) for part in order)
    precision = step.eqn.params["precision"]
    wanted = {*second_axes, *out_axes}
    t_axes = [axis for axis in dict.fromkeys((*x_axes, *first_axes)) if axis in wanted]
    dtype = weight.w.dtype
    t = contract(x, x_axes, first.astype(dtype), first_axes, t_axes, precision=precision)
    second = (weight.scale * second).astype(dtype)
    made = [axis for axis in out_axes if axis in t_axes or axis in second_axes]
    update = contract(
        t.astype(dtype), t_axes, second, second_axes, made, precision=precision, dtype=base.dtype
    )
    places = [place for place, axis in enumerate(out_axes) if axis in made]
    return update if made == out_axes else lax.broadcast_in_dim(update, base.shape, places)


def _compact(weight: Factored, part: int) -> tuple[jax.Array, list[Hashable]]:
    """A factor without the axes that it does not vary along, and the names of those it keeps."""
    owned = weight.owned(part)
    array = weight.parts[part]
    axes: list[Hashable] = [axis for axis, own in enumerate(owned) if own]
    lone = [axis for axis, own in enumerate(owned) if not own]
    return (lax.squeeze(array, lone) if lone else array), [*axes, _RANK]


def _dropped(weight: Factored, step: Step, x: jax.Array) -> jax.Array:
    """The input of ``a`` under dropout: kept entries grow by ``1 / (1 - dropout)``."""
    if weight.keys is None:
        return x
    key = jax.random.fold_in(weight.keys.reshape(-1)[0], step.index)
    keep = jax.random.bernoulli(key, 1 - weight.dropout, x.shape)
    return jnp.where(keep, x / (1 - weight.dropout), jnp.zeros_like(x))


def _ragged_dot(weight: Factored, step: Step) -> list[Any] | None:
    """Experts: rows of ``x`` in groups, ``w: (experts, in, out)``, own factors for each expert."""
    numbers = step.eqn.params["ragged_dot_dimension_numbers"]
    plain = (((1,), (1,)), ((), ()))
    dims = tuple(tuple(map(tuple, pair)) for pair in numbers.dot_dimension_numbers)
    is_plain = dims == plain and tuple(numbers.lhs_ragged_dimensions) == (0,)
    ins, outs = weight.labels[1], weight.labels[2]
    if step.position != 1 or not is_plain or {ins, outs} != {"in", "out"}:
        return None
    x, _, group_sizes = step.operands
    order = (0, 1) if ins == "in" else (1, 0)
    (first, _), (second, _) = (_compact(weight, part) for part in order)
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
    groups, features = params["feature_group_count"], params["dimension_numbers"].out_spec[1]
    (a, _), (b, _) = _compact(weight, 0), _compact(weight, 1)
    base = step.bind(weight.w)[0]
    dtype = weight.w.dtype
    kernel = jnp.concatenate([jnp.moveaxis(a, -1, out_axis).astype(dtype)] * groups, out_axis)
    operands = [_dropped(weight, step, step.operands[0]), kernel]
    t = jnp.moveaxis(step.eqn.primitive.bind(*operands, **params), features, -1).astype(dtype)
    t = t.reshape(*t.shape[:-1], groups, -1)
    b = (weight.scale * b).astype(dtype).reshape(groups, -1, b.shape[-1])
    names = [f"x{axis}" for axis in range(t.ndim - 2)]
    update = contract(
        t, [*names, "group", _RANK], b, ["group", "out", _RANK], [*names, "group", "out"],
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
    if step.position != 0 or not _takes_rows(numbers, params["slice_sizes"], weight.w.shape):
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
    if _REPEATED in labels:
        return None
    (a, a_axes), (b, b_axes) = _compact(taken, 0), _compact(taken, 1)
    dtype = base.dtype
    b = (weight.scale * b).astype(dtype)
    return [base + contract(a.astype(dtype), a_axes, b, b_axes, range(base.ndim), dtype=dtype)]


def _takes_rows(numbers: Any, sizes: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a gather is ``take(w, ids, axis)``: whole rows along one axis."""
    rows = tuple(numbers.start_index_map)
    whole = all(
        n == size for i, (n, size) in enumerate(zip(shape, sizes, strict=True)) if i not in rows
    )
    is_plain = not numbers.operand_batching_dims and not numbers.start_indices_batching_dims
    return len(rows) == 1 and tuple(numbers.collapsed_slice_dims) == rows and whole and is_plain


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
        fill_value=params["fill_value"],
    )


Factored.rules.update(
    convert_element_type=_convert,
    mul=_scale,
    div=_scale,
    neg=_scale,
    dot_general=_dot_general,
    ragged_dot_general=_ragged_dot,
    conv_general_dilated=_conv,
    gather=_gather,
)
