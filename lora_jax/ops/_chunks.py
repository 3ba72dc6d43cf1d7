"""Sums over the positions of a batch, a chunk of them at a time, gradient and all.

    sum_in_chunks(fn, params, rows, chunk=c)  ==  fn(params, rows)      where ``fn`` is such a sum

The logits of a large vocabulary are the largest buffer of a training step. Here those of one chunk
exist at a time, and what is differentiated is differentiated while they are there: the forward
pass leaves the gradient behind, and the backward pass scales it. Nothing is computed twice.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from .._compat import varying_axes

Aux = TypeVar("Aux")
AXIS = 1  # of positions, after that of examples, which devices may share


def sum_in_chunks(
    fn: Callable[[Any, Any], tuple[jax.Array, Aux]], params: Any, rows: Any, *, chunk: int
) -> tuple[jax.Array, Aux]:
    """Sums over positions: ``fn(params, rows)``, from chunks of ``rows``, and exactly that.

    Every chunk has all examples, so that a batch that is cut over devices stays where it is, and
    every device works on every chunk. Inside a ``shard_map`` the sums are those of the shard.

    Put it under ``jax.jit``, like all that differentiates. It has reverse mode only.

    Args:
        fn: ``(params, rows) -> (sum, aux)``: a scalar and a tree of arrays, all sums over the
            positions of ``rows``. What is traced has to come as an argument: a value closed over
            cannot be differentiated.
        params: A tree of arrays; adapted and quantised weights are trees too. Those that
            ``fn`` does not read should stay out: where they train, a buffer of zeros is summed.
        rows: A tree of arrays ``(examples, positions, ...)``; 1 example where all are alike.
        chunk: Positions of each example at a time; what is left over is a chunk of its own.

    Returns:
        The sum, ``()``, and ``aux``, both of at least 32 bits. The gradient of the sum is formed
        where one is asked for and nowhere else: that of a weight summed in at least float32 and
        rounded once, to the weight's dtype; that of ``rows`` in its own dtype. ``aux`` has none.

    Raises:
        ValueError: ``chunk`` is no whole number above 0, ``rows`` do not agree on their positions,
            or ``fn`` does not give a scalar and ``aux``.
    """
    positions = _positions(rows, chunk)
    leaves, tree = jax.tree.flatten((params, rows))
    leaves = [jnp.asarray(leaf) for leaf in leaves]
    count = len(jax.tree.leaves(params))
    job = _Job(lambda params, rows: fn(*tree.unflatten([*params, *rows])), positions, chunk)
    total, _ = _zero_sums(job, leaves[:count], leaves[count:])
    leaves = _as_varying(leaves, varying_axes(total))
    return _sum(job, leaves[:count], leaves[count:])


class _Job(NamedTuple):
    """What to sum: ``fn`` of two lists of leaves, over ``positions``, ``chunk`` at a time."""

    fn: Callable[[list[Any], list[Any]], tuple[jax.Array, Any]]
    positions: int
    chunk: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(job: _Job, params: list[Any], rows: list[Any]) -> tuple[jax.Array, Any]:
    def step(sums: Any, start: Any, size: int) -> Any:
        return _add(sums, job.fn(params, _cut(rows, start, size)))

    return _over_chunks(step, _zero_sums(job, params, rows), job)


def _forward(job: _Job, params: list[Any], rows: list[Any]) -> tuple[Any, Any]:
    """The sums, and the gradient of what is perturbed, in lists with None for all else."""
    wanted = [[leaf.value if leaf.perturbed else None for leaf in part] for part in (params, rows)]
    params, rows = ([leaf.value for leaf in part] for part in (params, rows))

    def step(carry: Any, start: Any, size: int) -> Any:
        sums, of_params, of_rows = carry
        given = _cut(rows, start, size)

        def value(some_params: list[Any], some_rows: list[Any]) -> tuple[jax.Array, Any]:
            return job.fn(_fill(some_params, params), _fill(some_rows, given))

        differentiated = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
        found, (by_params, by_rows) = differentiated(wanted[0], _cut(wanted[1], start, size))
        of_rows = jax.tree.map(
            lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, start, AXIS),
            *(of_rows, by_rows),
        )
        return _add(sums, found), _add(of_params, by_params), of_rows

    begin = (
        _zero_sums(job, params, rows),
        jax.tree.map(lambda leaf: jnp.zeros_like(leaf, _wide(leaf)), wanted[0]),
        jax.tree.map(jnp.zeros_like, wanted[1]),
    )
    sums, *gradient = _over_chunks(step, begin, job)
    return sums, jax.tree.map(lambda g, leaf: g.astype(leaf.dtype), gradient, wanted)


def _backward(job: _Job, gradient: Any, cotangents: tuple[Any, Any]) -> Any:
    del job
    scale = cotangents[0]
    if isinstance(scale, SymbolicZero):
        return jax.tree.map(lambda _: None, gradient)
    return jax.tree.map(lambda g: (g.astype(scale.dtype) * scale).astype(g.dtype), gradient)


_sum.defvjp(_forward, _backward, symbolic_zeros=True)


def _over_chunks(step: Callable[[Any, Any, int], Any], carry: Any, job: _Job) -> Any:
    """``step(carry, start, size)`` over all chunks: a loop over whole ones, then what is left."""
    count, rest = divmod(job.positions, job.chunk)
    if count > 1:
        starts = job.chunk * jnp.arange(count, dtype=jnp.int32)
        carry, _ = lax.scan(lambda c, start: (step(c, start, job.chunk), None), carry, starts)
    elif count:
        carry = step(carry, 0, job.chunk)
    return step(carry, count * job.chunk, rest) if rest else carry


def _zero_sums(job: _Job, params: list[Any], rows: list[Any]) -> Any:
    size = min(job.chunk, job.positions)
    given = jax.eval_shape(lambda p, r: job.fn(p, _cut(r, 0, size)), params, rows)
    if not (isinstance(given, tuple) and len(given) == 2):
        raise ValueError(f"`fn` must give a scalar and aux, got {given}.")
    if getattr(given[0], "shape", None) != ():
        raise ValueError(f"`fn` must give a scalar and aux, got a sum of {given[0]}.")
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, _wide(leaf)), given)


def _as_varying(leaves: list[jax.Array], axes: frozenset[str]) -> list[jax.Array]:
    """All leaves as shards that differ where the sum does: in a `shard_map` cotangents do."""
    missing = [tuple(sorted(axes - varying_axes(leaf))) for leaf in leaves]
    return [lax.pcast(x, a, to="varying") if a else x for x, a in zip(leaves, missing, strict=True)]


def _cut(rows: list[Any], start: Any, size: int) -> list[Any]:
    return jax.tree.map(lambda row: lax.dynamic_slice_in_dim(row, start, size, AXIS), rows)


def _fill(some: list[Any], others: list[Any]) -> list[Any]:
    """``some``, and ``others`` where it has None."""
    return [other if one is None else one for one, other in zip(some, others, strict=True)]


def _add(sums: Any, terms: Any) -> Any:
    return jax.tree.map(lambda total, term: total + jnp.asarray(term, total.dtype), sums, terms)


def _wide(leaf: Any) -> Any:
    """A dtype that sums of many such numbers fit in."""
    if leaf.dtype.itemsize >= 4:
        return leaf.dtype
    return jnp.float32 if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.int32


def _positions(rows: Any, chunk: int) -> int:
    """How many positions the rows have."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(rows)]
    counts = {shape[AXIS] if len(shape) > AXIS else None for shape in shapes}
    if len(counts) != 1 or None in counts:
        raise ValueError(
            f"`rows` must be arrays (examples, positions, ...) of as many positions, got {shapes}."
        )
    if not isinstance(chunk, (int, np.integer)) or chunk < 1:
        raise ValueError(f"`chunk` must be a whole number above 0, got {chunk!r}.")
    return counts.pop() or 0
