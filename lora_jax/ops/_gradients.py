"""A function with the gradient of another.

    with_gradient_of(fn, twin)(x)  ==  fn(x)            its gradient: that of twin

For two functions that compute the same and round differently. A product of bfloat16 matrices that
is summed in float32 hands a float32 cotangent back, and products of that run at a fraction of the
rate: with the twin that sums in bfloat16, the cotangent is rounded first.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


def with_gradient_of(
    fn: Callable[..., jax.Array], twin: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """``fn``, differentiated as ``twin``.

    Args:
        fn: What gives the value, one array. What is traced has to come as an argument: a value
            closed over cannot be differentiated.
        twin: A function of the same arguments and shape. The cotangent is rounded to its dtype.
            Its own value is computed only where its gradient reads it.

    Returns:
        A function of the same arguments, trees of arrays, differentiable in all of them.
    """

    def both(*args: Any) -> jax.Array:
        leaves, tree = jax.tree.flatten(args)
        functions = (lambda leaves, f=f: f(*tree.unflatten(leaves)) for f in (fn, twin))
        return _value(_Pair(*functions), leaves)

    return both


class _Pair(NamedTuple):
    fn: Callable[[list[Any]], jax.Array]
    twin: Callable[[list[Any]], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _value(pair: _Pair, leaves: list[Any]) -> jax.Array:
    return pair.fn(leaves)


def _forward(pair: _Pair, leaves: list[Any]) -> tuple[jax.Array, Any]:
    """The value; the leaves that are perturbed and those that are not, None for the others."""
    perturbed = [leaf.value if leaf.perturbed else None for leaf in leaves]
    fixed = [None if leaf.perturbed else leaf.value for leaf in leaves]
    return pair.fn([leaf.value for leaf in leaves]), (perturbed, fixed)


def _backward(pair: _Pair, residuals: Any, cotangent: jax.Array) -> tuple[list[Any]]:
    perturbed, fixed = residuals

    def twin(some: list[Any]) -> jax.Array:
        return pair.twin([f if s is None else s for s, f in zip(some, fixed, strict=True)])

    value, pullback = jax.vjp(twin, perturbed)
    return pullback(cotangent.astype(value.dtype))


_value.defvjp(_forward, _backward, symbolic_zeros=True)
