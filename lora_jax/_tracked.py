"""A weight on its way through a jaxpr: the array, its parts, and a label for each of its axes.

`_interpret` moves tracked weights along without knowing what they are. Two kinds exist: the
factored weight of `adapt` (`_factored`) and the probe of `layouts` (`_layouts`).
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import jax
from jax import lax

from ._axes import Move, moves
from ._compat import bind
from ._held import HeldWeight


class Step(NamedTuple):
    """One equation on a tracked weight.

    Attributes:
        eqn: The equation.
        operands: Its inputs; the tracked weight stands at ``position``, all others are arrays.
        position: Which input the tracked weight is.
        index: The equation's number in its jaxpr.
        unbroadcast: ``operand position -> array or None``: the operand before it was broadcast,
            its repeated axes of size 1.
    """

    eqn: Any
    operands: Sequence[Any]
    position: int
    index: int
    unbroadcast: Callable[[int], jax.Array | None]

    def bind(self, value: Any) -> list[Any]:
        """Binds the equation with ``value`` in the tracked weight's place.

        A weight that is itself held by another one goes by its own rules.
        """
        operands = list(self.operands)
        operands[self.position] = value
        if isinstance(value, Tracked):
            outputs = value.apply(self._replace(operands=operands))
            if outputs is not None:
                return outputs
            operands[self.position] = value.materialize()
        return bind(self.eqn, operands)


@dataclasses.dataclass(frozen=True)
class Tracked:
    """Base of the weights that travel: ``labels[i]`` says what axis ``i`` of ``w`` is.

    Attributes:
        w: The weight itself: an array, or another weight that travels.
        labels: One hashable for each axis of ``w``.
        path: The weight's path, for messages.
        spread: For each part, the mesh axes over which it is sharded inside a `shard_map`.
    """

    w: Any
    labels: tuple[Hashable, ...]
    path: str
    spread: tuple[frozenset[str], ...] = dataclasses.field(default=(), kw_only=True)

    rules: ClassVar[dict[str, Callable[..., list[Any] | None]]] = {}
    reported: ClassVar[bool] = True

    @property
    def parts(self) -> tuple[Any, ...]:
        """Arrays that move with ``w``: its axes (size 1 where a part does not vary), then more."""
        return ()

    def owned(self, part: int) -> tuple[bool, ...]:
        """For each axis of ``w``, whether the part varies along it."""
        raise NotImplementedError

    def rebuild(self, w: Any, parts: Sequence[Any], labels: tuple[Hashable, ...]) -> Self:
        """The same weight elsewhere: new arrays, new labels."""
        raise NotImplementedError

    def join(self, labels: Sequence[Hashable]) -> Hashable | None:
        """The label of an axis made of axes with these labels; None if it can have none."""
        raise NotImplementedError

    def materialize(self) -> jax.Array:
        """The plain weight."""
        raise NotImplementedError

    def apply(self, step: Step) -> list[Any] | None:
        """Takes the weight through one equation; None where it must be materialised."""
        rule = self.rules.get(step.eqn.primitive.name)
        if rule is not None:
            return rule(self, step)
        if step.position != 0 or self._gathers_past_a_part(step):
            return None
        moved = moves(step.eqn, step.operands)
        return self._rearrange(step, moved) if moved else None

    def unstack(self) -> tuple[list[Any], Callable[[Sequence[Any]], Self]]:
        """Takes axis 0 apart, as a scan does: arrays to slice, and how slices make a weight."""
        owned = [
            self.owned(i)[0] if part is not None else False for i, part in enumerate(self.parts)
        ]
        fixed = [
            part if own or part is None else lax.squeeze(part, (0,))
            for part, own in zip(self.parts, owned, strict=True)
        ]
        sliced = [part for part, own in zip(self.parts, owned, strict=True) if own]
        inner, restore_w = unstack(self.w)

        def restore(slices: Sequence[Any]) -> Self:
            w, rest = restore_w(slices[: len(inner)]), iter(slices[len(inner) :])
            parts = [next(rest) if own else part for part, own in zip(fixed, owned, strict=True)]
            return self.rebuild(w, parts, self.labels[1:])

        return [*inner, *sliced], restore

    def _rearrange(self, step: Step, moved: list[Move]) -> list[Any] | None:
        labels = [
            tuple(self.join([self.labels[axis] for axis in source]) for source in move.sources)
            for move in moved
        ]
        if any(label is None for row in labels for label in row):
            return None
        outputs = step.bind(self.w)
        return [
            self.rebuild(w, [self._along(i, move) for i in range(len(self.parts))], row)
            for w, move, row in zip(outputs, moved, labels, strict=True)
        ]

    def _gathers_past_a_part(self, step: Step) -> bool:
        """Whether an all-gather joins what a part, which it leaves as it is, differs in."""
        if step.eqn.primitive.name != "all_gather":
            return False
        names = step.eqn.params["axis_name"]
        names = {names} if isinstance(names, str) else set(names)
        axis = step.eqn.params["all_gather_dimension"]
        return any(not self.owned(i)[axis] and names & over for i, over in enumerate(self.spread))

    def _along(self, part: int, move: Move) -> Any:
        array = self.parts[part]
        return None if array is None else move.apply(array, self.owned(part))


def unstack(value: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """`Tracked.unstack` of what travels; a plain array is sliced as it is."""
    return value.unstack() if isinstance(value, Tracked) else ([value], lambda slices: slices[0])


def holds_codes(value: Any) -> bool:
    """Whether it is a weight without an array that could be cut along the weight's own axes."""
    return isinstance(value, Tracked) and isinstance(value.w, Tracked | HeldWeight)


def opened_codes(value: Any) -> Any:
    """The same weight around an array: codes are dequantised."""
    if not holds_codes(value):
        return value
    if isinstance(value.w, Tracked):
        return value.rebuild(value.w.materialize(), value.parts, value.labels)
    return value.materialize()
