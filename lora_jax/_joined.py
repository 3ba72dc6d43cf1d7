"""A product and a narrow one beside it, as one product.

    x @ w + t @ b   ==   [x t] @ [w; b]

Two products write their results, and their sum reads both again. One product of longer rows needs
copies of ``x`` and ``w`` instead, which is less where the output is wide, and it rounds once. Its
gradient with respect to ``x`` and ``t`` is one product too. On an H100 a step of a Llama of 1B
takes 3.4 % less (benchmarks/NOTES.md).

Only on a GPU: elsewhere an adapter that adds nothing changes no bit of the result.
"""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

BACKENDS = ("gpu",)

_ROW_SHARDS: contextvars.ContextVar[int | None] = contextvars.ContextVar("row_shards", default=None)
_APART = contextvars.ContextVar("apart", default=False)


@contextlib.contextmanager
def cut_by_rows(shards: int | None) -> Iterator[None]:
    """While it traces: into how many parts GSPMD cuts inputs, all of them along rows alone.

    JAX does not say how an array on such a mesh is cut; who put the arrays there knows. None is
    what holds outside: an input or a weight may be cut along an in axis.
    """
    token = _ROW_SHARDS.set(shards)
    try:
        yield
    finally:
        _ROW_SHARDS.reset(token)


def row_shards() -> int | None:
    """What was said last."""
    return _ROW_SHARDS.get()


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """While it traces, nothing is joined: under a vmap over ``b`` alone each would copy ``w``."""
    token = _APART.set(True)
    try:
        yield
    finally:
        _APART.reset(token)


def pays(rows: int, ins: int, outs: int) -> bool:
    """Whether copying ``(rows, ins)`` and ``(ins, outs)`` is less work than ``(rows, outs)``."""
    if _APART.get():
        return False
    return jax.default_backend() in BACKENDS and ins * (rows + outs) < rows * outs


def joined(
    x: jax.Array, t: jax.Array, w: jax.Array, b: jax.Array, spent: tuple[int, int], **params: Any
) -> jax.Array:
    """``x @ w + t @ b``, laid out as ``lax.dot_general`` lays out a product of its first operand.

    Args:
        x: ``(..., ins)``, ``ins`` being axis ``spent[0]``.
        t: ``x`` with ``rank`` in place of ``ins``.
        w: ``(ins, outs)``, ``ins`` being axis ``spent[1]``.
        b: ``w`` with ``rank`` in place of ``ins``.
        spent: The axes that are summed over.
        **params: ``precision`` and ``preferred_element_type`` of the product.
    """
    return _joined(spent, tuple(params.items()), x, t, w, b)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _joined(spent: tuple[int, int], params: Any, x: Any, t: Any, w: Any, b: Any) -> jax.Array:
    left, right = jnp.concatenate([x, t], spent[0]), jnp.concatenate([w, b], spent[1])
    return _product(spent, params, left, right)


def _product(spent: tuple[int, int], params: Any, left: jax.Array, right: jax.Array) -> jax.Array:
    contracting = ((spent[0],), (spent[1],))
    return lax.dot_general(left, right, (contracting, ((), ())), **dict(params))


def _jvp(spent: tuple[int, int], params: Any, primals: Any, tangents: Sequence[Any]) -> Any:
    x, t, w, b = primals
    dx, dt, dw, db = tangents
    terms = []
    pairs = [(x, dw), (t, db)]
    if _is_zero(dx) or _is_zero(dt):
        pairs += [(dx, w), (dt, b)]
    else:
        terms.append(_joined(spent, params, dx, dt, w, b))
    terms += [
        _product(spent, params, left, right)
        for left, right in pairs
        if not (_is_zero(left) or _is_zero(right))
    ]
    value = _joined(spent, params, *primals)
    return value, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(value)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


_joined.defjvp(_jvp, symbolic_zeros=True)
