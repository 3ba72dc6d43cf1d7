"""Primitives with a body: entered, so that an adapted weight stays factored inside.

A scan slices a stacked weight's factors with it; a loop that hands a weight on unchanged keeps it
out of its carry; a rematerialised body stays rematerialised, with its policy; `shard_map` gives
the factors the weight's own specs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from . import _compat
from ._tracked import Tracked, holds_codes, opened_codes, unstack

if TYPE_CHECKING:
    from ._interpret import Walk


def enter(walk: "Walk", eqn: Any, inputs: list[Any]) -> list[Any] | None:
    """Evaluates an equation with a body on tracked weights; None where it cannot be entered."""
    return _ENTER[eqn.primitive.name](walk, eqn, inputs)


def has_body(eqn: Any) -> bool:
    """Whether `enter` knows the equation's primitive."""
    return eqn.primitive.name in _ENTER


def _enter_jit(walk: "Walk", eqn: Any, inputs: list[Any]) -> list[Any]:
    params = eqn.params
    inputs = [_constrain(v, s) for v, s in zip(inputs, params["in_shardings"], strict=True)]
    if walk.keep_jit:
        outputs = _jitted(walk, params["jaxpr"], params["name"])(*inputs)
    else:
        outputs = _body(walk, params["jaxpr"])(*inputs)
    return [_constrain(v, s) for v, s in zip(outputs, params["out_shardings"], strict=True)]


@functools.lru_cache(maxsize=256)
def _jitted(walk: "Walk", jaxpr: Any, name: str) -> Callable[..., list[Any]]:
    """One jitted function for an inner jit, so that its calls share a trace and a compilation."""
    body = _body(walk, jaxpr)
    body.__name__ = name
    return jax.jit(body)


def _body(walk: "Walk", jaxpr: Any) -> Callable[..., list[Any]]:
    """A jaxpr as a function of values, whose results may be tracked weights too."""
    inner = _compat.open_jaxpr(jaxpr)

    def body(*values):
        return walk.evaluate(*inner, values)

    return body


def _plain_body(walk: "Walk", jaxpr: Any, eqn: Any) -> Callable[..., list[Any]]:
    """`_body`, with every result materialised."""
    body = _body(walk, jaxpr)
    return lambda *values: [walk.plain_operand(value, eqn) for value in body(*values)]


def _constrain(value: Any, sharding: Any) -> Any:
    """Keeps the sharding that an inner jit asks for; an adapted weight's factors follow it.

    Codes stay where they are: their axes are not the weight's.
    """
    if not isinstance(sharding, NamedSharding) or holds_codes(value):
        return value
    if isinstance(value, Tracked):
        w = lax.with_sharding_constraint(value.w, sharding)
        return value.rebuild(w, value.parts, value.labels)
    return lax.with_sharding_constraint(value, sharding)


def _enter_call(walk: "Walk", eqn: Any, inputs: list[Any]) -> list[Any]:
    jaxpr = eqn.params.get("call_jaxpr") or eqn.params["jaxpr"]
    return _body(walk, jaxpr)(*inputs)


def _enter_remat(walk: "Walk", eqn: Any, inputs: list[Any]) -> list[Any]:
    body = _body(walk, eqn.params["jaxpr"])
    keep = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(body, **keep)(*inputs)


def _enter_scan(walk: "Walk", eqn: Any, inputs: list[Any]) -> list[Any]:
    n_consts, n_carry = _compat.scan_counts(eqn)
    inner = _compat.open_jaxpr(eqn.params["jaxpr"])
    consts, carry, xs = _cut(inputs, n_consts, n_carry)
    fixed = _invariant(inner.jaxpr, n_consts, carry)
    moving = [i for i in range(n_carry) if i not in fixed]
    sliced = [unstack(x) for x in xs]

    def body(values, slices):
        full = [fixed.get(i) for i in range(n_carry)]
        for i, value in zip(moving, values, strict=True):
            full[i] = value
        rows = [restore(s) for (_, restore), s in zip(sliced, slices, strict=True)]
        outputs = walk.evaluate(*inner, [*consts, *full, *rows])
        outputs = [walk.plain_operand(v, eqn) if i not in fixed else None
                   for i, v in enumerate(outputs)]  # fmt: skip
        return [outputs[i] for i in moving], outputs[n_carry:]

    carry_in = [walk.plain_operand(carry[i], eqn) for i in moving]
    keep = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    if "_split_transpose" in eqn.params:
        keep["_split_transpose"] = eqn.params["_split_transpose"]
    carried, ys = lax.scan(body, carry_in, [arrays for arrays, _ in sliced], **keep)
    return [*_refill(fixed, moving, carried, n_carry), *ys]


