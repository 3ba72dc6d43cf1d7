"""In which dtypes a step stores, computes and sums.

    y = x.astype(compute) @ w.astype(compute) + ...      loss, norms, sums of gradients: float32

Mixed precision (Micikevicius et al. 2017, arXiv 1710.03740): weights that train are kept in
float32, since their updates are small beside them, and rounded for the arithmetic alone.
"""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from .._held import is_held

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """One policy for all of a step.

    Attributes:
        base: Of the frozen weights, as they are kept.
        trained: Of what trains and of its optimizer's state, as they are kept.
        compute: Of the arithmetic; that of the base if None. Codes give back weights of it.

    Raises:
        ValueError: One of them is no floating dtype.

    >>> Precision(base="bfloat16").compute
    dtype(bfloat16)
    """

    base: Any = "float32"
    trained: Any = "float32"
    compute: Any = None

    def __post_init__(self):
        for name, dtype in vars(self).copy().items():
            dtype = jnp.dtype(self.base if dtype is None else dtype)
            if not jnp.issubdtype(dtype, jnp.floating):
                raise ValueError(f"`{name}` must be a floating dtype, got {dtype.name}.")
            object.__setattr__(self, name, dtype)

    def keep(self, frozen: Tree, trainable: Tree) -> tuple[Tree, Tree]:
        """Both halves in the dtypes that they are kept in; integers and codes stay."""
        return _cast(frozen, self.base, codes=False), _cast(trainable, self.trained, codes=False)

    def for_arithmetic(self, tree: Tree) -> Tree:
        """A tree in the dtype of the arithmetic; integers and keys stay."""
        return _cast(tree, self.compute, codes=True)


def _cast(tree: Any, dtype: Any, *, codes: bool) -> Any:
    def cast(leaf: Any) -> Any:
        if is_held(leaf):
            return leaf.astype(dtype) if codes else leaf
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree, is_leaf=is_held)
