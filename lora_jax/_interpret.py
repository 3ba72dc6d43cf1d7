"""`adapt`: a function of plain weights becomes a function of adapted weights.

The function is traced to a jaxpr on the plain weights' shapes; the jaxpr is evaluated with each
adapted weight as a `Tracked` value. An equation on plain values is bound as it stands; one on a
tracked weight goes by the weight's own rules, and what has a body (jit, scan, while, cond, remat,
shard_map) is entered, so that the weight stays factored inside. What is left materialises the
weight, and says so.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, get_args

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from . import _compat
from ._factored import factor
from ._tracked import Step, Tracked
from ._weights import LoraWeight, TrainedWeight, is_node

Fn = TypeVar("Fn", bound=Callable[..., Any])
OnMaterialize = Literal["warn", "error", "allow"]


class MaterializeWarning(UserWarning):
    """An adapted weight was materialised: correct, but at the cost of full fine-tuning."""


def adapt(fn: Fn, *, on_materialize: OnMaterialize = "warn") -> Fn:
    """Lifts a function of weights onto the low-rank path: ``x @ w + (x @ a) @ (scale * b)``.

    The product ``a @ b`` is never formed, nor is a gradient of the size of ``w``. The function is
    not changed: it sees plain weights, whatever framework wrote it.

    Args:
        fn: Any JAX function. What is not an array among its arguments (strings, flags, None,
            Python numbers) reaches it as it is.
        on_materialize: What to do where a weight meets an operation that needs it whole, such as
            a nonlinearity or a ``custom_vjp`` function that takes it as an argument: ``"warn"``
            and ``"error"`` name the weight, the primitive and the line, ``"allow"`` is silent.
            A materialised weight has no LoRA dropout.

    Returns:
        A function with the signature and results of ``fn`` that takes adapted weights, as
        `combine` makes them, anywhere in its arguments. It composes with every JAX
        transformation.

    Raises:
        ValueError: ``on_materialize`` is unknown; from the returned function, with ``"error"``,
            where a weight cannot stay factored.

    Example:
        >>> from lora_jax import LoraConfig, adapt, combine, split
        >>> params = {"kernel": jax.numpy.ones((4, 6))}
        >>> config = LoraConfig(rank=2, alpha=4, targets=("kernel",))
        >>> frozen, trainable = split(params, config, jax.random.key(0))
        >>> forward = adapt(lambda params, x: x @ params["kernel"])
        >>> forward(combine(frozen, trainable), jax.numpy.ones((3, 4))).shape
        (3, 6)
    """
    if on_materialize not in get_args(OnMaterialize):
        raise ValueError(
            f"`on_materialize` is one of {get_args(OnMaterialize)}, got {on_materialize!r}."
        )
    walk = Walk(on_materialize)

    @functools.wraps(fn)
    def adapted(*args, **kwargs):
        return call(fn, walk, factor, args, kwargs)

    return adapted  # type: ignore[return-value]


def call(
    fn: Callable[..., Any],
    walk: "Walk",
    track: Callable[[LoraWeight], Tracked],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Calls ``fn`` with every `LoraWeight` in its arguments tracked through its jaxpr."""
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_node)
    leaves = [leaf.w if isinstance(leaf, TrainedWeight) else leaf for leaf in leaves]
    if not any(isinstance(leaf, LoraWeight) for leaf in leaves):
        args, kwargs = treedef.unflatten(leaves)
        return fn(*args, **kwargs)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, LoraWeight) or _is_array(leaf)]
    values = [track(v) if isinstance(v, LoraWeight) else v for v in (leaves[i] for i in places)]
    arrays = [value.w if isinstance(value, Tracked) else value for value in values]
    jaxpr, rebuild = _trace(fn, leaves, treedef, places, arrays)
    outputs = walk.evaluate(*_compat.open_jaxpr(jaxpr), values)
    return rebuild([walk.plain(value, "the function's result") for value in outputs])


def _trace(fn, leaves, treedef, places, arrays):
    """Traces ``fn`` as a function of its arrays; also gives what rebuilds its result from them."""
    result: dict[str, Any] = {}

    def flat(*arrays):
        filled = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            filled[place] = array
        args, kwargs = treedef.unflatten(filled)
        outputs, result["tree"] = jax.tree.flatten(fn(*args, **kwargs))
        result["static"] = [None if _is_array(output) else (output,) for output in outputs]
        return [output for output in outputs if _is_array(output)]

    jaxpr = jax.make_jaxpr(flat)(*arrays)

    def rebuild(outputs):
        rest = iter(outputs)
        return result["tree"].unflatten(
            next(rest) if static is None else static[0] for static in result["static"]
        )

    return jaxpr, rebuild


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


