"""Configs: strict, and all that is wrong with one in one list."""

import pathlib

import pytest

from train import config_file, yaml_loader
from train.config import Config

GOOD = """\
model:
  path: model
data:
  train: rows.csv
  holdout: 10
output:
  directory: out
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.csv").write_text("text,label\ngood,1\n")
    return tmp_path


def load(folder, text, *overrides):
    (folder / "run.yaml").write_text(text)
    return config_file.load(folder / "run.yaml", overrides)


def problems(folder, text, *overrides):
    with pytest.raises(config_file.ConfigError) as caught:
        load(folder, text, *overrides)
    listed = [str(problem).replace(f"{folder}/", "") for problem in caught.value.problems]
    assert len(str(caught.value).splitlines()) == len(listed) + 1
    return listed


@pytest.mark.parametrize(
    ("text", "value"),
    [
        pytest.param("1e-4", 1e-4, id="float-without-a-dot"),
        pytest.param("2E3", 2000.0, id="float-with-a-capital"),
        pytest.param(".5", 0.5, id="float-without-a-zero"),
        pytest.param("1.", 1.0, id="float-with-a-dot"),
        pytest.param("-3", -3, id="integer"),
        pytest.param("010", 10, id="no-octal"),
        pytest.param("1:30", "1:30", id="no-base-60"),
        pytest.param("off", "off", id="off-is-a-word"),
        pytest.param("true", True, id="boolean"),
        pytest.param("2020-01-01", "2020-01-01", id="no-dates"),
        pytest.param("~", None, id="null"),
        pytest.param("", None, id="nothing-is-null"),
        pytest.param("'1e-4'", "1e-4", id="quoted-is-a-string"),
        pytest.param("[a, 1, 1e2]", ["a", 1, 100.0], id="list"),
        pytest.param("{a: 1e2}", {"a": 100.0}, id="mapping"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    document = yaml_loader.parse(f"key: {text}", "f")
    assert document.problems == []
    assert document.values == {"key": value}
    assert type(document.values["key"]) is type(value)


def test_every_key_has_its_line():
    document = yaml_loader.parse("# head\na:\n  b: 1\n  c: [x,\n      y]\n", "f")
    assert {path: int(place.split(":")[1]) for path, place in document.places.items()} == {
        (): 2,
        ("a",): 2,
        ("a", "b"): 3,
        ("a", "c"): 4,
        ("a", "c", "0"): 4,
        ("a", "c", "1"): 5,
    }


def test_a_good_config_has_absolute_paths_and_defaults(folder):
    config = load(folder, GOOD + "training: {learning_rate: 1e-4, warmup: 3}\nlora:\n")
    assert config.model.path == str(folder / "model")
    assert config.output.directory == str(folder / "out")
    assert config.training.learning_rate == 1e-4
    assert config.training.warmup == 3
    assert config.lora == type(config.lora)()


def test_overrides_win_and_their_paths_start_here(folder, monkeypatch):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "rows.jsonl").write_text("{}")
    monkeypatch.chdir(folder / "elsewhere")
    config = load(
        folder,
        GOOD + "training: {epochs: 2}",
        "lora.targets=[query]",
        "lora.rank_pattern.layer.0/query=2",
        "data.train=rows.jsonl",
        "training.steps=5",
    )
    assert config.lora.targets == ("query",)
    assert config.lora.rank_pattern == {"layer.0/query": 2}
    assert config.data.train == str(folder / "elsewhere" / "rows.jsonl")
    assert (config.training.steps, config.training.epochs) == (5, None)


def test_all_problems_come_in_one_list(folder):
    text = """\
model:
  path: ./nowhere
  dtype: bfloat61
lora:
  rank: 8
  rnak: 4
  rank: 16
  targets: query
data:
  train: rows.csv
  holdout: many
  batch_size: 4
trainng:
  epochs: 1
