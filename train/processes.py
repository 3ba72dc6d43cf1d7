"""The processes of a run: each joins the others, and leaves when one of them is gone.

A process that fails leaves at once, without a word to the others: their next exchange of data ends
with an error, on which they leave too; or they wait in it, until JAX misses the other's signs of
life and aborts them (`distributed.heartbeat`), which `supervisor` explains.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from .cluster import group_of
from .config import DistributedSection
from .exit_codes import BAD_INPUT, FAILED, NOT_FINITE, PEER_GONE
from .stopping import StoppedError


def start(section: DistributedSection) -> None:
    """Joins the other processes, if there are any; before anything else asks for devices.

    Raises:
        ValueError: They cannot be found, or not all come.
    """
    group = group_of(section, os.environ)
    if group is None:
        return
    try:
        jax.distributed.initialize(
            group.coordinator, group.num_processes, group.process_id,
            heartbeat_timeout_seconds=section.heartbeat,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"The processes of this run did not come together ({error}). Told: coordinator "
            f"{group.coordinator}, process {group.process_id} of {group.num_processes}."
        ) from error


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def wait_for_all(what: str) -> None:
    """Goes on once all processes have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """Where there are several processes, one that fails ends here, and waits for no other.

    A way out through the interpreter's end would wait for all of them, who wait for this one.
    A run that stops because it was asked to does so in all processes, and leaves as ever.
    """
    try:
        yield
    except StoppedError:
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        code, message = _what_to_say(error)
        print(f"process {jax.process_index()}: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _what_to_say(error: Exception) -> tuple[int, str]:
    if isinstance(error, jax.errors.JaxRuntimeError):
        first = str(error).splitlines()[0]
        return PEER_GONE, (
            f"another process of the run is gone ({first}). Start all of them again with "
            "--resume: they go on from the last checkpoint."
        )
    if isinstance(error, ArithmeticError):
        return NOT_FINITE, f"error: {error}"
    if isinstance(error, ValueError):
        return BAD_INPUT, f"error: {error}"
    if isinstance(error, OSError):
        return FAILED, f"error: {error}"
    return FAILED, "".join(traceback.format_exception(error)).rstrip()
