"""examples/quantized: one table from one command, which goes on where it stopped."""

import json

import pytest

from examples.quantized import compare
from examples.quantized.table import FIGURES


@pytest.fixture
def arguments(tmp_path, decoder_directory):
    data = tmp_path / "wikitext-2"
    data.mkdir()
    (data / "valid.txt").write_text("Hi there.\n" * 200)
    (data / "test.txt").write_text("Hi there. Bye now.\n" * 20)
    small = ("lora.rank=2", "data.max_length=24", "training.batch_size=8", "training.steps=2")
    return [
        *("--data", str(tmp_path), "--model", str(decoder_directory), "--bases", "nf4"),
        *("--out", str(tmp_path / "out"), "--window", "16", "--limit", "64", "--set", *small),
    ]


def test_a_second_call_does_nothing_again_and_other_settings_are_refused(
    tmp_path, arguments, capsys, monkeypatch
):
    assert compare.main(arguments) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = results["bases"]["nf4"]
    assert found["training"]["steps"] == 2
    assert {found[name]["tokens"] for name in FIGURES} == {4 * 15}
    assert len({found[name]["perplexity"] for name in FIGURES}) == 3
    table = (tmp_path / "out" / "table.md").read_text()
    assert f"| nf4 | 0.0 MB | {found['before']['perplexity']:.4f} |" in table
    monkeypatch.setattr(compare, "load_model", None)  # whoever loads a model again fails
    assert compare.main(arguments) == 0
    assert table.rstrip() in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert compare.main([*arguments, "training.seed=1"]) == 1
    assert "other results" in capsys.readouterr().err
