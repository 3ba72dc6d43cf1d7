"""Real runs in processes of their own, on virtual CPU devices of this machine."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


STARTED: list[subprocess.Popen] = []


def end_all() -> None:
    """Kills what a failed test has left, and its children."""
    while STARTED:
        with STARTED.pop() as process:
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start(folder: Path, *arguments: str, devices: int = 2) -> subprocess.Popen:
    """``python -m train``."""
    process = subprocess.Popen(
        [sys.executable, "-m", "train", folder / "run.yaml", *arguments],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        },
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


def start_two(
    folder: Path, *arguments: str, each: tuple[str, ...] = ("training.seed=0", "training.seed=0")
) -> list[subprocess.Popen]:
    """Two processes of one run, of two devices each, told of each other on the command line.

    ``each`` holds an argument that is the process's own.
    """
    together = (f"distributed.coordinator=localhost:{free_port()}", "distributed.num_processes=2")
    return [
        start(folder, *arguments, *together, f"distributed.process_id={number}", each[number])
        for number in range(2)
    ]


def ended(process: subprocess.Popen, seconds: float = 200) -> tuple[int, str, str]:
    """What a process returned and printed; one that still runs after this time is killed."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        err += f"\nkilled: it still ran after {seconds} s"
    return process.returncode, out, err


def steps(folder: Path) -> dict[int, float]:
    """Step -> loss, as far as the run has come."""
    file = folder / "out" / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    rows = map(json.loads, lines)
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def wait_for_step(folder: Path, step: int, *running: subprocess.Popen) -> None:
    """Waits until a run has logged a step."""
    while max(steps(folder), default=0) < step:
        if dead := [process for process in running if process.poll() is not None]:
            raise AssertionError(f"it ended before step {step}: {ended(dead[0])}")
        time.sleep(0.05)


def wait_for_child(process: subprocess.Popen) -> int:
    """The process that a supervisor watches, once it has begun to load what it needs."""
    while True:
        with contextlib.suppress(ValueError):
            child = child_of(process)
            if "jaxlib" in Path(f"/proc/{child}/maps").read_text():
                return child
        time.sleep(0.05)


def child_of(process: subprocess.Popen) -> int:
    """The process that a supervisor watches."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (child,) = children
    return int(child)
