"""What stands in a tree in place of a weight, and gives it back where something reads it.

    x @ w   ->   x @ whole(held)      once in the forward pass, again in the backward pass

Three kinds: codes (`_quantized`), and on several devices parts of a weight (`_gathered`) and of a
table (`_table`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import jax

from ._config import Layout


@dataclasses.dataclass(frozen=True)
class HeldWeight:
    """Base of all. Every array that it holds has the weight's stacked axes first.

    Attributes:
        layout: What each axis of the weight does, static.
        dtype: Of the weight, static.
        waits: Whether it is given back only when the other operands of what reads it are there.
            Otherwise a compiler may begin to bring it together earlier.
        stays: Whether the weight itself is there for all of a step once something has read it.
            Otherwise it is given back for each reading alone.
    """

    waits: ClassVar[bool] = True
    stays: ClassVar[bool] = False

    layout: Layout = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})

    @property
    def is_computed(self) -> bool:
        """Whether the weight is computed from what is held, and not only brought together."""
        return True

    def whole(self) -> jax.Array:
        """The weight, of its own shape and dtype."""
        raise NotImplementedError

    def arrived(self) -> "HeldWeight":
        """What is left to compute on a device that has all it needs for it."""
        return self

    def again(self) -> Self:
        """What gives the weight back a second time, and no compiler takes for the first one.

        Only of what neither waits nor stays.
        """
        raise NotImplementedError

    def rows(
        self, take: Callable[[jax.Array, jax.Array], jax.Array], ids: jax.Array
    ) -> jax.Array | None:
        """Rows of a matrix, of its dtype, if it need not be whole for them; None if it has to be.

        Args:
            take: ``(array, ids) -> rows``, for any number of features.
            ids: Which, ``(..., 1)``.
        """
        return None

    def astype(self, dtype: Any) -> Self:
        """The same arrays, giving back another dtype."""
        raise NotImplementedError

    def transposed(self, order: Sequence[int]) -> Self | None:
        """What holds ``transpose(weight, order)``; None if nothing can be held so."""
        raise NotImplementedError

    def unstacked(self) -> Self:
        """The same arrays as one of the stacked weights: their first axis is gone."""
        return dataclasses.replace(self, layout=self.layout[1:])

    def fits(self) -> bool:
        """Whether its arrays have the axes that the layout says."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """The weight's shape."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """How many axes the weight has."""
        return len(self.layout)

    @property
    def size(self) -> int:
        """How many entries the weight has."""
        return math.prod(self.shape)

    def __jax_array__(self) -> jax.Array:
        raise TypeError(
            f"A weight of shape {self.shape} is held as a {type(self).__name__}, and something "
            "reads it as an array. Lift the function that does with `lora_jax.adapt`."
        )

    def __getitem__(self, index: Any) -> jax.Array:
        return self.__jax_array__()

    __iter__ = None  # which an object with `__getitem__` would have


def is_held(leaf: Any) -> bool:
    """Whether ``leaf`` stands in place of a weight."""
    return isinstance(leaf, HeldWeight)
