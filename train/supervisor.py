"""A run in a process of its own, watched by this one: started again if it dies, and explained.

Needed where a run can end without a word of its own: one process of several is aborted by JAX
when another is gone. Nothing here imports JAX.
"""

import ctypes
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .exit_codes import BAD_INPUT, FAILED, INTERRUPTED, NOT_FINITE, PEER_GONE

WATCHED = "LORA_JAX_WATCHED"
"""In the environment of the process that is watched: a word that is the same for all attempts. A
run leaves it in its directory, so that the next attempt knows the directory for its own and goes
on with it, whatever the command line says of what it finds there."""
FINAL = {0, BAD_INPUT, NOT_FINITE, INTERRUPTED, 128 + signal.SIGINT, 128 + signal.SIGTERM}
"""Exit codes after which starting again would change nothing, or is not wanted."""


def supervise(arguments: Sequence[str], max_restarts: int, *, several: bool) -> int:
    """Runs the application with these arguments.

    Args:
        arguments: The command line, without the program.
        max_restarts: How often to go on from the last checkpoint after a crash.
        several: Whether it is one process of several.

    Returns:
        The exit code of the last attempt; `PEER_GONE` if JAX aborted it for another's sake.
    """
    token = secrets.token_hex(8)
    code = FAILED
    for attempt in range(max_restarts + 1):
        code, passed_on = _run(arguments, token)
        if passed_on:
            return 128 + passed_on if code < 0 else code
        if code in FINAL:
            return code
        code, why = _explained(code, several)
        again = attempt < max_restarts
        after = f"starting again ({attempt + 1} of {max_restarts})" if again else "use --resume"
        print(f"{why}: {after}, from the last checkpoint.", file=sys.stderr, flush=True)
    return code


def _run(arguments: Sequence[str], token: str) -> tuple[int, int]:
    """One attempt: its exit code, and the number of a signal that was passed on to it, or 0."""
    program = [sys.executable, "-m", str(__package__), *arguments]
    path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {WATCHED: token, "PYTHONPATH": os.pathsep.join(path)}
    # A group of its own: a terminal's Ctrl-C would reach it twice.
    child = subprocess.Popen(program, env=environment, process_group=0, preexec_fn=_die_with_parent)

    passed_on = []

    def pass_on(number: int, frame: Any) -> None:
        del frame
        passed_on.append(number)
        child.send_signal(number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        return child.wait(), passed_on[0] if passed_on else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explained(code: int, several: bool) -> tuple[int, str]:
    if several and code in (PEER_GONE, -signal.SIGABRT):
        return PEER_GONE, "Another process of this run is gone"
    if code < 0:
        return 128 - code, f"The run was ended by signal {signal.Signals(-code).name}"
    return code or FAILED, f"The run ended with exit code {code}"


def _die_with_parent() -> None:
    """Linux ends this process when its parent is gone, however that went."""
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
