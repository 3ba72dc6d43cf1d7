"""A held weight on its way through a jaxpr: given back where it is read, each time it is read.

    dot(x, w)   ->   checkpoint(lambda held, x: dot(x, whole(held)))

What only moves or casts the weight is put off until then. So the weight itself exists while one
equation reads it: it is no residual of the backward pass, which takes it from what is held again.
A scan and an index over stacked axes slice that; a new order of the axes may leave it as it is.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero

from ._axes import moves, takes_rows
from ._compat import bind, varying_axes
from ._held import HeldWeight
from ._tracked import Step, Tracked

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
"""Primitives that read a weight and call no function, whose derivative might be its own."""


@dataclasses.dataclass(frozen=True, eq=False)
class Later:
    """An equation that moves the weight, to be bound when something reads it."""

    eqn: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed(Tracked):
    """A held weight inside a jaxpr. Nothing reports that it is given back: it has to be.

    Attributes:
        w: What holds it.
        path: The weight's path.
        casts: The dtypes that it has been cast to, in order.
        later: The equations that have moved it since.
    """

    w: HeldWeight
    labels: tuple = dataclasses.field(default=(), metadata={"static": True})
    path: str = dataclasses.field(default="", metadata={"static": True})
    spread: tuple = dataclasses.field(default=(), kw_only=True, metadata={"static": True})
    casts: tuple[Any, ...] = dataclasses.field(default=(), metadata={"static": True})
    later: tuple[Later, ...] = dataclasses.field(default=(), metadata={"static": True})

    reported = False

    @property
    def shape(self) -> tuple[int, ...]:
        """What the function sees it to be."""
        return self.later[-1].eqn.outvars[0].aval.shape if self.later else self.w.shape

    @property
    def ndim(self) -> int:
        """How many axes it has by now."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """What it has been cast to."""
        return self.casts[-1] if self.casts else self.w.dtype

    def materialize(self) -> jax.Array:
        """The plain weight."""
        weight = whole(self.w)
        for dtype in self.casts:
            weight = weight.astype(dtype)
        for move in self.later:
            weight = _moved(weight, move.eqn)
        return weight

    def apply(self, step: Step) -> list[Any]:
        name = step.eqn.primitive.name
        if name == "convert_element_type" and _is_float(step.eqn.params["new_dtype"]):
            return [dataclasses.replace(self, casts=(*self.casts, step.eqn.params["new_dtype"]))]
        rule = None if self.later else _RULES.get(name)
        followed = rule(self, step) if rule else None
        if followed is not None:
            return followed
        if len(step.operands) == 1 and len(moves(step.eqn, step.operands) or ()) == 1:
            return [dataclasses.replace(self, later=(*self.later, Later(step.eqn)))]
        return self._read(step)

    def unstack(self) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
        if not self._is_stacked():
            return [self.materialize()], lambda slices: slices[0]
        arrays, treedef = jax.tree.flatten(self.w)
        return arrays, lambda slices: self._inside(treedef.unflatten(slices))

    def read(self, fn: Callable[..., Any], *others: Any, early: bool = True) -> Any:
        """``fn(weight, *others)``, with the weight given back for it alone.

        A barrier holds what waits until the others are there, and in the backward pass until the
        gradient is: left alone, a compiler dequantises the weights of all layers at once.

        Args:
            fn: What reads the weight.
            *others: What else it reads.
            early: Whether what does not wait may be brought together for the backward pass before
                the gradient is there, where the compiler sees fit. Not for an ``fn`` that has a
                derivative of its own.
        """
        if self.w.stays:
            return _spend(fn)(self, *others)
        if self.w.waits:
            held, others = _wait(self.w, others)
            return jax.checkpoint(_spend(fn))(dataclasses.replace(self, w=held), *others)

        def first(packed: Packed, *others: Any) -> Any:
            arrived = packed.w.arrived()
            if arrived.waits:
                arrived, others = _wait(arrived, others)
            return _spend(fn)(dataclasses.replace(packed, w=arrived), *others)

        def second(packed: Packed, *others: Any) -> Any:
            arrived = packed.w.again().arrived()
            spend = jax.checkpoint(_spend(fn)) if arrived.waits else _spend(fn)
            return spend(dataclasses.replace(packed, w=arrived), *others)

        if not early:
            return jax.checkpoint(first)(self, *others)
        return jax.checkpoint(_derived_from(second, first), prevent_cse=False)(self, *others)

    def _read(self, step: Step) -> list[Any]:
        """The equation as it stands."""

        def read(weight: jax.Array, *others: Any) -> list[Any]:
            operands = list(others)
            operands.insert(step.position, weight)
            return bind(step.eqn, operands)

        others = [value for i, value in enumerate(step.operands) if i != step.position]
        return self.read(read, *others, early=step.eqn.primitive.name in PRODUCTS)

    def _is_stacked(self) -> bool:
        """Whether axis 0 is the first of the stacked ones, which all arrays have too."""
        return not self.later and self.w.layout[0] == "stack"

    def _inside(self, held: HeldWeight) -> "Packed":
        """One of the stacked weights, from arrays whose leading axis is gone."""
        return dataclasses.replace(self, w=held.unstacked())


def pack(held: HeldWeight, path: str = "") -> Packed:
    """A held weight, ready for a walk.

    Raises:
        ValueError: Its arrays have not the axes that the layout says: something outside has
            sliced or stacked them.
    """
    if not held.fits():
        name = f"{path!r} is held as" if path else "A weight is held as"
        shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(held)]
        raise ValueError(
            f"{name} a {type(held).__name__} whose layout is {' '.join(held.layout)!r}, in arrays "
            f"{shapes}: a scan, vmap or stack has changed them. Give the adapted function the "
            "whole stack, and slice inside it."
        )
    return Packed(jax.tree.map(lax.stop_gradient, held), path=path)


def _moved(weight: jax.Array, eqn: Any) -> jax.Array:
    """The weight after an equation that moves it."""
    if eqn.primitive.name == "pvary":  # with JAX 0.10, the barrier has done it
        missing = set(eqn.params["axes"]) - varying_axes(weight)
        return lax.pcast(weight, tuple(missing), to="varying") if missing else weight
    (weight,) = bind(eqn, [weight])
    return weight


def _spend(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` of the weight, as a function of what holds it."""
    return lambda packed, *others: fn(packed.materialize(), *others)


