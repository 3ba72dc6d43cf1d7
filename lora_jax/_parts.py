"""Fused kernels, adapted in part: each chosen part of the out axis has factors of its own.

    x @ w + scale * concat(x @ a_0 @ b_0, 0, x @ a_2 @ b_2)      w: (in, 3 * out)

GPT-2 keeps query, key and value as one kernel, and the paper adapts query and value alone
(arXiv 2106.09685, 4.2). The parts that are not chosen have no parameters. As factors of the
whole weight the same update has a block for each chosen part:

    a = [a_0 a_2]      b = | b_0   0    0  |
                           |  0    0   b_2 |
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ._config import Layout, Parts
from ._targets import Target
from ._weights import Factors, LoraFactors, draw_a, factor_shapes, path_key

Shapes = tuple[tuple[int, ...], tuple[int, ...]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PartFactors(Factors):
    """Factors of the ``n`` chosen parts of a weight: its only leaves are ``a`` and ``b``.

    Attributes:
        a: ``(*stack, *in, n, rank)``.
        b: ``(*stack, n, rank, out / len(parts))``.
        scale: ``alpha / rank``, with the rank of one part.
        parts: Which of the equal parts of the weight's one out axis have factors, static.
    """

    parts: Parts = dataclasses.field(kw_only=True, metadata={"static": True})

    def whole(self) -> LoraFactors:
        """The same update as factors of rank ``n * rank``, ``b`` zero outside its blocks.

        Dropout is one mask for all parts, since they share one input.
        """
        *rest, n, rank = self.a.shape
        width = self.b.shape[-1]
        a = jnp.reshape(self.a, (*rest, n * rank))
        blocks = jnp.split(self.b, n, axis=-3)
        chosen = (part for part, is_chosen in enumerate(self.parts) if is_chosen)
        rows = [
            _pad(jnp.squeeze(block, -3), part * width, (len(self.parts) - part - 1) * width)
            for part, block in zip(chosen, blocks, strict=True)
        ]
        b = jnp.concatenate(rows, axis=-2)
        return LoraFactors(a, b, self.scale, self.layout, self.dropout)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether these are factors of a weight of this shape."""
        if len(shape) != len(self.layout) or self.layout.count("out") != 1:
            return False
        divides = shape[self.layout.index("out")] % len(self.parts) == 0
        wanted = part_shapes(shape, self.layout, self.rank, self.parts)
        return divides and (self.a.shape, self.b.shape) == wanted


def init_part_factors(
    path: str, weight: Any, target: Target, dropout: float, key: jax.Array
) -> PartFactors:
    """Draws the factors of the chosen parts, each ``a`` as `init_factors` draws that of a weight.

    A part folds its index into the weight's key, so its ``a`` differs from every other part's
    and does not depend on which other parts are chosen.

    Args:
        path: The weight's path.
        weight: The weight, or anything with its ``shape`` and ``dtype``.
        target: Its layout, rank, scale and parts.
        dropout: Probability of dropping an entry of the input of ``a``.
        key: The key of the whole tree.
    """
    layout, parts, key = target.layout, target.parts or (), path_key(key, path)
    one_a, _ = factor_shapes(weight.shape, layout, target.rank)
    drawn = [
        draw_a(jax.random.fold_in(key, part), one_a, weight, layout)
        for part, is_chosen in enumerate(parts)
        if is_chosen
    ]
    a = jnp.stack(drawn, axis=-2)
    b = jnp.zeros(target_shapes(weight.shape, target)[1], a.dtype)
    return PartFactors(a, b, target.scale, layout, dropout, parts=parts)


def part_shapes(shape: tuple[int, ...], layout: Layout, rank: int, parts: Parts) -> Shapes:
    """Shapes of ``a`` and ``b``: ``(*stack, *in, n, rank)`` and ``(*stack, n, rank, out / parts)``.

    >>> part_shapes((12, 64, 192), ("stack", "in", "out"), 8, parts=(True, False, True))
    ((12, 64, 2, 8), (12, 2, 8, 64))
    """
    n = sum(parts)
    (*rest, _), (*stack, _, out) = factor_shapes(shape, layout, rank)
    return (*rest, n, rank), (*stack, n, rank, out // len(parts))


def target_shapes(shape: tuple[int, ...], target: Target) -> Shapes:
    """Shapes of ``a`` and ``b`` of a weight of this shape, adapted whole or in part."""
    if target.parts:
        return part_shapes(shape, target.layout, target.rank, target.parts)
    return factor_shapes(shape, target.layout, target.rank)


def _pad(block: jax.Array, before: int, after: int) -> jax.Array:
    """Zeros on both sides of the last axis."""
    return jnp.pad(block, ((0, 0),) * (block.ndim - 1) + ((before, after),))
