"""A sweep end to end: every member is its own run, and one that diverges is reported."""

import json

import numpy as np
import orbax.checkpoint as ocp
import pytest

from lora_jax.io import checkpoints
from train import cli, evaluate, finetune

SWEEP = ("sweep.learning_rate=[1e-2,3e-3,1e30]", "sweep.seed=[0,1]", "training.log_every=5")
FINITE = [f"learning_rate={rate},seed={seed}" for rate in (0.01, 0.003) for seed in (0, 1)]
DIVERGED = [f"learning_rate=1e+30,seed={seed}" for seed in (0, 1)]
# Roundings of 20 steps, each a part in 1e7, which Adam's division makes larger.
CLOSE = {"rtol": 1e-3, "atol": 1e-5}


def train(folder, *arguments):
    return cli.main([str(folder / "run.yaml"), *arguments])


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def stored(directory):
    with checkpoints.open_checkpoints(directory / "checkpoints") as opened:
        last = opened.path(opened.latest_step())
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(last / "state")
    return {path: np.asarray(array) for path, array in state.items()}


@pytest.fixture(scope="module")
def swept(tmp_path_factory, write_run):
    folder = write_run(tmp_path_factory.mktemp("sweep"))
    assert train(folder, *SWEEP) == 0
    return folder


@pytest.mark.parametrize("name", FINITE[1:3])  # each rate once, and each seed
def test_a_member_is_its_own_run(swept, name):
    member, alone = swept / "out" / name, swept / f"alone-{name}"
    config = str(member / "config.yaml")
    assert cli.main([config, f"output.directory={alone}", "output.on_existing=error"]) == 0
    assert {file.name for file in member.iterdir()} == {file.name for file in alone.iterdir()}
    found, wanted = rows(member), rows(alone)
    assert [row["step"] for row in found] == [row["step"] for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        assert one.get("tokens") == other.get("tokens")
        for key in ("loss", "grad_norm", "learning_rate", "epoch"):
            if key in other:
                assert one[key] == pytest.approx(other[key], rel=1e-4)
        for metric, value in other.get("evaluation", {}).items():
            # A sentence on the edge may change sides.
            near = {"rel": 1e-4} if metric == "loss" else {"abs": 0.05}
            assert one["evaluation"][metric] == pytest.approx(value, **near)
    assert stored(member).keys() == stored(alone).keys()
    for path, array in stored(alone).items():
        np.testing.assert_allclose(stored(member)[path], array, **CLOSE, err_msg=path)


def test_the_table_and_the_plot_tell_of_every_member(swept):
    out = swept / "out"
    files = {"config.yaml", "sweep.json", "sweep.md", "sweep.png"}
    assert {file.name for file in out.iterdir()} == {*files, *FINITE, *DIVERGED}
    found = json.loads((out / "sweep.json").read_text())["members"]
    assert [member["name"] for member in found] == [*FINITE, *DIVERGED]
    text = (out / "sweep.md").read_text()
    assert "![loss and metric of every member over steps](sweep.png)" in text
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    header, _, *lines = [[cell.strip() for cell in line] for line in lines]
    assert header[:4] == ["learning_rate", "seed", "status", "steps"]
    for line, member in zip(lines, found, strict=True):
        assert line[:2] == [str(value) for value in member["settings"].values()]
        assert line[2:4] == [member["status"], str(member["steps"])]
        if member["name"] in FINITE:
            result = json.loads((out / member["name"] / "result.json").read_text())
            assert line[5] == f"{result['accuracy']:.4f}"
            assert member["best"]["accuracy"] == max(
                row["evaluation"]["accuracy"]
                for row in rows(out / member["name"])
                if row["step"] and "evaluation" in row
            )


@pytest.mark.parametrize("name", DIVERGED)
def test_one_that_diverges_is_reported_as_stopped(swept, name):
    member = swept / "out" / name
    result = json.loads((member / "result.json").read_text())
    assert result["status"] == "not finite"
    last = rows(member)[-1]
    assert (last["step"], last["loss"]) == (result["step"], "nan")
    assert 1 < result["step"] < 20
    assert not (member / "adapter").exists()


def test_a_members_adapter_is_evaluated_as_any_runs(swept, capsys):
    member = swept / "out" / FINITE[1]
    result = json.loads((member / "result.json").read_text())
    assert evaluate.main([str(member), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == result["accuracy"]


def test_ranks_and_batches_of_other_lengths(folder, capsys):
    """Rows of 3 to 11 tokens, put together by length: batches of the seeds differ in length."""
    long = " and the film with its cast"
    header, *lines = (folder / "rows.csv").read_text().splitlines()
    lines = [line.replace(",", f"{long},") if i % 3 else line for i, line in enumerate(lines)]
    (folder / "rows.csv").write_text("\n".join([header, *lines]))
    ranks = ("sweep.rank=[1,4]", "sweep.seed=[0,1]", "sweep.alpha=[2.0]", "sweep.at_once=4")
    data = ("data.max_length=16", "training.group_by_length=true", "training.steps=4")
    assert train(folder, *ranks, *data, "--json") == 0
    printed = capsys.readouterr()
    assert "training, 4 x 16 x" in printed.err
    assert "training, 2 x 16 x" in printed.err  # the members of one seed alone
    found = json.loads(printed.out)["members"]
    assert [member["settings"]["rank"] for member in found] == [1, 4, 1, 4]
    own, alone = folder / "out" / found[2]["name"], folder / "alone"
    assert cli.main([str(own / "config.yaml"), f"output.directory={alone}"]) == 0
    losses = [[row["loss"] for row in rows(where) if "loss" in row] for where in (own, alone)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert stored(own).keys() == stored(alone).keys()
    for path, array in stored(alone).items():
        np.testing.assert_allclose(stored(own)[path], array, **CLOSE, err_msg=path)


def test_interrupted_and_resumed_equals_never_interrupted(swept, folder, capsys, monkeypatch):
    """Interrupted in step 10 when some members have been saved and others have not."""
    original, saved = finetune.save, []

    def save(run, step, *more):
        if step == 10 and len(saved) == 6:
            raise KeyboardInterrupt
        saved.append((run.directory.name, step))
        original(run, step, *more)

    monkeypatch.setattr(finetune, "save", save)
    assert train(folder, *SWEEP) == 130
    assert sorted(step for _, step in saved) == [5, 5, 5, 5, 10, 10]
    monkeypatch.undo()
    assert train(folder, "sweep.seed=[0,2]", "--resume") == 2
    assert "cannot be resumed: in it `sweep` is" in capsys.readouterr().err
    assert train(folder, *SWEEP, "--resume") == 0
    for name in FINITE:
        own, whole = folder / "out" / name, swept / "out" / name
        clocks = ("seconds",)
        found, wanted = (
            [{key: row[key] for key in row if key not in clocks} for row in rows(where)]
            for where in (own, whole)
        )
        assert found == wanted
        states = stored(own), stored(whole)
        assert states[0].keys() == states[1].keys()
        assert all(states[0][path].tobytes() == states[1][path].tobytes() for path in states[0])
    for name in DIVERGED:
        found, wanted = (
            json.loads((where / "out" / name / "result.json").read_text())
            for where in (folder, swept)
        )
        assert found == wanted


def test_a_dry_run_is_of_the_first_member(folder, capsys):
    assert train(folder, *SWEEP, "--dry-run", "--json") == 0
    printed = capsys.readouterr()
    assert "a sweep of 6 runs" in printed.err
    config = json.loads(printed.out)["config"]
    assert (config["training"]["learning_rate"], config["training"]["seed"]) == (0.01, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["sweep.batch_size=[8,16]"],
            "cannot be swept; what can be: learning_rate, seed, weight_decay, rank, alpha",
            id="a-key-that-cannot-be-swept",
        ),
        pytest.param(["sweep.seed=[1,1]"], "give each value once", id="twice"),
        pytest.param(["sweep.seed=3"], "must be a valid list", id="no-list"),
        pytest.param(["sweep.learning_rate=[1e-3,-1]"], "greater than 0", id="not-positive"),
        pytest.param(["sweep.rank=[2,64]"], "so its rank can be at most 32", id="rank"),
    ],
)
def test_what_cannot_be_swept_is_one_clear_error(folder, capsys, arguments, message):
    assert train(folder, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "out").exists()