def _enter_while(walk: "Walk", eqn: Any, inputs: list[Any]) -> list[Any]:
    n_test, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test_consts, body_consts, carry = _cut(inputs, n_test, n_body)
    test, inner = (_compat.open_jaxpr(eqn.params[f"{name}_jaxpr"]) for name in ("cond", "body"))
    fixed = _invariant(inner.jaxpr, n_body, carry)
    moving = [i for i in range(len(carry)) if i not in fixed]

    def full(values):
        return _refill(fixed, moving, values, len(carry))

    def keep_going(values):
        return walk.plain_operand(walk.evaluate(*test, [*test_consts, *full(values)])[0], eqn)

    def turn(values):
        outputs = walk.evaluate(*inner, [*body_consts, *full(values)])
        return [walk.plain_operand(outputs[i], eqn) for i in moving]

    carry_in = [walk.plain_operand(carry[i], eqn) for i in moving]
    return full(lax.while_loop(keep_going, turn, carry_in))


def _enter_cond(walk: "Walk", eqn: Any, inputs: list[Any]) -> list[Any] | None:
    if eqn.params.get("branches_platforms") is not None:
        return None
    branches = [_plain_body(walk, branch, eqn) for branch in eqn.params["branches"]]
    return lax.switch(inputs[0], branches, *inputs[1:])


def _enter_shard_map(walk: "Walk", eqn: Any, inputs: list[Any]) -> list[Any]:
    params = eqn.params
    opened = [opened_codes(value) for value in inputs]
    pairs = list(zip(opened, params["in_specs"], strict=True))
    inputs = [_spread(value, spec) for value, spec in pairs]
    specs = [_specs(value, spec) for value, (_, spec) in zip(inputs, pairs, strict=True)]
    return jax.shard_map(
        _plain_body(walk, params["jaxpr"], eqn),
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=list(params["out_specs"]),
        axis_names=params["newly_manual_axes"],
        check_vma=params["check_vma"],
    )(*inputs)


def _specs(value: Any, spec: PartitionSpec) -> Any:
    """The specs of a tracked weight: each part takes the weight's spec on the axes it owns."""
    if not isinstance(value, Tracked):
        return spec
    parts = [
        None if part is None else PartitionSpec(*_part_entries(value, i, spec))
        for i, part in enumerate(value.parts)
    ]
    return value.rebuild(spec, parts, value.labels)


def _spread(value: Any, spec: PartitionSpec) -> Any:
    """The value, knowing the mesh axes over which its parts are about to be sharded."""
    if not isinstance(value, Tracked):
        return value
    spread = tuple(
        frozenset(
            name
            for entry in _part_entries(value, i, spec)
            for name in (entry if isinstance(entry, tuple) else (entry,))
            if name is not None
        )
        for i in range(len(value.parts))
    )
    return dataclasses.replace(value, spread=spread)


def _part_entries(value: Tracked, part: int, spec: PartitionSpec) -> list[Any]:
    entries = [*spec, *[None] * (value.w.ndim - len(spec))]
    return [e if own else None for e, own in zip(entries, value.owned(part), strict=True)]


def _enter_barrier(walk: "Walk", eqn: Any, inputs: list[Any]) -> list[Any]:
    return list(lax.optimization_barrier(tuple(inputs)))


def _cut(values: list[Any], first: int, second: int) -> tuple[list[Any], list[Any], list[Any]]:
    return values[:first], values[first : first + second], values[first + second :]


def _invariant(jaxpr: Any, n_consts: int, carry: list[Any]) -> dict[int, Tracked]:
    """The tracked weights that a loop hands on unchanged, by their place in the carry."""
    return {
        i: value
        for i, value in enumerate(carry)
        if isinstance(value, Tracked) and jaxpr.outvars[i] is jaxpr.invars[n_consts + i]
    }


def _refill(fixed: dict[int, Any], moving: list[int], values: Sequence[Any], n: int) -> list[Any]:
    rest = dict(zip(moving, values, strict=True)) | fixed
    return [rest[i] for i in range(n)]


_ENTER: dict[str, Callable[["Walk", Any, list[Any]], list[Any] | None]] = {
    "jit": _enter_jit,
    "pjit": _enter_jit,
    "closed_call": _enter_call,
    "eval_jaxpr": _enter_call,
    "core_call": _enter_call,
    "remat2": _enter_remat,
    "checkpoint": _enter_remat,
    "scan": _enter_scan,
    "while": _enter_while,
    "cond": _enter_cond,
    "shard_map": _enter_shard_map,
    "optimization_barrier": _enter_barrier,
}
