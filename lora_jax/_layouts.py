"""What each axis of a weight does, read from the function that uses it.

x @ w            w: ("in", "out")
scan over w[i]   w: ("stack", "in", "out")
w[ids]           w: ("in", "out")        an embedding is a matrix under a one-hot input
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Self

import jax

from ._compat import open_jaxpr
from ._config import Layout
from ._interpret import Walk, trace
from ._paths import flatten
from ._quantized import is_quantized
from ._tracked import Step, Tracked

Origins = frozenset[int]


def layouts(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> dict[str, Layout]:
    """Measures the layout of every weight: which axes ``fn`` contracts, produces and stacks.

    Nothing is computed: ``fn`` is traced to a jaxpr, as for `adapt`.

    Args:
        fn: The function, called as ``fn(params, *args, **kwargs)``.
        params: The tree of weights, or their shapes (``jax.ShapeDtypeStruct``).
        *args: Its other arguments, or their shapes.
        **kwargs: Its keyword arguments.

    Returns:
        Path -> layout, one of ``in``, ``out`` and ``stack`` for each axis. A weight that is never
        multiplied by (a bias, a norm) has no ``in``, and cannot be adapted. One that meets another
        operation first (a concatenation, a norm of its own) is left out: what it does cannot be
        told, and `adapt` would materialise it. Where a weight is
        used in several ways (tied embeddings), a lookup decides, then the first product. An axis
        of experts that all read one shared input is an ``out`` axis here, with one ``a`` for all;
        name it in ``LoraConfig.layouts`` to give each its own.

    Example:
        >>> params = {"kernel": jax.numpy.ones((4, 3, 5))}
        >>> layouts(lambda params, x: jax.numpy.einsum("bi,ihd->bhd", x, params["kernel"]),
        ...         params, jax.numpy.ones((2, 4)))
        {'kernel': ('in', 'out', 'out')}
    """
    weights, _ = flatten(params)
    record: dict[str, dict[str, dict[int, str]]] = {path: {} for path in weights}
    leaves, treedef = jax.tree.flatten(((params, *args), kwargs), is_leaf=is_quantized)
    places = [
        i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    ]
    paths = dict(enumerate(weights))  # the parameters are the first leaves
    jaxpr, _ = trace(fn, leaves, treedef, places, [_shape(leaves[i]) for i in places])

    def probe(*arrays):
        values = [
            Probe(array, tuple(frozenset({i}) for i in range(array.ndim)), paths[place], record)
            if place in paths
            else array
            for place, array in zip(places, arrays, strict=True)
        ]
        for value in Walk("allow", keep_jit=False).evaluate(*open_jaxpr(jaxpr), values):
            if isinstance(value, Tracked):
                value.materialize()

    jax.eval_shape(probe, *[_shape(leaves[i]) for i in places])
    found = {
        path: _layout(len(weight.shape), record[path])
        for path, weight in weights.items()
        if hasattr(weight, "shape")
    }
    return {path: layout for path, layout in found.items() if layout is not None}


def _shape(leaf: Any) -> Any:
    """The shape of a leaf, of the dtype that JAX would give it (int32 for NumPy's int64)."""
    if is_quantized(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return jax.eval_shape(lambda x: x, leaf)


def _layout(ndim: int, uses: dict[str, dict[int, str]]) -> Layout | None:
    """The layout that the uses of one weight agree on; an axis that was indexed away is stacked."""
    if not uses:
        return ("out",) * ndim
    use = next(use for use in ("lookup", "product", "unknown", "elementwise") if use in uses)
    if use == "unknown":
        return None
    roles = uses[use]
    return tuple(roles.get(axis, "stack") for axis in range(ndim))  # type: ignore[return-value]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Probe(Tracked):
    """A weight that notes what becomes of its axes.

    Attributes:
        labels: For each axis of ``w``, the axes of the original weight that it is made of.
        record: Path -> use (``lookup``, ``product``, ``unknown``, ``elementwise``) -> original
            axis -> role.
        gathered: The axes of ``w`` that an index put there.
    """

    w: Any
    labels: tuple[Hashable, ...] = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})
    spread: tuple[frozenset[str], ...] = dataclasses.field(
        default=(), kw_only=True, metadata={"static": True}
    )
    record: Any = dataclasses.field(metadata={"static": True}, compare=False)
    gathered: Origins = dataclasses.field(default=frozenset(), metadata={"static": True})

    rules: ClassVar[dict[str, Callable[..., list[Any] | None]]] = {}
    reported: ClassVar[bool] = False

    def rebuild(self, w: Any, parts: Sequence[Any], labels: tuple[Hashable, ...]) -> Self:
        return dataclasses.replace(self, w=w, labels=labels)

    def join(self, labels: Sequence[Hashable]) -> Hashable | None:
        return frozenset().union(*labels)  # type: ignore[arg-type]

    def materialize(self) -> jax.Array:
        """The weight goes on as a plain array, and what becomes of it is not seen.

        A vector, or what has been repeated over a batch, meets it entry by entry (a bias, a
        norm); a whole matrix might still be multiplied by.
        """
        roles = dict.fromkeys(range(len(self.labels)), "out")
        if self.gathered:
            self.note("lookup", roles | dict.fromkeys(self.gathered, "in"))
        elif len(roles) > 1 and all(self.labels):
            self.note("unknown", roles)
        else:
            self.note("elementwise", roles)
        return self.w

    def note(self, use: str, roles: dict[int, str]) -> None:
        """Notes the roles of the current axes for the original ones; the first use stays."""
        origins: dict[int, set[str]] = {}
        for axis, role in roles.items():
            for origin in self.labels[axis]:  # type: ignore[attr-defined]
                origins.setdefault(origin, set()).add(role)
        chosen = {
            origin: next(role for role in ("in", "out", "stack") if role in found)
            for origin, found in origins.items()
        }
        self.record[self.path].setdefault(use, chosen)


