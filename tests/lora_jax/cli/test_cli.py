"""The ``lora-jax`` command as a person or a script meets it."""

import importlib
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

from lora_jax import cli
from lora_jax.cli import _application, _output, _step

ROOT = Path(__file__).parents[3]
BERT = {
    "model_type": "bert",
    "architectures": ["BertModel"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}


@pytest.fixture
def model(tmp_path) -> str:
    """A model's directory with its config and no weights: `inspect` must not need them."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(BERT))
    return str(directory)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """Runs the command; exit code, standard output, standard error."""
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("command", ["train", "eval", "inspect", "doctor"])
def test_help_lists_every_command(capsys, command):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert f"\n    {command} " in out


@pytest.mark.parametrize("command", ["train", "eval", "inspect", "doctor"])
def test_every_command_has_help(capsys, command):
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert "usage" in out.lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "COMMAND", id="no-command"),
        pytest.param(["trian"], "invalid choice: 'trian'", id="unknown-command"),
        pytest.param(["inspect"], "MODEL", id="no-model"),
        pytest.param(["inspect", "MODEL", "--targets", "qeury"], "query", id="mistyped-target"),
        pytest.param(["inspect", "MODEL", "--rank", "0"], "rank", id="rank-of-zero"),
        pytest.param(["inspect", "MODEL", "--task", "translation"], "translation", id="task"),
        pytest.param(["inspect", "./nowhere"], "nowhere", id="no-such-model"),
    ],
)
def test_bad_input_is_code_2_and_says_why(capsys, model, arguments, message):
    arguments = [model if argument == "MODEL" else argument for argument in arguments]
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def test_inspect_counts_what_would_train(capsys, model):
    code, out, _ = run(
        capsys, "inspect", model, "--targets", "query", "value", "--rank", "4", "--json"
    )
    assert code == 0
    found = json.loads(out)
    assert len(found["weights"]) == 4
    assert {row["trained"] for row in found["weights"]} == {4 * (32 + 32)}
    assert found["trained"] == 4 * 4 * (32 + 32)


def test_inspect_prints_plain_lines_where_there_is_no_terminal(capsys, model):
    _, out, _ = run(capsys, "inspect", model, "--targets", "query", "--train", "classifier/.*")
    lines = out.splitlines()
    assert lines[0].split() == ["weight", "shape", "rank", "trained", "percent"]
    assert len(lines) == 1 + 2 + 2 + 1
    assert not set(out) & set("│┃─━\x1b")


def test_a_terminal_gets_a_drawn_table(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _output.print_table(("name", "found"), [("[a]", "1")], title="checks", foot=("all", "1"))
    out = capsys.readouterr().out
    assert "─" in out
    assert "[a]" in out
    assert "all" in out


def test_doctor_trains_a_step(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    found = json.loads(out)
    assert code == 0, found
    assert found["ok"]
    step = found["checks"]["training step"]
    assert step["losses"][-1] < step["losses"][0]
    assert 0 < step["trained"] < step["total"]
    assert found["checks"]["devices"]["count"] == jax.device_count()
    assert found["checks"]["libraries"]["jax"] == jax.__version__


def test_doctor_reports_a_failed_check_and_goes_on(capsys, monkeypatch):
    monkeypatch.setattr(_step, "STEPS", 0)  # so the loss cannot fall
    code, out, _ = run(capsys, "doctor")
    assert code == 1
    lines = {line.split("  ")[0].strip(): line for line in out.splitlines()}
    assert "training step" in lines["FAILED"]
    assert "the loss did not fall" in lines["FAILED"]
    assert "ok" in lines


def test_doctor_checks_what_the_extra_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {line.partition(">=")[0] for line in project["optional-dependencies"]["train"]}
    assert named == set(_application.EXTRAS)


@pytest.mark.parametrize("command", ["train", "eval"])
def test_missing_extras_say_how_to_install_them(command, tmp_path):
    (tmp_path / "config.yaml").write_text("model: {path: nowhere}")
    argument = tmp_path / "config.yaml" if command == "train" else tmp_path
    program = (
        "import sys; sys.modules['pydantic'] = None; import lora_jax.cli; "
        f"sys.exit(lora_jax.cli.main([{command!r}, {str(argument)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "'pydantic' is not installed" in done.stderr
    assert "pip install 'lora_jax[train]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_stranger_named_train_is_not_run(monkeypatch, tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "train", raising=False)
    importlib.invalidate_caches()
    assert not _application._is_ours("train")
