"""One step beside the peers': the tiny case runs, and tables say what the rows say."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from benchmarks.step import batches, buffers, cases, job, kernels, ours, processes, program, worker
from benchmarks.step.__main__ import main
from benchmarks.step.cases import CASES
from benchmarks.step.contenders import CONTENDERS, why_not
from benchmarks.step.job import Job
from benchmarks.step.table import GIB, ratios, tables

ROOT = Path(__file__).parents[2]
# A step of 8 rows of 512 tokens.
CASE = CASES["gpt2-medium"]
STEP = {"median": 0.1, "least": 0.09, "most": 0.12}
OURS = {
    "case": "gpt2-medium",
    "contender": "ours",
    "status": "measured",
    "step_seconds": STEP,
    "first_step_seconds": 3.0,
    "cold": {"first_step_seconds": 40.0, "compile_seconds": 31.0},
    "peak_bytes": 2 * GIB,
    "planned": {"total": 2 * GIB, "temporaries": GIB},
    "matmul_flops": 8e14,
    "loss": 10.8,
}
PEER = {
    "case": "gpt2-medium",
    "contender": "peft",
    "status": "measured",
    "step_seconds": {name: 1.5 * seconds for name, seconds in STEP.items()},
    "first_step_seconds": 1.0,
    "peak_bytes": 8 * GIB,
    "loss": 10.9,
}
LATE = {"case": "gpt2-medium", "contender": "peft-compile", "status": "late", "why": "not done"}


@pytest.mark.parametrize("module", [buffers, cases, job, kernels, ours, program])
def test_examples_in_docstrings(module):
    done = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert done.attempted > 0
    assert done.failed == 0


@pytest.mark.parametrize(
    ("name", "parameters", "attention"),
    [
        # 16 layers of width 2048: query and out; key and value of 512; three of 8192; the table.
        pytest.param(
            "llama-1b",
            16 * (2 * 2048**2 + 2 * 2048 * 512 + 3 * 2048 * 8192) + 2048 * 128256,
            6 * 2048 * 2048 * 16,
            id="llama-1b",
        ),
        pytest.param(
            "llama-8b",
            32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256,
            6 * 2048 * 4096 * 32,
            id="llama-8b",
        ),
        pytest.param(
            "gpt2-medium",
            24 * 12 * 1024**2 + 1024 * 50257,
            6 * 512 * 1024 * 24,
            id="gpt2-medium",
        ),
        pytest.param("roberta-base", 12 * 12 * 768**2, 12 * 128 * 768 * 12, id="roberta-base"),
    ],
)
def test_flops_are_four_a_parameter_and_attention(name, parameters, attention):
    assert cases.flops_a_token(CASES[name]) == 4 * parameters + attention


@pytest.mark.parametrize("name", ["llama-8b", "gpt2-medium", "roberta-base"])
def test_matrices_are_those_that_the_model_has(name):
    case = CASES[name]
    causal = case.shape.task == "causal-lm"
    model = ours.make_model(Job(case=name, contender="ours", layers="scanned"))
    sizes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params)
    }
    matrices = [path for path in sizes if path.endswith("kernel") and "classifier" not in path]
    if causal and "lm_head/kernel" not in sizes:
        matrices.append("wte/embedding")  # the head too
    expected = cases.matrix_parameters(case.shape.fields, head=causal)
    assert sum(sizes[path] for path in matrices) == expected


def test_ratios_are_ours_over_theirs():
    tokens = 8 * 512 / 0.1
    found = ratios(PEER, {"tokens": tokens, "peak": 2 * GIB, "matmul": 8e14}, CASE)
    flops = tokens / 1.5 * (4 * (24 * 12 * 1024**2 + 1024 * 50257) + 6 * 512 * 1024 * 24)
    assert found == pytest.approx({"speed": 1.5, "memory": 0.25, "use": flops / 8e14})


def test_the_table_has_a_line_for_every_contender():
    text = tables([OURS, PEER, LATE])
    rows = {line.split(" | ")[0]: line.split(" | ") for line in text.splitlines() if " | " in line}
    assert rows["| ours"][1:5] == ["40,960", "1.00", "2.00", "1.00"]
    assert rows["| peft"][1:5] == ["27,307", "1.50", "8.00", "0.25"]
    assert rows["| peft"][5] == "150.0 (135.0 to 180.0)"
    assert "- peft-compile: late, not done" in text
    assert "first step after 40.0 s with an empty compilation cache, 31.0 s of it" in text
    assert "XLA plans 2.00 GiB, 1.00 of them temporaries" in text


def test_without_ours_there_are_no_ratios():
    failed = {"case": "gpt2-medium", "contender": "ours", "status": "failed", "why": "no room"}
    text = tables([failed, PEER])
    assert "| peft | 27,307 | - | 8.00 | - | 150.0 (135.0 to 180.0) | 1.0 | - | 10.900 |" in text
    assert "- ours: failed, no room" in text


def test_batches_are_the_same_for_all_and_different_from_step_to_step():
    first, again = (batches.batches(CASES["tiny"]) for _ in range(2))
    assert all((a["input_ids"] == b["input_ids"]).all() for a, b in zip(first, again, strict=True))
    assert len({batch["input_ids"].tobytes() for batch in first}) == batches.DISTINCT
    assert all(batch["input_ids"].shape == (4, 32) for batch in first)


def test_a_peer_of_other_models_says_which_it_is_made_for():
    assert why_not("unsloth", CASES["gpt2-medium"]) == "is made for llama, not for gpt2"


def test_what_is_missing_is_named(monkeypatch):
    contender = CONTENDERS["peft"]
    monkeypatch.setitem(contender.needs, "no_such_module", "no-such-package")
    assert "no-such-package" in (why_not("peft", CASES["tiny"]) or "")


def test_an_error_is_a_row():
    row = worker.outcome(Job(case="tiny", contender="ours", remat="nonsense"))
    assert row["status"] == "failed"
    assert "nonsense" in row["why"]


def test_a_variant_of_something_else_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"does not set batch\."):
        main(["--variants", "remat=named,batch=4", "--out", str(tmp_path / "step.json")])


def test_a_process_ends_with_its_time(monkeypatch, tmp_path):
    monkeypatch.setattr(processes, "LEAST", 0.0)
    row = processes.run(Job(case="tiny", contender="ours"), 0.5, tmp_path / "log.txt")
    assert row == {"status": "late", "why": "not done after 0 s"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("step") / "step.json"
    arguments = ("--contenders", "ours", "peft", "--layers", "scanned", "--once", "--out", str(out))
    steps = ("--warmup", "1", "--rounds", "2", "--steps", "2")
    done = subprocess.run(
        (sys.executable, "-m", "benchmarks.step", *arguments, *steps),
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    return done, json.loads(out.read_text())


def test_the_tiny_case_runs(finished):
    done, (row, _) = finished
    assert done.returncode == 0, done.stderr
    assert row["status"] == "measured"
    # 2 layers, rank 16: four matrices of 64 by 64 or 32, three of 64 by 128.
    assert row["trained"] == 2 * 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert row["timed_steps"] == 4
    # Random words of 256 are as likely as each other: log(256) = 5.5, and logits are small.
    assert row["loss"] == pytest.approx(5.5, abs=0.3)
    assert row["step_seconds"]["least"] <= row["step_seconds"]["median"]


def test_the_command_prints_the_table(finished):
    done, (_, peer) = finished
    assert "## tiny" in done.stdout
    assert "| ours |" in done.stdout
    assert peer["status"] in ("absent", "measured")
    assert f"peft: {peer['status']}" in done.stderr


TOY = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from benchmarks.step.profiling import profile

def train_step(x, w):
    return jnp.tanh(x @ w) @ w

x = jnp.ones((256, 256))
compiled = jax.jit(train_step).lower(x, x).compile()
profile(compiled, lambda: compiled(x, x), Path(sys.argv[1]))
"""


def test_the_profile_names_operations_and_buffers(tmp_path):
    asked = Job(case="tiny", contender="ours", profile=str(tmp_path))
    flags = processes.environment(asked, tmp_path)["XLA_FLAGS"]
    subprocess.run(
        (sys.executable, "-c", TOY, str(tmp_path)),
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flags},
        check=True,
    )
    report = (tmp_path / "profile.md").read_text()
    for title in ("Places in the model", "Kinds of operations", "Operations", "Kernels"):
        assert f"## {title}" in report
    assert "| dot_general |" in report
    # Two inputs, tanh and the result: at least four buffers of 256 KiB at the peak.
    assert "f32[256,256]" in report.split("## Buffers at the peak")[1]
