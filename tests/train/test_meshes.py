"""A run on a mesh of any shape, or taken apart into passes, is the run on one device."""

import json
import shutil

import numpy as np
import pytest

from tests.train.running import steps
from train import cli, evaluate


@pytest.fixture
def folder(tmp_path, write_run, model_directory):
    """A run whose model has no dropout: passes would each draw their own."""
    model = shutil.copytree(model_directory, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    (model / "config.json").write_text(json.dumps(config | dropout))
    return write_run(tmp_path)


def train(folder, *arguments):
    own = (f"model.path={folder / 'model'}", "lora.dropout=0", "training.steps=6")
    return cli.main([str(folder / "run.yaml"), *own, *arguments])


def test_the_same_run(folder):
    found = {}
    for arguments in (
        ["mesh.fsdp=1"],
        ["mesh.fsdp=2", "mesh.tensor=2", "training.batch_size_per_device=4"],
        ["mesh.fsdp=8", "training.batch_size=16"],
        ["training.accumulate=2"],
    ):
        assert train(folder, "--overwrite", *arguments) == 0
        result = json.loads((folder / "out" / "result.json").read_text())
        figures = [*steps(folder).values(), result["metrics"]["loss"]]
        found[" ".join(arguments)] = figures, result["trained_parameters"]
    whole, trained = found.pop("mesh.fsdp=1")
    for name, (figures, count) in found.items():
        # Sums of float32 in another order, through six updates of Adam, which divides by their
        # size.
        np.testing.assert_allclose(figures, whole, rtol=1e-4, err_msg=name)
        assert count == trained


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mesh.fsdp=3"], "takes 6 devices, and there are 8"),
        (["training.batch_size=16", "training.batch_size_per_device=4"], "not 4: 4 each would be"),
        (["training.accumulate=3"], "does not divide over 8 devices, 3 times each"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_read(folder, capsys, arguments, message):
    assert train(folder, "data.train=" + str(folder / "rows.csv"), *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_run_is_evaluated_where_it_was_trained(folder, capsys):
    """On its own mesh, or on all devices side by side where that has become another."""
    assert train(folder, "mesh.fsdp=4", "mesh.tensor=2") == 0
    wanted = json.loads((folder / "out" / "result.json").read_text())["metrics"]
    config = folder / "out" / "config.yaml"
    written = config.read_text()
    for text, said in ((written, False), (written.replace("fsdp: 4", "fsdp: 3"), True)):
        config.write_text(text)
        capsys.readouterr()
        assert evaluate.main([str(folder / "out"), "--json"]) == 0
        printed = capsys.readouterr()
        found = json.loads(printed.out)
        assert found == pytest.approx(wanted, rel=1e-5)
        assert ("on 8 devices, each holds the whole model" in printed.err) == said


def test_a_cut_model_needs_the_host(folder, capsys, monkeypatch):
    """As with JAX_PLATFORMS=cuda, which leaves JAX without a CPU."""

    def without(backend):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr("jax.local_devices", without)
    assert train(folder, "mesh.fsdp=8") == 2
    assert "add cpu to JAX_PLATFORMS" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_a_dry_run_says_what_a_device_holds(folder, capsys):
    held = {}
    for name, arguments in {"whole": [], "cut": ["mesh.fsdp=8"]}.items():
        assert train(folder, "--dry-run", "--json", *arguments) == 0
        held[name] = json.loads(capsys.readouterr().out)["memory"]["arguments"]
    assert held["cut"] < held["whole"] / 2