def _wait(held: HeldWeight, others: Any) -> tuple[HeldWeight, Any]:
    """What is held, once the others are there.

    It has no gradient; JAX 0.10 would form one because the barrier joins them.
    """
    held, others = lax.optimization_barrier((held, others))
    return jax.tree.map(lax.stop_gradient, held), others


def _derived_from(second: Callable[..., Any], first: Callable[..., Any]) -> Callable[..., Any]:
    """``first(packed, *others)``, with the derivative of ``second`` with respect to the others.

        y = x @ whole(w)      dy = dx @ whole(barrier(w))

    Rematerialised alone, a function would bring the second weight together only once the gradient
    of ``y`` is there: one barrier holds both, so that no compiler takes the first weight for the
    second. This one holds the weight alone, which may be on its way while another is used.
    """

    def derivative(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        packed, *others = primals
        moved = [i for i, t in enumerate(tangents[1:]) if not isinstance(t, SymbolicZero)]

        def of(*values: Any) -> Any:
            full = dict(enumerate(others)) | dict(zip(moved, values, strict=True))
            return second(packed, *full.values())

        _, tangent = jax.jvp(of, [others[i] for i in moved], [tangents[1 + i] for i in moved])
        return first(*primals), tangent

    reading = jax.custom_jvp(first)
    reading.defjvp(derivative, symbolic_zeros=True)
    return reading


@jax.jit
def whole(held: HeldWeight) -> jax.Array:
    """The weight; traced once for all weights of a size, which halves the time to trace a model."""
    return held.whole()


def _transpose(packed: Packed, step: Step) -> list[Any] | None:
    held = packed.w.transposed(step.eqn.params["permutation"])
    return None if held is None else [dataclasses.replace(packed, w=held)]


def _slice(packed: Packed, step: Step) -> list[Any] | None:
    params, shape = step.eqn.params, packed.shape
    strides = params["strides"] or (1,) * len(shape)
    bounds = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
    if not packed._is_stacked() or bounds[1:] != [(0, size, 1) for size in shape[1:]]:
        return None
    return [_codes(packed, lambda leaf: lax.slice_in_dim(leaf, *bounds[0]))]


def _split(packed: Packed, step: Step) -> list[Any] | None:
    if not packed._is_stacked() or step.eqn.params["axis"] != 0:
        return None
    leaves, treedef = jax.tree.flatten(packed.w)
    cut = [lax.split(leaf, step.eqn.params["sizes"], 0) for leaf in leaves]
    parts = [treedef.unflatten(leaves) for leaves in zip(*cut, strict=True)]
    return [dataclasses.replace(packed, w=codes) for codes in parts]


def _rev(packed: Packed, step: Step) -> list[Any] | None:
    if not packed._is_stacked() or tuple(step.eqn.params["dimensions"]) != (0,):
        return None
    return [_codes(packed, lambda leaf: lax.rev(leaf, (0,)))]


def _dynamic_slice(packed: Packed, step: Step) -> list[Any] | None:
    size, *rest = step.eqn.params["slice_sizes"]
    if not packed._is_stacked() or tuple(rest) != packed.shape[1:]:
        return None
    start = step.operands[1]
    return [_codes(packed, lambda leaf: _from(leaf, start, size))]


def _from(leaf: jax.Array, start: Any, size: int) -> jax.Array:
    """Rows from ``start`` on: clamped as the primitive does it, not counted from behind."""
    starts = [start, *[jax.numpy.zeros_like(start)] * (leaf.ndim - 1)]
    sizes = (size, *leaf.shape[1:])
    return lax.dynamic_slice(leaf, starts, sizes, allow_negative_indices=False)


def _squeeze(packed: Packed, step: Step) -> list[Any] | None:
    if not packed._is_stacked() or tuple(step.eqn.params["dimensions"]) != (0,):
        return None
    return [packed._inside(jax.tree.map(lambda leaf: leaf[0], packed.w))]


def _unstack(packed: Packed, step: Step) -> list[Any] | None:
    if not packed._is_stacked() or step.eqn.params["axis"] != 0:
        return None
    codes, treedef = jax.tree.flatten(packed.w)
    rows = range(packed.shape[0])
    return [packed._inside(treedef.unflatten([leaf[row] for leaf in codes])) for row in rows]


def _gather(packed: Packed, step: Step) -> list[Any] | None:
    """``w[ids]`` of a matrix, rows along its first axis in place of that of the ids."""
    params, ids = step.eqn.params, step.operands[-1]
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    is_plain = step.position == 0 and packed.ndim == 2 and takes_rows(numbers, sizes, packed.shape)
    if not is_plain or (numbers.start_index_map, numbers.offset_dims) != ((0,), (ids.ndim - 1,)):
        return None

    def take(table: jax.Array, ids: jax.Array) -> jax.Array:
        return step.eqn.primitive.bind(table, ids, **params | {"slice_sizes": (1, table.shape[1])})

    found = packed.w.rows(take, ids)
    if found is None:
        return None
    for dtype in packed.casts:
        found = found.astype(dtype)
    return [found]


def _stay(packed: Packed, step: Step) -> list[Any]:
    """What says something of a gradient or a residual, and codes are neither."""
    return [packed]


def _codes(packed: Packed, cut: Callable[[jax.Array], jax.Array]) -> Packed:
    return dataclasses.replace(packed, w=jax.tree.map(cut, packed.w))


def _is_float(dtype: Any) -> bool:
    return jax.numpy.issubdtype(dtype, jax.numpy.floating)


_RULES: dict[str, Callable[[Packed, Step], list[Any] | None]] = {
    "transpose": _transpose,
    "slice": _slice,
    "split": _split,
    "rev": _rev,
    "dynamic_slice": _dynamic_slice,
    "squeeze": _squeeze,
    "unstack": _unstack,
    "gather": _gather,
    "name": _stay,
    "stop_gradient": _stay,
}