"""
    assert problems(folder, text, "training.schedule=cosin", "rank=3", "lora.alpha=[1") == [
        "run.yaml:7: lora.rank: given twice; first at run.yaml:5",
        "command line, 'rank=3': an override is written section.key=value",
        "command line, 'lora.alpha=[1': lora.alpha: not valid YAML: "
        "expected ',' or ']', but got '<stream end>'",
        "run.yaml:2: model.path: no such file or directory: nowhere",
        "run.yaml:3: model.dtype: must be 'float32', 'bfloat16' or 'float16', "
        "got str 'bfloat61'; did you mean 'bfloat16'?",
        "run.yaml:8: lora.targets: must be a valid list, got str 'query'",
        "run.yaml:6: lora.rnak: unknown key; did you mean 'lora.rank'?",
        "run.yaml:11: data.holdout: must be a valid integer, got str 'many'",
        "run.yaml:12: data.batch_size: unknown key; did you mean 'training.batch_size'?",
        "command line, 'training.schedule=cosin': training.schedule: must be 'cosine', "
        "'linear' or 'constant', got str 'cosin'; did you mean 'cosine'?",
        "run.yaml:1: output: is required: the section 'output', with directory, on_existing, "
        "allow_changes, weights",
        "run.yaml:13: trainng: unknown key; did you mean 'training'?",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("", "run.yaml: the file is empty", id="empty"),
        pytest.param("- a", "run.yaml:1: expected sections such as", id="a-list"),
        pytest.param("a: [", "run.yaml:1: not valid YAML", id="not-yaml"),
        pytest.param("a: &a [*a]", "run.yaml: not valid YAML", id="endless"),
        pytest.param("a: !!python/name:os.system", "not valid YAML", id="a-python-name"),
        pytest.param(GOOD + "lora: 3", "run.yaml:8: lora: is a section", id="no-section"),
        pytest.param(GOOD + "lora: {rank: true}", "lora.rank: must be a valid int", id="bool"),
        pytest.param(GOOD + "lora: {rank: 0}", "lora.rank: must be greater", id="range"),
        pytest.param(GOOD + "lora: {targets: ['(']}", "lora: `targets` holds '('", id="regex"),
        pytest.param(GOOD + "lora: {targets: [], train: []}", "Nothing would train", id="nothing"),
        pytest.param(GOOD + "training: {epochs: null}", "give `epochs` or `steps`", id="lengths"),
        pytest.param(GOOD + "training: {warmup: 1.5}", "whole number", id="warmup"),
        pytest.param(GOOD + "training: {learning_rate: .nan}", "learning_rate", id="nan"),
        pytest.param(GOOD + "training: {betas: [0.9]}", "training.betas.1", id="one-beta"),
        pytest.param(GOOD.replace("  holdout: 10\n", ""), "give one of `validation`", id="no-eval"),
        pytest.param(GOOD.replace("  path: model", ""), "model.path: is required", id="missing"),
        pytest.param(GOOD.replace("rows.csv", "rowz.csv"), "no such file", id="no-file"),
    ],
)
def test_one_problem(folder, text, expected):
    listed = problems(folder, text)
    assert len(listed) == 1
    assert expected in listed[0]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(config_file.ConfigError, match=r"run\.yaml: cannot be read: No such file"):
        config_file.load(tmp_path / "run.yaml")


def test_the_written_config_reads_as_the_same(folder):
    config = load(folder, GOOD + "training: {steps: 3, learning_rate: 1e-5}\n")
    out = pathlib.Path(config.output.directory)
    out.mkdir()
    (out / "config.yaml").write_text(config_file.to_yaml(config, out))
    assert config_file.load(out / "config.yaml") == config


def test_differences_name_what_changed_and_leave_out_what_is_free(folder):
    before = load(folder, GOOD)
    after = load(folder, GOOD, "lora.rank=4", "training.log_every=3", "output.directory=x")
    assert config_file.differences(before, after) == ["lora.rank: 8 -> 4"]


def test_the_schema_describes_every_key():
    schema = Config.model_json_schema()
    for name, section in schema["$defs"].items():
        assert section["additionalProperties"] is False
        for key, value in section["properties"].items():
            assert value.get("description"), f"{name}.{key} has no description"