def _keep(probe: Probe, step: Step) -> list[Any]:
    return [probe.rebuild(step.bind(probe.w)[0], (), probe.labels)]


def _scaled(probe: Probe, step: Step) -> list[Any] | None:
    """A weight that is scaled before its product is the same weight."""
    return _keep(probe, step) if step.unbroadcast(1 - step.position) is not None else None


def _dot_general(probe: Probe, step: Step) -> list[Any]:
    contracting, batch = step.eqn.params["dimension_numbers"]
    me = step.position
    roles = dict.fromkeys(range(len(probe.labels)), "out")
    roles |= dict.fromkeys(contracting[me], "in") | dict.fromkeys(batch[me], "stack")
    if probe.gathered and not probe.gathered <= set(batch[me]):
        roles = {axis: "in" if axis in probe.gathered else "out" for axis in roles}
        probe.note("lookup", roles)
    else:
        probe.note("product", roles)
    return step.bind(probe.w)


def _ragged_dot(probe: Probe, step: Step) -> list[Any]:
    numbers = step.eqn.params["ragged_dot_dimension_numbers"]
    contracting, batch = numbers.dot_dimension_numbers
    me = step.position
    roles = dict.fromkeys(range(len(probe.labels)), "out")
    roles |= dict.fromkeys(contracting[me], "in")
    stacked = (*batch[me], *(numbers.rhs_group_dimensions if me == 1 else ()))
    probe.note("product", roles | dict.fromkeys(stacked, "stack"))
    return step.bind(probe.w)


def _conv(probe: Probe, step: Step) -> list[Any]:
    out_axis = step.eqn.params["dimension_numbers"].rhs_spec[0]
    if step.position == 1:
        roles = {axis: "out" if axis == out_axis else "in" for axis in range(len(probe.labels))}
        probe.note("product", roles)
    return step.bind(probe.w)


def _gather(probe: Probe, step: Step) -> list[Any]:
    numbers = step.eqn.params["dimension_numbers"]
    taken = step.bind(probe.w)[0]
    if step.position != 0 or len(numbers.collapsed_slice_dims) != 1 or probe.gathered:
        return [taken]
    (axis,) = numbers.collapsed_slice_dims
    rest = [label for i, label in enumerate(probe.labels) if i != axis]
    labels = [probe.labels[axis]] * taken.ndim
    for place, label in zip(numbers.offset_dims, rest, strict=True):
        labels[place] = label
    places = frozenset(range(taken.ndim)) - set(numbers.offset_dims)
    found = dataclasses.replace(probe, w=taken, labels=tuple(labels), gathered=places)
    if len(rest) == 1:
        found.note("lookup", {i: "in" if i in places else "out" for i in range(taken.ndim)})
        return [taken]
    return [found]


Probe.rules.update(
    convert_element_type=_keep,
    neg=_keep,
    mul=_scaled,
    div=_scaled,
    dot_general=_dot_general,
    ragged_dot_general=_ragged_dot,
    conv_general_dilated=_conv,
    gather=_gather,
)
