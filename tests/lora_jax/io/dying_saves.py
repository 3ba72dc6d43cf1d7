"""Processes that save checkpoints until they are killed or the disk gives out.

Nothing here compiles, so a process that was forked with JAX imported saves after 0.2 s.
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.io import checkpoints

CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"}


def state(step):
    """A state whose every byte follows from its step."""
    rng = np.random.default_rng(step)
    arrays = {
        "kernel": rng.standard_normal((40, 300), np.float32),
        "ones": np.full((100, 100), step, np.float32),
        "norm": {"scale": np.full(3, step, jnp.bfloat16), "count": np.int32(step)},
    }
    key = rng.integers(2**32, size=2, dtype=np.uint32)
    return {**jax.device_put(arrays), "key": jax.random.wrap_key_data(jnp.asarray(key))}


def score(step):
    """A best step for every ten, and each of them better than or equal to the one before."""
    return (step * 7) % 10 / 10


def differences(found, step):
    """The leaves of a restored state that are not, bit for bit, those of its step."""
    wanted = jax.tree.leaves_with_path(state(step))
    pairs = zip(jax.tree.leaves(found), wanted, strict=True)
    return [jax.tree_util.keystr(path) for leaf, (path, want) in pairs if not same(leaf, want)]


def same(a, b):
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    a, b = np.asarray(a), np.asarray(b)
    return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def save_until_killed(directory, log, at):
    """Goes on from the latest step for ever; each step is logged once its save has returned.

    Args:
        directory: Of the checkpoints.
        log: A file that a line is added to for every step.
        at: The process kills itself at this change of a file in the directory; never if None.
    """
    left = at

    def hook(event, arguments):
        nonlocal left
        if event in CHANGES or (event == "open" and str(directory) in str(arguments[0])):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    manager = checkpoints.open_checkpoints(directory, keep=1)
    step = 0
    if manager.latest_step() is not None:
        step = checkpoints.restore(manager, state(0)).step
    if at is not None:
        sys.addaudithook(hook)
    with open(log, "ab", buffering=0) as lines:
        while True:
            step += 1
            checkpoints.save(manager, step, state(step), notes={"at": step}, score=score(step))
            lines.write(b"%d\n" % step)


def run_out_of(what, directory):
    """Saves step 1, then step 2 while writing fails, then step 2 once it does not.

    Args:
        what: ``file-size``: no file may grow beyond a limit, for several limits; ``space``: the
            disk is full but for a few KB; ``permission``: the disk is mounted read-only.
        directory: Of the checkpoints; for the last two, a small tmpfs.
    """
    directory = Path(directory)
    manager = checkpoints.open_checkpoints(directory, keep=1)
    checkpoints.save(manager, 1, state(1))
    for fail, recover in FAULTS[what](directory):
        fail()
        with pytest.raises(OSError, match="Checkpoint 2 could not be written") as raised:
            checkpoints.save(manager, 2, state(2))
        print(raised.value)
        check(directory, 1)
        recover()
    time.sleep(0.5)  # TensorStore's threads end what they had begun
    checkpoints.save(manager, 2, state(2))
    check(directory, 2)
    assert [path.name for path in directory.iterdir()] == ["2"]


def check(directory, only):
    """One step is listed, and a new reader restores it."""
    reader = checkpoints.open_checkpoints(directory)
    assert reader.all_steps() == [only]
    assert differences(checkpoints.restore(reader, state(0), only).state, only) == []


def file_size(directory):
    """Beyond the limit a write fails, as Python ignores the signal that would come first."""
    del directory
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 60, 200, 500, 1000, 20_000):
        yield (
            lambda size=size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1])),
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
        )


def space(directory):
    for free in (0, 8192, 32_768):
        filler = directory / "filler"

        def fill(filler=filler, free=free):
            room = os.statvfs(filler.parent)
            filler.write_bytes(bytes(room.f_bavail * room.f_frsize - free))

        yield fill, filler.unlink


def permission(directory):
    def mount(how):
        assert os.system(f"mount -o remount,{how} '{directory}'") == 0

    yield lambda: mount("ro"), lambda: mount("rw")


FAULTS = {"file-size": file_size, "space": space, "permission": permission}

if __name__ == "__main__":
    run_out_of(*sys.argv[1:])
