"""The factored weight ``w + scale * a @ b``, and what each primitive does to it.

The law of every rule: materialising after the rule equals the primitive after materialising.
Primitives that rearrange a weight keep it factored (`_axes`), and so do casts and scalings (here);
products spend it (`_products`). A primitive without a rule makes the walk materialise the weight,
which is never silent.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from jax import lax

from ._config import AxisKind
from ._contract import contract
from ._held import is_held
from ._packed import pack
from ._tracked import Step, Tracked
from ._weights import LoraWeight

RANK = "rank"
REPEATED = ""
_A_AXES, _B_AXES, _KEY_AXES = ("stack", "in"), ("stack", "out"), ("stack",)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored(Tracked):
    """An adapted weight inside a jaxpr.

    Attributes:
        w: ``(*axes)``, an array or a `Packed` weight.
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
    spread: tuple[frozenset[str], ...] = dataclasses.field(
        default=(), kw_only=True, metadata={"static": True}
    )
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
        kinds = set(labels) or {REPEATED}
        return kinds.pop() if len(kinds) == 1 else None

    def materialize(self) -> jax.Array:
        (a, a_axes), (b, b_axes) = self.compact(0), self.compact(1)
        made = [axis for axis in range(self.w.ndim) if axis in a_axes or axis in b_axes]
        b = self.scale * b
        update = contract(a, a_axes, b, b_axes, made, precision=lax.Precision.HIGHEST)
        update = lax.expand_dims(update, [n for n in range(self.w.ndim) if n not in made])
        w = self.w.materialize() if isinstance(self.w, Tracked) else self.w
        return (w.astype(update.dtype) + update).astype(w.dtype)

    def compact(self, part: int) -> tuple[jax.Array, list[Hashable]]:
        """A factor without the axes that it does not vary along, and names of those it keeps."""
        owned, array = self.owned(part), self.parts[part]
        axes: list[Hashable] = [axis for axis, own in enumerate(owned) if own]
        lone = [axis for axis, own in enumerate(owned) if not own]
        return (lax.squeeze(array, lone) if lone else array), [*axes, RANK]


def factor(weight: LoraWeight) -> Factored:
    """Lays the factors of a weight out along the weight's own axes.

    Raises:
        ValueError: They do not fit the weight: something outside has cut one of them, or both.
    """
    w = pack(weight.w, weight.path) if is_held(weight.w) else weight.w
    if not weight.factors.fits(w.shape):
        raise ValueError(
            f"{weight.path!r} of layout {' '.join(weight.factors.layout)!r} has shape "
            f"{tuple(w.shape)}, and its factors are of another: a scan, vmap or shard_map has cut "
            "one or both. Give the adapted function all of it, and cut inside it."
        )
    layout, factors = weight.factors.layout, weight.factors.whole()
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
    if weight.w.shape != step.eqn.outvars[0].aval.shape:
        return None
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


Factored.rules.update(convert_element_type=_convert, mul=_scale, div=_scale, neg=_scale)