@dataclasses.dataclass(frozen=True)
class Walk:
    """How a jaxpr is evaluated on tracked weights.

    Attributes:
        on_materialize: ``"warn"``, ``"error"`` or ``"allow"``.
        keep_jit: Whether an inner jit stays a jit, traced once for all its calls; otherwise its
            body is evaluated in place each time.
    """

    on_materialize: OnMaterialize
    keep_jit: bool = True

    def evaluate(self, jaxpr: Any, consts: Sequence[Any], values: Sequence[Any]) -> list[Any]:
        """Evaluates a jaxpr; inputs and outputs are arrays or tracked weights."""
        env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))
        broadcasts: dict[Any, Any] = {}
        last_use = _last_uses(jaxpr)

        def read(atom):
            return atom.val if isinstance(atom, _compat.Literal) else env[atom]

        for index, eqn in enumerate(jaxpr.eqns):
            inputs = [read(atom) for atom in eqn.invars]
            with _compat.equation_context(eqn):
                if any(isinstance(value, Tracked) for value in inputs):
                    outputs = self._on_tracked(eqn, inputs, index, broadcasts)
                else:
                    outputs = _compat.bind(eqn, inputs)
                    if eqn.primitive.name == "broadcast_in_dim":
                        broadcasts[eqn.outvars[0]] = (inputs[0], eqn.params)
            env.update(zip(eqn.outvars, outputs, strict=True))
            for var in last_use.get(index, ()):
                env.pop(var, None)
        return [read(atom) for atom in jaxpr.outvars]

    def plain(self, value: Any, reason: str, line: str | None = None) -> Any:
        """The array itself; a tracked weight is materialised, and that is reported."""
        if not isinstance(value, Tracked):
            return value
        if value.reported and self.on_materialize != "allow":
            place = f" at {line}" if line else ""
            message = (
                f"The adapted weight {value.path!r} is materialised for {reason}{place}: the step "
                "then costs as much as full fine-tuning of this weight."
            )
            if self.on_materialize == "error":
                raise ValueError(
                    f"{message} Take the weight out of `targets`, or allow it with "
                    '`adapt(fn, on_materialize="allow")`.'
                )
            warnings.warn(message, MaterializeWarning, stacklevel=2)
        return value.materialize()

    def _on_tracked(self, eqn, inputs, index, broadcasts) -> list[Any]:
        name = eqn.primitive.name
        if enter := _ENTER.get(name):
            outputs = enter(self, eqn, inputs)
            if outputs is not None:
                return outputs
        else:
            first = next(i for i, value in enumerate(inputs) if isinstance(value, Tracked))
            operands = [
                value if i == first else self.plain_operand(value, eqn)
                for i, value in enumerate(inputs)
            ]
            unbroadcast = functools.partial(_unbroadcast, eqn, operands, broadcasts)
            step = Step(eqn, operands, first, index, unbroadcast)
            outputs = inputs[first].apply(step)
            if outputs is not None:
                return outputs
            inputs = operands
        return _compat.bind(eqn, [self.plain_operand(value, eqn) for value in inputs])

    def plain_operand(self, value: Any, eqn: Any) -> Any:
        """`plain`, for an operand of an equation."""
        if not isinstance(value, Tracked):
            return value
        return self.plain(value, f"`{eqn.primitive.name}`", _compat.source_line(eqn))

    def body(self, jaxpr: Any, eqn: Any, *, plain: bool = True) -> Callable[..., list[Any]]:
        """A jaxpr as a function of values; ``plain`` materialises tracked results."""
        inner = _compat.open_jaxpr(jaxpr)

        def run(*values):
            outputs = self.evaluate(*inner, values)
            return [self.plain_operand(v, eqn) for v in outputs] if plain else outputs

        run.__name__ = str(eqn.params.get("name", eqn.primitive.name))
        return run


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """For each equation, the variables that nothing after it reads."""
    kept = {atom for atom in jaxpr.outvars if not isinstance(atom, _compat.Literal)}
    last: dict[Any, int] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        for atom in (*eqn.invars, *eqn.outvars):
            if not isinstance(atom, _compat.Literal) and atom not in kept:
                last[atom] = index
    uses: dict[int, list[Any]] = {}
    for var, index in last.items():
        uses.setdefault(index, []).append(var)
    return uses


def _unbroadcast(eqn, operands, broadcasts, position) -> jax.Array | None:
    """An operand before its broadcast: a scalar, or its repeated axes of size 1."""
    operand = operands[position]
    if np.ndim(operand) == 0:
        return jax.numpy.asarray(operand)
    atom = eqn.invars[position]
    if isinstance(atom, _compat.Literal) or atom not in broadcasts:
        return None
    source, params = broadcasts[atom]
    placed = params["broadcast_dimensions"]
    sizes = [1] * len(params["shape"])
    for axis, new in enumerate(placed):
        sizes[new] = source.shape[axis]
    return lax.broadcast_in_dim(source, sizes, placed)


# --- primitives with a body ----------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _jitted(walk: Walk, jaxpr: Any, eqn: "_Identity") -> Callable[..., Any]:
    return jax.jit(walk.body(jaxpr, eqn.value, plain=False))


