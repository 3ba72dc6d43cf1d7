"""What differs between the JAX versions that we support, and what JAX keeps to itself.

The only module that may look inside ``jax._src``.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax._src import core, source_info_util
from jax.extend.core import Literal as Literal, Var as Var


class OpenJaxpr(NamedTuple):
    """A jaxpr and the constants that it closes over."""

    jaxpr: Any
    consts: Sequence[Any]


def open_jaxpr(jaxpr: Any) -> OpenJaxpr:
    """Opens a closed jaxpr; an open one has no constants. JAX 0.12 has one class for both."""
    return OpenJaxpr(getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ())))


def bind(eqn: Any, inputs: Sequence[Any]) -> list[Any]:
    """Binds an equation's primitive to ``inputs`` as it stands."""
    outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


@contextlib.contextmanager
def equation_context(eqn: Any):
    """Binds inside this context carry the equation's source line, name stack and settings."""
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with (
        source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack),
        eqn.ctx.manager,
    ):
        yield


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes over which an array differs inside a `shard_map`."""
    return frozenset(jax.typeof(x).mat.varying)


def source_line(eqn: Any) -> tuple[str, int] | None:
    """File and line of the user's own code that made the equation; None if JAX's own did."""
    frame = source_info_util.user_frame(eqn.source_info.traceback)
    return (frame.file_name, frame.start_line) if frame else None


def scan_counts(eqn: Any) -> tuple[int, int]:
    """Constants and carries of a ``scan`` equation. JAX 0.12 keeps them as trees."""
    if "num_consts" in eqn.params:
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = (len(part.vals) for part in eqn.params["ft_in"].unpack())
    return consts, carry


def is_tracing() -> bool:
    """Whether something is being traced: a call now would become part of it."""
    return not core.trace_state_clean()
