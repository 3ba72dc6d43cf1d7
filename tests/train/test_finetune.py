"""A run end to end: it learns, what it leaves is whole, and killed it goes on bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from train import cli, config_file, evaluate, finetune
from train.console import Console


def train(folder, *arguments):
    return cli.main([str(folder / "run.yaml"), *arguments])


def rows(directory):
    """The metrics without wall-clock times."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key != "seconds"}
        for line in lines
    ]


def stored(directory, step):
    """The bytes of every array of a checkpoint."""
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(directory.resolve() / "checkpoints" / str(step) / "state")
    return {path: np.asarray(array).tobytes() for path, array in state.items()}


def adapter_files(directory):
    return {file.name: file.read_bytes() for file in (directory / "adapter").iterdir()}


def test_a_run_learns_and_leaves_what_it_promises(folder, capsys):
    enough = ("lora.targets=[query,value,up,down]", "lora.alpha=8", "training.evaluate_every=25")
    assert train(folder, "training.steps=100", *enough, "--json") == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert result["accuracy"] >= 0.8
    out = folder / "out"
    names = {"config.yaml", "metrics.jsonl", "result.json", "curves.png", "report.html"}
    assert {file.name for file in out.iterdir()} == {*names, "adapter", "checkpoints"}
    assert json.loads((out / "result.json").read_text()) == result
    # Query and value, then up and down, at rank 2; and the head of two classes.
    adapters = 2 * (32 * 2 + 2 * 32) + 2 * (32 * 2 + 2 * 48)
    assert result["trained_parameters"] == adapters + 32 * 2 + 2
    # AdamW keeps two float32 moments; the counts of Adam and of the schedule are int32.
    assert result["optimizer_bytes"] == 2 * 4 * result["trained_parameters"] + 2 * 4
    files = list((out / "adapter").glob("*.safetensors"))
    assert result["checkpoint_bytes"] == sum(file.stat().st_size for file in files)
    for name in ("seconds_per_step", "compile_seconds", "tokens_per_second", "seconds"):
        assert result[name] > 0
    evaluations = [row for row in rows(out) if "evaluation" in row]
    assert [row["step"] for row in evaluations] == [0, 25, 50, 75, 100]
    assert evaluations[-1]["evaluation"] == result["metrics"]
    assert [row["step"] for row in rows(out) if "loss" in row] == list(range(1, 101))
    page = (out / "report.html").read_text()
    assert "encoder/layers/0/attention/query/kernel" in page
    assert "before training" in page
    # What the run says of itself is what a fresh load of its adapter gives.
    assert evaluate.main([str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == result["accuracy"]
    assert evaluate.main([str(out), "--json", "--data", str(folder / "rows.csv")]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] >= 0.8


HEAD = ["classifier/bias", "classifier/kernel"]
KILLED = """
import os, signal, sys
from train import cli, finetune

step, log = int(sys.argv.pop()), finetune.log

def log_and_die(run, figures, *more):
    log(run, figures, *more)
    if figures[-1]["step"] == step:
        os.kill(os.getpid(), signal.SIGKILL)

finetune.log = log_and_die
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, write_run):
    """The same run, never interrupted."""
    folder = write_run(tmp_path_factory.mktemp("whole"))
    assert train(folder) == 0
    return folder


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(12, id="after-the-checkpoint-of-step-10"),
        pytest.param(4, id="before-any-checkpoint"),
    ],
)
def test_killed_and_resumed_equals_never_interrupted(folder, whole, step):
    (folder / "killed.py").write_text(KILLED)
    killed = subprocess.run(
        [sys.executable, folder / "killed.py", folder / "run.yaml", str(step)],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    out = folder / "out"
    assert max(row["step"] for row in rows(out)) == step
    assert train(folder, "--resume") == 0
    assert rows(out) == rows(whole / "out")
    assert stored(out, 20) == stored(whole / "out", 20)
    assert adapter_files(out) == adapter_files(whole / "out")


def test_a_damaged_checkpoint_is_passed_over(folder, whole, capsys):
    assert train(folder, "training.keep=2") == 0
    out = folder / "out"
    manifest = out / "checkpoints" / "20" / "manifest" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("0", "1", 1))
    assert train(folder, "training.keep=2", "--resume") == 0
    assert "step 20 is damaged: going back to 15" in capsys.readouterr().out
    assert rows(out) == rows(whole / "out")
    assert stored(out, 20) == stored(whole / "out", 20)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        pytest.param("lora.alpha=3", "lora.alpha: 4.0 -> 3.0", id="alpha"),
        pytest.param("lora.rank=3", "lora.rank: 2 -> 3", id="rank"),
        pytest.param("training.learning_rate=1e-3", "0.01 -> 0.001", id="learning-rate"),
        pytest.param("training.steps=30", "training.steps: 20 -> 30", id="steps"),
        pytest.param("data.holdout=50", "data.train: hash", id="another-split"),
        pytest.param("data.train={other}", "data.train: hash", id="other-texts"),
    ],
)
def test_resume_refuses_another_run(folder, whole, capsys, change, difference):
    other = folder / "rows.csv"
    other.write_text(other.read_text().replace("film", "plot"))
    before = (whole / "out" / "config.yaml").read_bytes(), rows(whole / "out")
    assert train(whole, change.format(other=other), "--resume") == 2
    assert difference in capsys.readouterr().err
    assert ((whole / "out" / "config.yaml").read_bytes(), rows(whole / "out")) == before


def test_what_may_change_is_named(folder, whole, model_directory, capsys):
    other = folder / "other-model"
    shutil.copytree(model_directory, other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("query.weight"))
    weights[name][3, 4] = np.nextafter(weights[name][3, 4], 1)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    shutil.rmtree(folder / "out", ignore_errors=True)
    shutil.copytree(whole / "out", folder / "out")
    changes = ("training.learning_rate=1e-3", f"model.path={other}", "--resume")
    assert train(folder, *changes, "output.allow_changes=[model.path]") == 2
    said = capsys.readouterr().err
    assert "model.weights: hash" in said
    assert "output.allow_changes=[training.learning_rate, model.weights]" in said
    allowed = "output.allow_changes=[model.path,training.learning_rate,model.weights]"
    assert train(folder, *changes, allowed) == 0
    assert "changed, and allowed to: training.learning_rate" in capsys.readouterr().out


def test_a_finished_run_resumes_to_the_same_end(whole):
    result = json.loads((whole / "out" / "result.json").read_text())
    config = config_file.load(whole / "out" / "config.yaml", ["output.on_existing=resume"])
    again = finetune.run(config, Console(stderr=True))
    for name in ("accuracy", "metrics", "steps", "checkpoint_bytes", "seconds_per_step"):
        assert again[name] == result[name]


def test_an_existing_run_is_not_touched_unasked(folder, capsys):
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    assert train(folder) == 2
    message = capsys.readouterr().err
    assert "--resume" in message
    assert "--overwrite" in message
    assert "out-2" in message
    assert train(folder, "--overwrite") == 2
    assert "it is not a run" in capsys.readouterr().err
    assert (folder / "out" / "notes.txt").read_text() == "mine"


class Poisoned(finetune.Batches):
    """An id outside the table of words gives NaN, at step 12."""

    def __getitem__(self, step):
        batch = super().__getitem__(step)
        poison = {"input_ids": np.full_like(batch["input_ids"], 999)}
        return batch | (poison if step == 11 else {})


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_step(
    folder, capsys, monkeypatch
):
    monkeypatch.setattr(finetune, "Batches", Poisoned)
    assert train(folder) == 3
    said = capsys.readouterr().err
    assert "Stopped at step 12: the loss is nan" in said
    bad = next(row["rows"] for row in rows(folder / "out") if row["step"] == 12)
    assert len(bad) == 16
    assert f"of rows {', '.join(map(str, bad))}. The checkpoint of step 10" in said
    result = json.loads((folder / "out" / "result.json").read_text())
    assert (result["status"], result["step"], result["last_good_step"]) == ("not finite", 12, 10)
    state = stored(folder / "out", 10)
    arrays = [np.frombuffer(value, np.float32) for path, value in state.items() if "kernel" in path]
    assert all(np.isfinite(array).all() for array in arrays)
    assert not (folder / "out" / "adapter").exists()


def test_a_step_that_is_not_finite_may_be_left_out(folder, capsys, monkeypatch):
    monkeypatch.setattr(finetune, "Batches", Poisoned)
    assert train(folder, "training.skip_not_finite=1", "training.save_every=1") == 0
    assert "step 12 is left out: the gradient's norm is nan, of rows " in capsys.readouterr().out
    found = {row["step"]: row for row in rows(folder / "out") if "loss" in row}
    assert [step for step, row in found.items() if "rows" in row] == [12]
    assert all(np.isfinite(row["loss"]) for step, row in found.items() if step != 12)
    assert (folder / "out" / "adapter").exists()


@pytest.mark.parametrize(
    ("overrides", "trained"),
    [
        pytest.param(["lora.targets=[]"], HEAD, id="head"),
        pytest.param(["lora.targets=[]", "lora.train=['.*']"], None, id="full"),
        pytest.param(
            ["model.scan_layers=true", "model.dtype=bfloat16"],
            [*HEAD, *(f"encoder/layers/attention/{name}/kernel" for name in ("query", "value"))],
            id="scanned-layers-in-bfloat16",
        ),
    ],
)
def test_every_choice_of_weights_trains_saves_and_loads(folder, capsys, overrides, trained):
    assert train(folder, "training.steps=5", *overrides, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    paths = [
        path.removeprefix("trainable/")
        for path in stored(folder / "out", 5)
        if path.startswith("trainable/")
    ]
    paths = sorted({path.removesuffix("/a").removesuffix("/b") for path in paths})
    if trained is None:
        assert result["trained_parameters"] == result["total_parameters"]
    else:
        assert paths == trained
    assert evaluate.main([str(folder / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(
        result["metrics"]["loss"], rel=1e-5
    )


def test_the_best_weights_are_kept_when_asked(folder):
    config = config_file.load(
        folder / "run.yaml", ["output.weights=best", "training.best_metric=loss"]
    )
    result = finetune.run(config, Console(stderr=True))
    scores = {
        row["step"]: row["evaluation"]["loss"]
        for row in rows(folder / "out")
        if "evaluation" in row
    }
    del scores[0]
    assert result["steps"] == min(scores, key=scores.__getitem__)
    assert result["metrics"]["loss"] == min(scores.values())
