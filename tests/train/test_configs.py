"""The configs that come with the project: each one loads, and its head says what it promises."""

import json
import re
from pathlib import Path

import pytest

from train import config_file, model, yaml_loader
from train.config import lora_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


GPT2_MEDIUM = {
    "model_type": "gpt2",
    "n_embd": 1024,
    "n_layer": 24,
    "n_head": 16,
    "n_positions": 1024,
    "vocab_size": 50257,
}
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "vocab_size": 49152,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}


def load(path, folder, *settings):
    """Loads a config from a folder in which all files that it names exist."""
    (folder / "configs").mkdir()
    copy = folder / "configs" / path.name
    copy.write_bytes(path.read_bytes())
    values = yaml_loader.read(copy).values
    for section, key in (("data", "train"), ("data", "validation"), ("model", "path")):
        name = values[section].get(key, "")
        if name.startswith(".") or name.endswith(config_file.FILE_SUFFIXES):
            (copy.parent / name).parent.mkdir(parents=True, exist_ok=True)
            (copy.parent / name).touch()
    return config_file.load(copy, settings)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_it_loads_once_its_files_are_there(path, tmp_path):
    config = load(path, tmp_path)
    assert lora_config(config).targets
    assert Path(config.output.directory).parent == tmp_path / "runs"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_its_head_says_source_command_score_time_and_hardware(path):
    head = path.read_text().partition("\n\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    assert re.search(r"^# (Method|Paper) +.*arxiv|https://arxiv", head, re.MULTILINE)
    assert f"python -m train configs/{path.name}" in head
    for name in ("Expect", "Time"):
        assert re.search(rf"^# {name} +\S", head, re.MULTILINE), name


@pytest.mark.parametrize(
    ("name", "architecture", "trained"),
    [
        pytest.param("gpt2_medium_e2e", GPT2_MEDIUM, 393_216, id="gpt2-medium"),
        pytest.param("smollm2_e2e", SMOLLM2, 230_400, id="smollm2"),
    ],
)
def test_it_trains_as_many_parameters_as_it_says(name, architecture, trained, tmp_path):
    path = next(path for path in CONFIGS if path.stem == name)
    (tmp_path / "config.json").write_text(json.dumps(architecture))
    config = load(path, tmp_path, f"model.path={tmp_path}")
    shapes = model.load_model(config, None, abstract=True)
    assert model.summarise(shapes, config).trained == trained
    assert f"{trained:,} parameters" in path.read_text()
