"""`adapt`: a function of plain weights becomes a function of adapted weights.

The function is traced to a jaxpr on the plain weights' shapes; the jaxpr is evaluated with each
adapted weight as a `Tracked` value. An equation on plain values is bound as it stands; one on a
tracked weight goes by the weight's own rules, and one with a body is entered (`_control_flow`).
What is left materialises the weight, and says so.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, get_args

import jax
import numpy as np
from jax import lax

from . import (
    _compat,
    _products,  # noqa: F401  its rules
)
from ._control_flow import enter, has_body
from ._factored import Factored, factor
from ._held import is_held
from ._packed import pack, whole
from ._tracked import Step, Tracked, holds_codes
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
        fn: Any JAX function. What is not a JAX array among its arguments (strings, flags, None,
            numbers, NumPy arrays) reaches it as it is. A local ``custom_jvp`` or ``custom_vjp``
            function inside it takes what it needs as arguments: one that closes over a traced
            value cannot be differentiated once it is part of a jaxpr, here as under `jax.jit`.
        on_materialize: What to do where a weight meets an operation that needs it whole, such as
            a nonlinearity or a ``custom_vjp`` function that takes it as an argument: ``"warn"``
            and ``"error"`` name the weight, the primitive and the line, ``"allow"`` is silent.
            A materialised weight has no LoRA dropout.

    Returns:
        A function with the signature and results of ``fn`` that takes adapted weights, as
        `combine` makes them, and quantised ones anywhere in its arguments. It composes with every
        JAX transformation; each call traces ``fn`` again, so put it under `jax.jit`.

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
        return call(fn, walk, args, kwargs)

    return adapted  # type: ignore[return-value]


def call(
    fn: Callable[..., Any], walk: "Walk", args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Calls ``fn`` with every adapted or quantised weight tracked through its jaxpr."""
    leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=_travels)
    leaves = [leaf.w if isinstance(leaf, TrainedWeight) else leaf for leaf in leaves]
    if not any(map(_travels, leaves)):
        args, kwargs = treedef.unflatten(leaves)
        return fn(*args, **kwargs)
    places = [i for i, leaf in enumerate(leaves) if _travels(leaf) or _is_array(leaf)]
    values = [_tracked(leaves[place]) for place in places]
    jaxpr, rebuild = trace(fn, leaves, treedef, places, [_seen(value) for value in values])
    outputs = walk.evaluate(*_compat.open_jaxpr(jaxpr), values)
    return rebuild([walk.plain(value, "the function's result") for value in outputs])


def trace(
    fn: Callable[..., Any],
    leaves: list[Any],
    treedef: Any,
    places: list[int],
    arrays: Sequence[Any],
) -> tuple[Any, Callable[[Sequence[Any]], Any]]:
    """Traces ``fn`` as a function of its arrays.

    Args:
        fn: The function.
        leaves: The leaves of its ``(args, kwargs)``.
        treedef: Their structure.
        places: Which leaves are arrays to trace; the others reach ``fn`` as they are.
        arrays: These arrays, or their shapes.

    Returns:
        The closed jaxpr, and the function that rebuilds ``fn``'s result from the jaxpr's.
    """
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
    return isinstance(leaf, jax.Array)


def _travels(leaf: Any) -> bool:
    return is_node(leaf) or is_held(leaf)


def _tracked(leaf: Any) -> Any:
    if isinstance(leaf, LoraWeight):
        return factor(leaf)
    return pack(leaf) if is_held(leaf) else leaf


def _seen(value: Any) -> Any:
    """What ``fn`` is traced with: the array, or the type of the weight that codes stand for.

    Its shape and dtype, and where its entries are: on a mesh with explicit axes, in a `shard_map`.
    """
    if holds_codes(value):
        packed = value.w if isinstance(value, Factored) else value
        return jax.eval_shape(whole, packed.w)
    return value.w if isinstance(value, Tracked) else value


@dataclasses.dataclass(frozen=True)
class Walk:
    """How a jaxpr is evaluated on tracked weights.

    Attributes:
        on_materialize: ``"warn"``, ``"error"`` or ``"allow"``.
        keep_jit: Whether an inner jit stays a jit, traced once for all its calls; otherwise its
            body is evaluated in place each time.
        line: File and line of the equation whose body this is, for those inside without one.
    """

    on_materialize: OnMaterialize
    keep_jit: bool = True
    line: tuple[str, int] | None = dataclasses.field(default=None, compare=False)

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
        return [
            jax.numpy.asarray(atom.val) if isinstance(atom, _compat.Literal) else env[atom]
            for atom in jaxpr.outvars
        ]

    def plain(self, value: Any, reason: str, line: tuple[str, int] | None = None) -> Any:
        """The array itself; a tracked weight is materialised, and that is reported."""
        if not isinstance(value, Tracked):
            return value
        if value.reported and self.on_materialize != "allow":
            place = f" at {line[0]}:{line[1]}" if line else ""
            message = (
                f"The adapted weight {value.path!r} is materialised for {reason}{place}: the step "
                "then costs as much as full fine-tuning of this weight."
            )
            if self.on_materialize == "error":
                raise ValueError(
                    f"{message} Take the weight out of `targets`, or allow it with "
                    '`adapt(fn, on_materialize="allow")`.'
                )
            warnings.warn_explicit(message, MaterializeWarning, *(line or (__file__, 0)))
        return value.materialize()

    def _on_tracked(self, eqn, inputs, index, broadcasts) -> list[Any]:
        if has_body(eqn):
            outputs = enter(self.inside(eqn), eqn, inputs)
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
        line = _compat.source_line(eqn) or self.line
        return self.plain(value, f"`{eqn.primitive.name}`", line)

    def inside(self, eqn: Any) -> "Walk":
        """The walk over the body of an equation."""
        return dataclasses.replace(self, line=_compat.source_line(eqn) or self.line)


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
    if np.shape(operand) != eqn.outvars[0].aval.shape:  # the primitive repeats it by itself
        return operand
    if isinstance(atom, _compat.Literal) or atom not in broadcasts:
        return None
    source, params = broadcasts[atom]
    placed = params["broadcast_dimensions"]
    sizes = [1] * len(params["shape"])
    for axis, new in enumerate(placed):
        sizes[new] = source.shape[axis]
    return lax.broadcast_in_dim(source, sizes, placed)
