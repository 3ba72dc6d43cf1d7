"""Runs of several processes, and runs that are stopped, killed, and gone on with elsewhere."""

import os
import signal
import sys

import numpy as np
import pytest

from tests.train.running import (
    child_of,
    end_all,
    ended,
    start,
    start_two,
    steps,
    wait_for_child,
    wait_for_step,
)
from train import cli, cluster
from train.config import DistributedSection

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc of Linux")
SLOW = "training.steps=120"  # long enough to be interrupted
SHORT = ("training.log_every=1", "training.save_every=120", "training.evaluate_every=120")


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    end_all()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, write_run):
    """Step -> loss of a run on 8 devices that nothing interrupts."""
    folder = write_run(tmp_path_factory.mktemp("whole"))
    assert cli.main([str(folder / "run.yaml"), SLOW, *SHORT]) == 0
    return steps(folder)


def test_a_run_goes_on_elsewhere_and_is_the_same_run(folder, whole):
    # Eight devices of one process, which SIGTERM stops.
    one = start(folder, SLOW, *SHORT, devices=8)
    wait_for_step(folder, 20, one)
    one.send_signal(signal.SIGTERM)
    code, _, err = ended(one)
    assert code == 128 + signal.SIGTERM, err
    first = max(steps(folder))
    assert f"saved at step {first} of 120" in err
    # Two processes of two devices; either's SIGINT stops both, at one step.
    two = start_two(folder, SLOW, *SHORT, "--resume")
    wait_for_step(folder, first + 20, *two)
    two[1].send_signal(signal.SIGINT)
    (code, out, err), (other, quiet, other_err) = map(ended, two)
    assert (code, other) == (128 + signal.SIGTERM,) * 2, err + other_err
    second = max(steps(folder))
    assert f"saved at step {second} of 120" in err
    assert f"saved at step {second} of 120" in other_err
    assert f"resuming at step {first} of 120" in out
    assert "step" not in quiet
    # Four devices finish it.
    code, out, err = ended(start(folder, SLOW, *SHORT, "--resume", devices=4))
    assert code == 0, err
    assert f"resuming at step {second} of 120" in out
    assert (folder / "out" / "adapter" / "adapter_model.safetensors").is_file()
    found = steps(folder)
    assert list(found) == list(whole) == list(range(1, 121))
    # The sums of float32 are taken in another order, and every update builds on the last.
    early = [step for step in whole if step <= second + 10]
    np.testing.assert_allclose(
        [found[step] for step in early], [whole[step] for step in early], rtol=1e-3
    )


def test_who_is_left_says_that_another_process_is_gone(folder):
    two = start_two(folder, SLOW, *SHORT, "distributed.heartbeat=5")
    wait_for_step(folder, 3, *two)
    two[1].kill()
    code, _, err = ended(two[0])
    assert code == 4, err
    assert "Another process of this run is gone" in err
    assert "--resume" in err


def test_what_is_wrong_in_all_processes_is_said_by_each(folder):
    found = [ended(process) for process in start_two(folder, "data.train=missing.csv")]
    assert [code for code, _, _ in found] == [2, 2]
    assert all("missing.csv" in err for _, _, err in found)


def test_a_run_that_is_killed_starts_again_by_itself(folder, whole):
    assert cli.main([str(folder / "run.yaml"), "training.steps=2"]) == 0
    run = start(folder, SLOW, "training.log_every=1", "training.save_every=5", "--overwrite",
                "training.evaluate_every=120", "--max-restarts=2", devices=8)  # fmt: skip
    os.kill(wait_for_child(run), signal.SIGKILL)  # before it has touched the old run
    wait_for_step(folder, 12, run)
    os.kill(child_of(run), signal.SIGKILL)
    code, out, err = ended(run)
    assert code == 0, err
    assert "ended by signal SIGKILL: starting again (1 of 2)" in err
    assert "starting again (2 of 2)" in err
    assert out.count("resuming at step") == 1
    assert steps(folder) == whole


def test_one_that_is_asked_to_stop_is_not_started_again(folder):
    run = start(folder, SLOW, "--max-restarts=3")
    wait_for_child(run)
    run.send_signal(signal.SIGTERM)
    code, _, err = ended(run)
    assert code == 128 + signal.SIGTERM
    assert "starting again" not in err


def test_processes_must_run_the_same_and_share_a_directory(folder):
    (folder / "other.csv").write_text((folder / "rows.csv").read_text().replace("film", "plot"))
    two = start_two(folder, SLOW, each=("data.train=rows.csv", "data.train=other.csv"))
    (_, _, _), (code, _, err) = map(ended, two)
    assert code == 2
    assert "differs from process 0 in: the train rows, the validation rows" in err
    two = start_two(folder, SLOW, each=("output.directory=a", "output.directory=b"))
    (_, _, _), (code, _, err) = map(ended, two)
    assert code == 2
    assert "must be on a disk that all processes share" in err


def test_what_is_wrong_with_the_config_is_not_tried_again(folder):
    code, _, err = ended(start(folder, "training.batch_size=3", "--max-restarts=3"))
    assert code == 2
    assert err.count("does not divide") == 1


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"COORDINATOR_ADDRESS": "here:1"}, "set JAX_PROCESS_ID and JAX_NUM_PROCESSES too"),
        (
            {"COORDINATOR_ADDRESS": "here:1", "PROCESS_ID": "one", "NUM_PROCESSES": "2"},
            "PROCESS_ID must be a number, got 'one'",
        ),
    ],
)
def test_environments_that_say_too_little(environment, message):
    with pytest.raises(ValueError, match=message):
        cluster.group_of(DistributedSection(), environment)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"coordinator": "here:1"}, "coordinator alone say too little"),
        ({"coordinator": "here:1", "process_id": 2, "num_processes": 2}, "2 is none of 2"),
    ],
)
def test_sections_that_say_too_little(section, message):
    with pytest.raises(ValueError, match=message):
        DistributedSection(**section)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("distributed:\n  coordinator: here:1\n", True),
        ("distributed:\n  coordinator: null\n  heartbeat: 20\n", False),
        ("model:\n  path: a\n", False),
    ],
)
def test_a_file_can_say_it(tmp_path, text, told):
    (tmp_path / "run.yaml").write_text(text)
    assert cluster.is_told(str(tmp_path / "run.yaml"), [], {}) == told


def test_what_is_said_wins_over_the_environment():
    section = DistributedSection(coordinator="here:1", process_id=0, num_processes=2)
    environment = {"COORDINATOR_ADDRESS": "there:1", "SLURM_NTASKS": "4"}
    assert cluster.group_of(section, environment) == ("here:1", 0, 2)
    assert cluster.is_told(None, [], environment)
    assert not cluster.is_told(None, ["training.steps=3"], {})
