"""The claims: counts are the paper's, predicted files are written ones, and every part reports."""

import dataclasses
import json
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from benchmarks.claims import arithmetic, clock, files, jobs, processes, worker
from benchmarks.claims.__main__ import POINT, earlier, main
from benchmarks.claims.jobs import Job
from benchmarks.claims.shapes import SHAPES, TINY
from benchmarks.claims.tables import table

SMALL = dataclasses.replace(
    jobs.GRIDS["cpu"], ranks=(16,), rank_batch=4, lengths=(16,), batches=(4,), row=32
)


@pytest.fixture(scope="module")
def rows():
    return {row["size"]: row for row in arithmetic.rows()}


@pytest.mark.parametrize(
    ("size", "factors"),
    [
        pytest.param("gpt2-small", 12 * 2 * 4 * (768 + 768), id="gpt2-small"),
        pytest.param("gpt2-medium", 393_216, id="gpt2-medium"),
        pytest.param("gpt2-large", 36 * 2 * 4 * (1280 + 1280), id="gpt2-large"),
        pytest.param("roberta-base", 294_912, id="roberta-base"),
        pytest.param("roberta-large", 24 * 2 * 8 * (1024 + 1024), id="roberta-large"),
        # query, out: width to width; key, value: width to 512 or 1024; gate, up, down.
        pytest.param(
            "llama-1b", 16 * 16 * (2 * 4096 + 2 * (2048 + 512) + 3 * (2048 + 8192)), id="llama-1b"
        ),
        pytest.param(
            "llama-8b", 32 * 16 * (2 * 8192 + 2 * (4096 + 1024) + 3 * (4096 + 14336)), id="llama-8b"
        ),
        pytest.param("gpt3-175b", 96 * 2 * 4 * (12288 + 12288), id="gpt3-175b"),
    ],
)
def test_factors_are_as_many_as_the_targets_have_rows_and_columns(rows, size, factors):
    assert rows[size]["factors"] == factors


@pytest.mark.parametrize("size", [size for size in arithmetic.SIZES if SHAPES[size].total])
def test_models_have_the_size_that_the_paper_says(rows, size):
    # The paper rounds, and counts no head; 0.3 % is the head of RoBERTa base.
    assert rows[size]["parameters"] / 1e6 == pytest.approx(SHAPES[size].total, rel=3e-3)


def test_the_head_trains_in_full(rows):
    # dense: 768 * 768 + 768; out_proj: 768 * 2 + 2
    assert rows["roberta-base"]["trained"] == 294_912 + 768 * 768 + 768 + 768 * 2 + 2


def test_the_checkpoint_of_gpt3_shrinks_ten_thousand_times(rows):
    row = rows["gpt3-175b"]
    in_16_bits = 2 * row["factors"]
    assert in_16_bits / 2**20 == 36  # the paper: 35 MB
    assert 9_000 < row["full_file_bytes"] / in_16_bits < 10_000  # the paper: "roughly 10,000x"
    # Two moments of every weight beside the weights, against the weights alone: 3 to 1.
    assert row["full_state_bytes"] / row["lora_state_bytes"] == pytest.approx(3, rel=1e-2)


@pytest.mark.parametrize("size", TINY)
def test_predicted_files_are_as_long_as_written_ones(size):
    found = files.written(SHAPES[size])
    assert found["full_predicted"] == found["full_written"]
    assert found["adapter_predicted"] == found["adapter_written"]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """One run of the command on the smallest model: exit code and directory."""
    out = tmp_path_factory.mktemp("claims")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(jobs.GRIDS, "cpu", SMALL)
        # What two of its processes need is compiled once.
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(out / "cache"))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        arguments = ["--parts", "a", "b", "c", "d", "--sizes", "tiny", "--seconds", "0.05"]
        return main([*arguments, "--minutes", "10", "--out", str(out)]), out


def test_the_command_measures_every_point(command):
    code, out = command
    results = json.loads((out / "claims.json").read_text())
    assert code == 0, (out / "log.txt").read_text()
    assert list(results) == ["a", "b", "c", "d"]
    measured = {part: results[part]["rows"] for part in "bcd"}
    assert {part: len(found) for part, found in measured.items()} == {"b": 2, "c": 1, "d": 3}
    assert all(row["status"] == "measured" for found in measured.values() for row in found)
    assert all(row["memory_bytes"] > row["temp_bytes"] > 0 for row in measured["b"])
    assert measured["c"][0]["same_hlo"]
    lora, full = measured["b"]
    assert lora["optimizer_bytes"] < full["optimizer_bytes"]
    assert lora["activation_bytes"] <= full["activation_bytes"]


def test_the_tables_have_a_line_for_every_point(command):
    text = (command[1] / "claims.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| tiny")]
    assert len(lines) == 1 + len(TINY) + 2 + 1 + 3
    assert "Without figures" not in text


def test_the_figure_is_a_png(command):
    assert (command[1] / "claims.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def point(rank, status="measured", **figures):
    names = dict.fromkeys(POINT, "") | {"part": "c", "rank": rank}
    return names | {"status": status} | figures


def test_earlier_results_join_and_each_point_stands_once(tmp_path):
    calls = [
        {
            "a": {"rows": [1], "written": [1]},
            "c": {
                "rows": [point(1, ratio=1.0), point(2, "not run", why="late"), point(4, ratio=4.0)],
                "machines": ["one"],
            },
        },
        {
            "b": {"rows": [point(8)], "machines": ["two"]},
            "c": {
                "rows": [point(1, "not run", why="late"), point(2, ratio=2.0), point(4, ratio=4.5)],
                "machines": ["two"],
            },
        },
    ]
    names = [str(tmp_path / f"{number}.json") for number in range(len(calls))]
    for name, call in zip(names, calls, strict=True):
        Path(name).write_text(json.dumps(call))
    assert earlier(names) == {
        "a": {"rows": [1], "written": [1]},
        "b": {"rows": [point(8)], "machines": ["two"]},
        "c": {
            "rows": [point(1, ratio=1.0), point(2, ratio=2.0), point(4, ratio=4.5)],
            "machines": ["one", "two"],
        },
    }


def test_a_point_that_does_not_fit_says_so(monkeypatch):
    def measure(job):
        return {"bytes": jnp.zeros(2**38).nbytes}  # a TiB, which no machine gives

    monkeypatch.setitem(worker.KINDS, "huge", measure)
    row = worker.outcome(Job(part="d", kind="huge", size="tiny"))
    assert (row["status"], row["why"]) == ("does not fit", "out of device memory")


def test_what_runs_late_is_cut_off_and_named(tmp_path):
    endless = Job(part="d", kind="step", size="tiny", batch=1, length=8, rank=1, seconds=1e6)
    begun = time.monotonic()
    end = begun + processes.LEAST + 0.5
    found = list(processes.run([endless, endless], end, tmp_path / "log.txt"))
    assert [row["status"] for row in found] == ["not run", "not run"]
    assert {row["why"] for row in found} == {processes.LATE}


def test_an_interval_holds_the_median():
    # n / 2 -+ 0.98 sqrt(n) of 100 samples: the 40th and the 60th, counted from 0.
    found = clock.spread([float(n) for n in reversed(range(100))])
    assert found == clock.Spread(median=49.5, low=40.0, high=60.0)


def test_table_is_markdown():
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| :-- | --: |\n| 1 | 2 |"
