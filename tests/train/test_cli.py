"""The command line: exit codes, the dry run, and what is printed where."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import rich.console

from train import cli, console, dry_run, evaluate, metrics, report


def test_the_module_runs_and_lists_all_problems_without_a_traceback(folder):
    (folder / "run.yaml").write_text("model: {path: ./none}\nlora: {rnak: 1}\n")
    done = subprocess.run(
        [sys.executable, "-m", "train", folder / "run.yaml", "training.steps=x"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: The config has 5 problems:\n")
    assert len(done.stderr.splitlines()) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "give a config file", id="no-config"),
        pytest.param(["nowhere.yaml"], "No such file", id="no-such-config"),
        pytest.param(["{run}", "training.batch_size=12"], "does not divide over 8", id="devices"),
        pytest.param(["{run}", "training.batch_size=800"], "240 rows to train on", id="batch"),
        pytest.param(["{run}", "data.max_length=64"], "positions for 32 tokens", id="positions"),
        pytest.param(["{run}", "lora.targets=[qeury]"], "attention/query/kernel", id="target"),
        pytest.param(
            ["{run}", "lora.train=[]"], "Add classifier/[.][*] to lora.train", id="untrained-head"
        ),
        pytest.param(["{run}", "model.path={here}"], "has no tokenizer", id="no-model"),
    ],
)
def test_wrong_input_ends_with_2_and_leaves_nothing(folder, capsys, arguments, message):
    names = {"run": folder / "run.yaml", "here": folder}
    assert cli.main([argument.format(**names) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message.replace("[.][*]", ".*") in error
    assert not (folder / "out").exists()


def test_a_tokenizer_of_another_model_is_refused(folder, model_directory, capsys):
    other = folder / "other"
    shutil.copytree(model_directory, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(re.sub(r'"film": *\d+', '"film": 999', text))
    assert cli.main([str(folder / "run.yaml"), f"model.path={other}"]) == 2
    assert "gives token 999, and the model has embeddings for 25" in capsys.readouterr().err


def test_options_may_stand_anywhere(folder):
    options = cli.parser().parse_intermixed_args(["--json", "a.yaml", "x.y=1", "--resume", "z.w=2"])
    assert (options.config, options.overrides) == ("a.yaml", ["x.y=1", "z.w=2"])
    with pytest.raises(SystemExit, match="2"):
        cli.parser().parse_intermixed_args(["a.yaml", "--resume", "--overwrite"])


def test_the_schema_is_json(capsys):
    assert cli.main(["--schema"]) == 0
    assert set(json.loads(capsys.readouterr().out)["properties"]) == {
        *("model", "lora", "data", "training", "mesh", "distributed", "evaluation", "output"),
        "sweep",
    }


def test_a_dry_run_says_what_would_run_without_weights_and_writes_nothing(
    folder, model_directory, capsys
):
    bare = folder / "bare"
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_directory / name, bare)
    run = [str(folder / "run.yaml"), f"model.path={bare}", "--dry-run", "--json"]
    assert cli.main(run) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert not (folder / "out").exists()
    assert (result["steps"], result["config"]["lora"]["rank"]) == (20, 2)
    assert result["trained_parameters"] == 2 * (2 * 32 + 2 * 32) + 32 * 2 + 2
    example = result["example"]
    assert len(example["tokens"].split()) == len(example["input_ids"].split())
    assert example["tokens"] == f"[CLS] {example['text']} [SEP]"
    memory = result["memory"]
    assert memory["total"] >= memory["arguments"] + memory["temporary"] > 0
    assert memory["largest_batch"] % 8 == 0
    assert "encoder/layers/0/attention/query/kernel" in output.err


def test_memory_is_a_line_through_two_batch_sizes(monkeypatch):
    monkeypatch.setattr(dry_run, "device_bytes", lambda: 1000)
    sizes = []

    def bytes_of(batch):
        sizes.append(batch)
        return {"arguments": 100, "temporary": 10 * batch, "total": 100 + 10 * batch}

    plan = dry_run.memory_plan(bytes_of, 8, 4)
    assert sizes == [8, 16]
    assert plan["largest_batch"] == 88  # 100 + 10 * 90 = 1000, and 90 // 4 * 4 = 88


def test_a_terminal_gets_one_bar_and_time_left_does_not_count_compiling():
    screen = console.Console()
    shown = io.StringIO()
    screen.out = rich.console.Console(file=shown, force_terminal=True, width=120)
    with screen.progress(0, 10):
        with screen.compiling("training"):
            pass
        screen.step(5, 10, loss=0.5, learning_rate=1e-3, tokens_per_second=1234.5, seconds_left=61)
    for words in ("compiling training", "5/10", "loss 0.5000", "1.00e-03", "1,234", "1:01 left"):
        assert words in shown.getvalue()
    assert screen.compile_seconds > 0


def test_plain_lines_where_there_is_no_terminal(capsys):
    screen = console.Console()
    with screen.progress(0, 10):
        screen.step(5, 10, loss=0.5, learning_rate=1e-3, tokens_per_second=10, seconds_left=3)
    line = "step 5/10  loss 0.5000  lr 1.00e-03  10 tokens/s  0:03 left\n"
    assert capsys.readouterr().out == line


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        pytest.param(
            [[2, 0], [0, 2], [0, 2], [0, 2]],
            [0, 1, 1, 0],
            {"accuracy": 0.75, "f1": 0.8, "matthews": 1 / math.sqrt(3)},
            id="two-classes",
        ),
        pytest.param(
            [[1, 0, 0], [0, 1, 0], [0, 1, 0]],
            [0, 1, 2],
            {"accuracy": 2 / 3, "f1": (1 + 2 / 3 + 0) / 3, "matthews": 3 / math.sqrt(24)},
            id="three-classes",
        ),
        pytest.param(
            [[1, 0], [1, 0]],
            [0, 0],
            {"accuracy": 1.0, "f1": 0.0, "matthews": 0.0, "loss": math.log(1 + math.exp(-1))},
            id="one-class-only",
        ),
    ],
)
def test_metrics(logits, labels, expected):
    found = metrics.classification_metrics(np.array(logits), np.array(labels))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value), name


def test_smooth_is_a_running_mean():
    np.testing.assert_allclose(report.smooth([1.0, 2.0, 3.0, 4.0], span=2), [1.0, 1.5, 2.5, 3.5])


def test_evaluate_refuses_a_directory_without_a_finished_run(tmp_path, capsys):
    assert evaluate.main([str(tmp_path)]) == 2
    assert "holds no finished run" in capsys.readouterr().err