class _Identity:
    """Carries an equation past a cache whose key it is not part of."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, _Identity)

    def __hash__(self):
        return 0


def _enter_jit(walk: Walk, eqn: Any, inputs: list[Any]) -> list[Any]:
    params = eqn.params
    inputs = [_constrain(v, s) for v, s in zip(inputs, params["in_shardings"], strict=True)]
    if walk.keep_jit:
        outputs = _jitted(walk, params["jaxpr"], _Identity(eqn))(*inputs)
    else:
        outputs = walk.body(params["jaxpr"], eqn, plain=False)(*inputs)
    return [_constrain(v, s) for v, s in zip(outputs, params["out_shardings"], strict=True)]


def _constrain(value: Any, sharding: Any) -> Any:
    """Keeps the sharding that an inner jit asks for; an adapted weight's factors follow it."""
    if not isinstance(sharding, NamedSharding):
        return value
    if isinstance(value, Tracked):
        w = lax.with_sharding_constraint(value.w, sharding)
        return value.rebuild(w, value.parts, value.labels)
    return lax.with_sharding_constraint(value, sharding)


def _enter_call(walk: Walk, eqn: Any, inputs: list[Any]) -> list[Any]:
    jaxpr = eqn.params.get("call_jaxpr") or eqn.params["jaxpr"]
    return walk.body(jaxpr, eqn, plain=False)(*inputs)


def _enter_remat(walk: Walk, eqn: Any, inputs: list[Any]) -> list[Any]:
    body = walk.body(eqn.params["jaxpr"], eqn, plain=False)
    keep = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(body, **keep)(*inputs)


def _enter_scan(walk: Walk, eqn: Any, inputs: list[Any]) -> list[Any]:
    n_consts, n_carry = _compat.scan_counts(eqn)
    inner = _compat.open_jaxpr(eqn.params["jaxpr"])
    consts, carry, xs = _cut(inputs, n_consts, n_carry)
    fixed = _invariant(inner.jaxpr, n_consts, 0, carry)
    moving = [i for i in range(n_carry) if i not in fixed]
    sliced = [x.unstack() if isinstance(x, Tracked) else ([x], _first) for x in xs]

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


def _enter_while(walk: Walk, eqn: Any, inputs: list[Any]) -> list[Any]:
    n_test, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    test_consts, body_consts, carry = _cut(inputs, n_test, n_body)
    test, inner = (_compat.open_jaxpr(eqn.params[f"{name}_jaxpr"]) for name in ("cond", "body"))
    fixed = _invariant(inner.jaxpr, n_body, 0, carry)
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


def _enter_cond(walk: Walk, eqn: Any, inputs: list[Any]) -> list[Any] | None:
    if eqn.params.get("branches_platforms") is not None:
        return None
    branches = [walk.body(branch, eqn) for branch in eqn.params["branches"]]
    return lax.switch(inputs[0], branches, *inputs[1:])


def _enter_shard_map(walk: Walk, eqn: Any, inputs: list[Any]) -> list[Any]:
    params = eqn.params
    specs = [_specs(value, spec) for value, spec in zip(inputs, params["in_specs"], strict=True)]
    return jax.shard_map(
        walk.body(params["jaxpr"], eqn),
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
    entries = [*spec, *[None] * (value.w.ndim - len(spec))]
    parts = [
        None
        if part is None
        else PartitionSpec(
            *(e if own else None for e, own in zip(entries, value.owned(i), strict=True))
        )
        for i, part in enumerate(value.parts)
    ]
    return value.rebuild(spec, parts, value.labels)


def _enter_barrier(walk: Walk, eqn: Any, inputs: list[Any]) -> list[Any]:
    return list(lax.optimization_barrier(tuple(inputs)))


def _cut(values: list[Any], first: int, second: int) -> tuple[list[Any], list[Any], list[Any]]:
    return values[:first], values[first : first + second], values[first + second :]


def _invariant(jaxpr: Any, n_consts: int, offset: int, carry: list[Any]) -> dict[int, Tracked]:
    """The tracked weights that a loop hands on unchanged, by their place in the carry."""
    return {
        i: value
        for i, value in enumerate(carry)
        if isinstance(value, Tracked) and jaxpr.outvars[offset + i] is jaxpr.invars[n_consts + i]
    }


def _refill(fixed: dict[int, Any], moving: list[int], values: Sequence[Any], n: int) -> list[Any]:
    rest = dict(zip(moving, values, strict=True)) | fixed
    return [rest[i] for i in range(n)]


def _first(slices: Sequence[Any]) -> Any:
    return slices[0]


_ENTER: dict[str, Callable[[Walk, Any, list[Any]], list[Any] | None]] = {
    "jit": _enter_jit,
    "pjit": _enter_jit,
    "closed_call": _enter_call,
    "core_call": _enter_call,
    "remat2": _enter_remat,
    "checkpoint": _enter_remat,
    "scan": _enter_scan,
    "while": _enter_while,
    "cond": _enter_cond,
    "shard_map": _enter_shard_map,
    "optimization_barrier": _enter_barrier,
}
