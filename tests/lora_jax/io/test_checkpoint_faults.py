"""Checkpoints under faults: what is listed restores, and what restores is what was saved."""

import gc
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from lora_jax.io import checkpoints
from tests.lora_jax.io.dying_saves import differences, save_until_killed, score, state

KILLS = int(os.environ.get("LORA_JAX_KILLS", "10"))
# Orbax writes these and reads them not at all, or can do without them.
IDLE = {"_CHECKPOINT_METADATA", "commit_success.txt", "_sharding"}
# Where an array cannot be read Orbax drops the tasks of the others; each complains when it ends.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _end_tasks():
    """So that none of them complains in a test of another module."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two steps; the first has the better score."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    manager = checkpoints.open_checkpoints(directory, keep=2)
    for step in (1, 2):
        checkpoints.save(manager, step, state(step), notes={"at": [step, 0.5]}, score=-step)
    manager.close()
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    """What makes a fresh copy of them, and opens it."""

    def make():
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(saved, tmp_path / "copy")
        return checkpoints.open_checkpoints(tmp_path / "copy", keep=2)

    return make


def files_of(directory):
    return sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())


def flip(content, place=None):
    place = len(content) * 4 if place is None else place  # in bits
    changed = bytearray(content)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def zero(content):
    start = len(content) // 2 // 4096 * 4096
    return content[:start] + bytes(len(content[start : start + 4096])) + content[start + 4096 :]


def halve(content):
    return content[: len(content) // 2]


def outcome(manager, caplog):
    """Which step the latest is restored from, once it is known to be the right one."""
    refused = None
    try:
        explicit = checkpoints.restore(manager, state(0), 2)
    except ValueError as error:
        refused = str(error).split("cannot be restored: ")[1]
    caplog.clear()
    latest = checkpoints.restore(manager, state(0))
    assert differences(latest.state, latest.step) == []
    assert latest.notes == {"at": [latest.step, 0.5]}
    if refused is None:
        assert explicit.step == latest.step == 2
        assert differences(explicit.state, 2) == []
        assert caplog.messages == []
    else:
        assert latest.step == 1
        (message,) = caplog.messages  # and nothing of what Orbax and asyncio have to say
        assert "Checkpoint 2 in" in message
        assert "Step 1 is used instead" in message
        assert manager.all_steps() == [1]
    return refused


@pytest.mark.parametrize("damage", [flip, zero, halve, None], ids=["flip", "zero", "half", "gone"])
def test_damage_to_any_file_is_found_or_does_no_harm(copy, caplog, damage):
    harmless = set()
    for file in files_of(copy().path(2)):
        manager = copy()
        path = manager.path(2) / file
        content = path.read_bytes()
        if damage is None:
            path.unlink()
        else:
            assert damage(content) != content
            path.write_bytes(damage(content))
        # The best is the first, whatever happened to the second.
        assert manager.best_step() == 1
        found = outcome(manager, caplog)
        if found is None:
            harmless.add(file)
        elif {"d", "manifest.ocdbt"} & set(file.parts):
            assert any(leaf in found for leaf in ("kernel", "ones", "norm/", "key")), found
    assert {file.name for file in harmless} >= IDLE
    # What holds the arrays, and what says what they must be, is never harmless.
    largest = max(files_of(copy().path(2)), key=lambda file: (copy().path(2) / file).stat().st_size)
    assert not {"manifest.json", largest.name} & {file.name for file in harmless}


def test_no_flipped_bit_of_the_arrays_is_restored(copy, caplog):
    rng = random.Random(0)
    for _ in range(40):
        manager = copy()
        file = max(manager.path(2).rglob("*"), key=lambda path: path.stat().st_size)
        content = file.read_bytes()
        file.write_bytes(flip(content, rng.randrange(8 * len(content))))
        assert outcome(manager, caplog) is not None


def test_no_flipped_bit_of_the_manifest_is_believed(copy, caplog):
    rng = random.Random(0)
    for _ in range(20):
        manager = copy()
        file = manager.path(2) / "manifest" / "manifest.json"
        content = file.read_bytes()
        file.write_bytes(flip(content, rng.randrange(8 * len(content))))
        assert manager.best_step() == 1
        assert "manifest" in outcome(manager, caplog)


def test_the_best_step_is_looked_for_among_those_that_can_say_so(copy, caplog):
    manager = copy()
    (manager.path(1) / "manifest" / "manifest.json").unlink()
    assert manager.best_step() == 2
    assert "Checkpoint 1 in" in caplog.text
    assert "has no score: its manifest is missing" in caplog.text


def test_a_damaged_best_is_not_deleted(copy):
    manager = copy()
    (manager.path(1) / "manifest" / "manifest.json").write_text("{}")
    for step in (3, 4):
        checkpoints.save(manager, step, state(step))
    names = {path.name for path in manager.directory.iterdir()}
    assert names == {"1.damaged", "2", "3", "4"}  # the second is now the best


def test_a_run_goes_on_from_the_step_before(copy):
    manager = copy()
    for _ in range(2):
        (manager.path(2) / "manifest" / "manifest.json").unlink()
        assert checkpoints.restore(manager, state(0)).step == 1
        assert sorted(path.name for path in manager.directory.iterdir()) == ["1", "2.damaged"]
        checkpoints.save(manager, 2, state(2))
        restored = checkpoints.restore(manager, state(0))
        assert differences(restored.state, restored.step) == []
        assert restored.step == 2


def test_where_none_can_be_restored_each_is_named_and_stays(copy):
    manager = copy()
    shutil.rmtree(manager.path(1) / "state")
    (manager.path(2) / "manifest" / "manifest.json").write_text("[]")
    message = r"No checkpoint in .*:\n  2: its manifest .* another kind.*\n  1: it cannot be read:"
    with pytest.raises(ValueError, match=message):
        checkpoints.restore(manager, state(0))
    assert manager.all_steps() == [1, 2]


def test_a_damaged_step_is_not_mistaken_for_another_state(copy, caplog):
    manager = copy()
    (manager.path(2) / "manifest" / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"Checkpoint 1 in .* holds another state"):
        checkpoints.restore(manager, {"kernel": state(0)["ones"]})
    assert manager.all_steps() == [1, 2]


def test_killed_at_any_moment(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([save_until_killed.__module__])
    directory, log = tmp_path / "checkpoints", tmp_path / "log"
    log.touch()
    rng, last = random.Random(0), 0
    for kill in range(KILLS):
        # By turns: at some change of some file, of which a save makes 30 to 80; or at some time.
        at = rng.randrange(1, 200) if kill % 2 else None
        before = log.stat().st_size
        process = context.Process(target=save_until_killed, args=(directory, log, at))
        process.start()
        if at is None:
            while log.stat().st_size == before and process.is_alive():
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.2))
            process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        last = check_after_kill(directory, log, last)
    manager = checkpoints.open_checkpoints(directory)
    step = manager.latest_step() + 1
    checkpoints.save(manager, step, state(step), score=score(step))
    names = {path.name for path in directory.iterdir()}
    assert names == {str(step), str(manager.best_step())}  # all that was left is swept


def check_after_kill(directory, log, before):
    """All that is listed restores; returns the last, given the last when the process started."""
    reported = max(map(int, log.read_text().split()), default=0)
    manager = checkpoints.open_checkpoints(directory)
    steps = manager.all_steps()
    last = max(steps, default=0)
    # Killed after a step was whole and before that was logged, there is one more than reported.
    assert last - max(reported, before) in (0, 1)
    for step in steps:
        restored = checkpoints.restore(manager, state(0), step)
        assert (differences(restored.state, step), restored.notes) == ([], {"at": step})
    if steps:
        best = max(range(1, last + 1), key=lambda step: (score(step), step))
        assert manager.best_step() == best
    # The latest, the best, and what the kill kept from being deleted.
    assert len(steps) <= 4
    manager.close()
    return last


def run(*command):
    program = "tests.lora_jax.io.dying_saves"
    return subprocess.run(
        [*command[:-2], sys.executable, "-m", program, *command[-2:]],
        capture_output=True,
        text=True,
    )


def test_a_write_that_fails(tmp_path):
    done = run("file-size", str(tmp_path / "checkpoints"))
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout


@pytest.mark.parametrize(
    ("what", "message"),
    [
        pytest.param("space", "No space left on device", id="disk-full"),
        pytest.param("permission", "Read-only file system", id="read-only"),
    ],
)
def test_a_disk_that_takes_no_more(tmp_path, what, message):
    mount = f"mount -t tmpfs -o size=1m none '{tmp_path}' && exec \"$@\""
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    if not shutil.which("unshare") or subprocess.run([*mounted, "true"]).returncode:
        pytest.skip("A process without privileges may not mount a tmpfs here.")
    done = run(*mounted, what, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert message in done.stdout


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(OSError, match="checkpoints"):
        checkpoints.open_checkpoints(tmp_path / "checkpoints")


def test_a_file_in_place_of_a_step(copy, caplog):
    manager = copy()
    (manager.directory / "3").write_text("")
    assert checkpoints.restore(manager, state(0)).step == 2
    assert "Checkpoint 3 in" in caplog.text
