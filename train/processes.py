"""The processes of a run: each joins the others, and leaves when one of them is gone.

A process that fails leaves at once, without a word to the others: their next exchange of data ends
with an error, on which they leave too; or they wait in it, until JAX misses the other's signs of
life and aborts them (`distributed.heartbeat`), which `supervisor` explains.
"""

import hashlib
import os
import secrets
import sys
import traceback

import jax
import numpy as np
from jax.experimental import multihost_utils

from .cluster import group_of
from .config import DistributedSection
from .exit_codes import FAILED, PEER_GONE, StoppedError, explained

OF_PEERS = ("UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "Gloo", "NCCL", "oordination")
"""Words of errors that come from another process."""


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


def check_alike(what: dict[str, str]) -> None:
    """Makes sure that all processes are about to run the same.

    Args:
        what: Name -> a text or hash that must be equal in all.

    Raises:
        ValueError: Names what differs from process 0.
    """
    if jax.process_count() == 1:
        return
    own = np.array([[*hashlib.sha256(text.encode()).digest()[:16]] for text in what.values()])
    first = multihost_utils.broadcast_one_to_all(own.astype(np.int32))
    equal = (np.asarray(first) == own).all(axis=1)
    wrong = [name for name, same in zip(what, equal, strict=True) if not same]
    if wrong:
        raise ValueError(
            f"Process {jax.process_index()} differs from process 0 in: {', '.join(wrong)}. All "
            "processes of a run need the same config, data and model."
        )


def agreed_word() -> str | None:
    """A word that is new, and the same in all processes; None of a process that is alone."""
    if jax.process_count() == 1:
        return None
    own = np.array([*secrets.token_bytes(8)], np.int32)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(own)).astype(np.uint8)).hex()


def leave_at_once(error: BaseException) -> None:
    """Where there are several processes, ends this one that has failed, and waits for no other.

    A way out through the interpreter's end would wait for all of them, who wait for this one.
    A run that stops because it was asked to does so in all processes, and leaves as ever.
    """
    if jax.process_count() == 1 or isinstance(error, StoppedError):
        return
    trace = FAILED, "".join(traceback.format_exception(error)).rstrip()
    code, message = _of_a_peer(error) or explained(error) or trace
    print(f"process {jax.process_index()}: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _of_a_peer(error: BaseException) -> tuple[int, str] | None:
    text = str(error)
    if isinstance(error, jax.errors.JaxRuntimeError) and any(word in text for word in OF_PEERS):
        return PEER_GONE, (
            f"another process of the run is gone ({text.splitlines()[0]}). Start all of them again "
            "with --resume: they go on from the last checkpoint."
        )
    return None
