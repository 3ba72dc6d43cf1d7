"""An adapter's JSON is checked before it is believed, and its names are matched as PEFT does."""

import json

import pytest

from lora_jax.io.peft import _config
from lora_jax.io.peft._matching import (
    covering_names,
    fault,
    in_layers,
    names_module,
    resolve,
    saves_module,
)

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query"]}


def write(directory, text):
    (directory / "adapter_config.json").write_text(text)
    return directory


@pytest.mark.parametrize(
    ("text", "match"),
    [
        pytest.param("{", "is not JSON", id="half"),
        pytest.param("[1]", "must hold one JSON object", id="list"),
        pytest.param("[" * 100_000, "is not JSON", id="deep"),
        pytest.param('{"r": 1' + "0" * 5000 + "}", "is not JSON", id="huge-integer"),
        pytest.param('{"r": 4, "r": 8, "lora_alpha": 8}', "'r'.* occurs twice|twice", id="repeat"),
        pytest.param('{"a": "' + " " * (16 << 20) + '"}', "larger than 16 MiB", id="large"),
        pytest.param('{"r": 4, "lora_alpha": NaN}', "NaN is not a finite number", id="nan"),
    ],
)
def test_text_that_is_no_config_is_refused(tmp_path, text, match):
    with pytest.raises(ValueError, match=match):
        _config.read(write(tmp_path, text))


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="is not JSON"):
        _config.read(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("r", True, "an integer of at least 1"),
        ("r", 0, "an integer of at least 1"),
        ("r", "4", "an integer of at least 1"),
        ("lora_alpha", -1, "a number above 0"),
        ("lora_alpha", 10**400, "a number above 0"),
        ("use_rslora", 1, "true or false"),
        ("lora_dropout", 1.0, r"a number in \[0, 1\)"),
        ("target_modules", 3, "a list of names or one"),
        ("target_modules", ["query", 3], "a list of names or one"),
        ("exclude_modules", [["query"]], "a list of names or one"),
        ("layers_to_transform", ["0"], "a list of integers or one"),
        ("modules_to_save", "classifier", "a list of names"),
        ("rank_pattern", {"query": 2.5}, "an object of integers"),
        ("alpha_pattern", {"query": None}, "an object of numbers"),
        ("bias", "some", "'none', 'all' or 'lora_only'"),
        ("bias", {"a": 1}, "'none', 'all' or 'lora_only'"),
    ],
)
def test_a_field_of_a_wrong_type_is_refused(tmp_path, field, value, words):
    write(tmp_path, json.dumps(PLAIN | {field: value}))
    with pytest.raises(ValueError, match=f"`{field}` is .*; it must be {words}"):
        _config.read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        pytest.param({"peft_type": "LOHA"}, "`peft_type` is 'LOHA'", id="other-kind"),
        pytest.param({"target_modules": "(q"}, "`target_modules` has '.q', .*not a reg", id="bad"),
        pytest.param({"exclude_modules": "*"}, "`exclude_modules` has", id="bad-exclude"),
        pytest.param({"rank_pattern": {"(q": 2}}, "`rank_pattern` has", id="bad-key"),
        pytest.param({"rank_pattern": {"(?i)q": 2}}, "`rank_pattern` has", id="flag-inside"),
        pytest.param({"layers_pattern": ["("]}, "`layers_pattern` has", id="bad-layers"),
        pytest.param({"target_modules": "a{1,99999999999}"}, "not a regular", id="overflow"),
        pytest.param({"target_modules": "([a-z.]+)+x"}, "repeats a group", id="exponential"),
        pytest.param({"alpha_pattern": {"(a|a)*x": 2}}, "repeats a group", id="choices"),
        pytest.param({"target_modules": "a" * 10_001}, "is longer than 10000", id="long"),
        pytest.param(
            {"rank_pattern": {str(i): 1 for i in range(10_001)}}, "has 10001 entries", id="many"
        ),
        pytest.param(
            {"target_parameters": ["w"]}, "`target_parameters` is .*experts", id="experts"
        ),
        pytest.param({"spam": [[1]] * 9999}, r"`spam` is \[\[1\], .*\.\.\.", id="long-unknown"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, changes, match):
    write(tmp_path, json.dumps(PLAIN | changes))
    with pytest.raises(ValueError, match=match) as error:
        _config.read(tmp_path)
    assert len(str(error.value)) < 1000


def test_every_problem_is_in_one_list(tmp_path):
    write(tmp_path, json.dumps(PLAIN | {"r": None, "use_dora": True, "spam": 1}))
    with pytest.raises(ValueError, match=r"(?s)`r` is missing.*`spam` is 1.*`use_dora` is True"):
        _config.read(tmp_path)


@pytest.mark.parametrize(
    "pattern",
    [
        r"model\.layers\.\d+\.self_attn\.(q|k|v)_proj",
        r".*\.(?:self_attn|mlp)\.(?:q_proj|up_proj)$",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|v_proj).*?)|(?:lm_head)",
        r"[(*+]+x",
        r"a\)+",
        "q_proj{2}",
    ],
)
def test_patterns_of_real_adapters_are_taken(pattern):
    assert fault(pattern, whole=True) is None


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        pytest.param(["a.0.query", "a.1.query"], ["query"], id="all-of-a-name"),
        pytest.param(["a.0.query"], ["0.query"], id="one-of-two"),
        pytest.param(["a.0.out.dense", "a.1.out.dense"], ["out.dense"], id="of-two-kinds"),
        pytest.param(["a.0.dense", "a.0.key"], ["0.dense", "0.key"], id="one-layer"),
        pytest.param(["dense"], ["dense"], id="alone"),
    ],
)
def test_target_modules_cover_exactly_the_file(modules, expected):
    every = [f"a.{i}.{name}" for i in (0, 1) for name in ("query", "key", "out.dense", "dense")]
    every = ["dense"] if modules == ["dense"] else every
    names = covering_names(modules, every)
    assert names == expected
    assert {module for module in every if names_module(names, module)} == set(modules)


@pytest.mark.parametrize(
    ("pattern", "module", "expected"),
    [
        pytest.param("query", "layer.1.self.query", 2, id="last-segment"),
        pytest.param("layer.1.self.query", "layer.1.self.query", 2, id="whole"),
        pytest.param("layer.1.self.query", "layer.11.self.query", 8, id="another-layer"),
        pytest.param("ery", "layer.1.self.query", 8, id="part-of-a-segment"),
        pytest.param("^layer.0.self.query", "layer.1.self.query", 8, id="anchored"),
    ],
)
def test_patterns_are_resolved_as_peft_does(pattern, module, expected):
    assert resolve({pattern: 2}, module, 8) == expected


@pytest.mark.parametrize(
    ("module", "layers", "patterns", "expected"),
    [
        ("model.layers.1.mlp.up_proj", [1], [], True),
        ("model.layers.1.mlp.up_proj", [0], [], False),
        ("model.layers.1.experts.0.up_proj", [0], [], False),
        ("model.layers.1.experts.0.up_proj", [0], ["experts"], True),
        ("lm_head", [0], [], False),
    ],
)
def test_layers_to_transform(module, layers, patterns, expected):
    assert in_layers(module, layers, patterns) is expected


@pytest.mark.parametrize(
    ("names", "module", "expected"),
    [
        (["classifier"], "classifier.dense", True),
        (["norm"], "model.layers.0.input_layernorm", True),
        (["model.norm"], "model.layers.0.input_layernorm", False),
        (["lm_head"], "model.norm", False),
    ],
)
def test_modules_to_save(names, module, expected):
    assert saves_module(names, module) is expected
