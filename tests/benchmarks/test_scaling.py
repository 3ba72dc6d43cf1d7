"""Scaling: the command runs over virtual devices, and programs are read as they are written."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import lora_jax
from benchmarks.scaling import figure, ours as scaled, points, table, wire
from benchmarks.scaling.__main__ import DEFAULT, environment, main, parse
from benchmarks.scaling.wire import Collective
from benchmarks.step import ours, weights
from benchmarks.step.cases import CASES
from benchmarks.step.job import Job
from lora_jax import training

ROOT = Path(__file__).parents[2]
COUNT = 8
FLAGS = (
    f"--xla_force_host_platform_device_count={COUNT}",
    "--xla_backend_optimization_level=0",  # compiles in half the time
    "--xla_llvm_disable_expensive_passes=true",
)
VIRTUAL = {"XLA_FLAGS": " ".join(FLAGS)}
SCALARS = 64  # bytes: loss, weight, and the parts of a norm
DECODERS = [name for name, case in CASES.items() if case.shape.task == "causal-lm"]


@pytest.mark.parametrize("module", [points, wire])
def test_examples_in_docstrings(module):
    done = doctest.testmod(module)
    assert done.attempted > 0
    assert done.failed == 0


PROGRAM = """\
HloModule jit_train_step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%wrapped (p: f32[64]) -> f32[8] {
  ROOT %rs = f32[8]{0} reduce-scatter(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

%body (c: (s32[], bf16[4,2])) -> (s32[], bf16[4,2]) {
  %ag = bf16[32,2]{1,0} all-gather(%w), replica_groups=[1,8]<=[8], dimensions={0}
  %inner = (s32[]) while(%t), condition=%cond, body=%inner_body, \
backend_config={"known_trip_count":{"n":"2"}}
}

%inner_body (c: (s32[])) -> (s32[]) {
  %sums = (f32[], u8[3]{0}) all-reduce(%a, %b), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, \
to_apply=%add
}

%open_body (c: (s32[])) -> (s32[]) {
  %cp = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%x), \
source_target_pairs={{0,1},{1,0}}
  %cpd = f32[5]{0} collective-permute-done(%cp)
}

%never_called (p: f32[64]) -> f32[64] {
  ROOT %no = f32[64]{0} all-reduce(%p), replica_groups={}, to_apply=%add
}

ENTRY %main (p: f32[64]) -> f32[64] {
  %loop = (s32[], bf16[4,2]) while(%t), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
  %open = (s32[]) while(%t), condition=%cond, body=%open_body
  %ars = f32[64]{0} all-reduce-start(%p), replica_groups={}, to_apply=%add
  %ard = f32[64]{0} all-reduce-done(%ars)
  %ags = (bf16[4]{0}, bf16[16]{0:T(128)}) all-gather-start(%q), replica_groups={{0,1,2,3},{4,5,6,7}}
  %agd = bf16[16]{0} all-gather-done(%ags)
  %start = ((f32[64]{0}), f32[8]{0}) async-start(%p), calls=%wrapped
  %all-reduce.9 = f32[64]{0} fusion(%ard, %agd), kind=kLoop, calls=%fused
}
"""


def test_collectives_are_read_with_their_bytes_groups_and_loops():
    found, unknown = wire.collectives(PROGRAM)
    assert sorted(found) == sorted(
        [
            Collective("all-gather", 32 * 2 * 2, 8, times=3),
            Collective("all-reduce", 4 + 3, 4, times=3 * 2),
            Collective("collective-permute", 5 * 4, 8),
            Collective("all-reduce", 64 * 4, 8),
            Collective("all-gather", 16 * 2, 4),
            Collective("reduce-scatter", 8 * 4, 8),
        ]
    )
    assert unknown == 1


def test_bytes_are_summed_by_kind_and_sent_around_a_ring():
    moved = wire.moved(PROGRAM)
    assert moved["results"] == {
        "all-gather": 3 * 128 + 32,
        "all-reduce": 6 * 7 + 256,
        "collective-permute": 20,
        "reduce-scatter": 32,
    }
    gathered = 3 * 128 * 7 / 8 + 32 * 3 / 4
    reduced = 6 * 7 * 2 * 3 / 4 + 256 * 2 * 7 / 8
    assert moved["sent"] == round(gathered + reduced + 20 + 32 * 7)


def row(devices: int, seconds: float, **fields) -> dict:
    size = {"devices": devices, "rows": 8 * devices, "passes": 1}
    names = {"case": "gpt2-medium", "contender": "ours", "scaling": "weak", "way": "data"}
    step = {"median": seconds, "least": seconds, "most": seconds}
    figures = {"status": "measured", "step_seconds": step, "first_step_seconds": 3.0}
    return names | size | figures | fields


def test_efficiency_is_against_one_device_of_the_same_case_contender_and_scaling():
    wired = {"results": {"all-reduce": 3_000_000}, "sent": 5_250_000}
    rows = [
        row(1, 0.05, scaling="strong"),
        row(1, 0.05, contender="liger"),
        row(1, 0.1),
        row(8, 0.125, way="fsdp", wire=wired, peak_bytes=2**31),
        row(8, 0.2, contender="peft"),
    ]
    # 8 times the tokens in 1.25 times the time.
    assert table.rate(rows[3]) == pytest.approx(8 * 8 * 512 / 0.125)
    assert table.efficiency(rows[3], rows) == pytest.approx(0.8)
    assert table.efficiency(rows[2], rows) == 1
    assert table.efficiency(rows[4], rows) is None
    line = table.table(rows).splitlines()[5]
    assert "| fsdp | 8 | 64 x 1 | 262,144 | 80.0% | 125.0 (125.0 to 125.0) |" in line
    assert "| all-reduce 3.00 | 5.25 | 2.00 | - | 3.0 |" in line


def test_a_variant_stands_beside_what_it_varies_and_no_other_work():
    rows = [
        row(1, 0.1),
        row(8, 0.125, contender="ours, remat=full"),
        row(8, 0.125, contender="ours, remat=full") | {"rows": 128},
        row(1, 0.2, contender="ours, remat=none"),
        row(8, 0.2, contender="ours, remat=none"),
    ]
    assert table.efficiency(rows[1], rows) == pytest.approx(0.8)
    assert table.efficiency(rows[2], rows) is None
    assert table.efficiency(rows[4], rows) == pytest.approx(1)


def test_the_figure_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [row(1, 0.1), row(2, 0.11), row(2, 0.12, contender="peft"), row(4, 0, status="late")]
    assert figure.draw(tmp_path / "scaling.png", rows) is None
    assert (tmp_path / "scaling.png").stat().st_size > 0
    assert figure.draw(tmp_path / "alone.png", rows[1:]) is None  # nothing to compare with
    assert "nothing was measured" in (figure.draw(tmp_path / "no.png", rows[3:]) or "matplotlib")


@pytest.mark.parametrize("case", DECODERS)
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_no_device_holds_more_than_the_cases_batch(case, devices):
    batch = CASES[case].shape.batch
    assert points.share("weak", batch, devices) == (batch * devices, 1)
    rows, passes = points.share("strong", batch, devices)
    assert rows == points.share("strong", batch, 1)[0]
    assert rows / devices / passes <= batch


def test_one_device_is_one_point_whichever_way():
    chosen = parse(["--devices", "1", "2", "--scaling", "weak", "--contenders", *DEFAULT])
    found = list(points.points(chosen, Path("cache")))
    assert [(names["contender"], names["way"], names["devices"]) for names, _ in found] == [
        ("ours", "data", 1),
        ("ours", "data", 2),
        ("ours", "fsdp", 1),
        ("ours", "fsdp", 2),
        ("peft-autocast", "data", 1),
        ("peft-autocast", "data", 2),
    ]
    alone = [point for names, point in found if names["devices"] == 1][:2]
    assert alone[0] == alone[1]
    assert found[1][1].work.shape.batch == 2 * CASES["tiny"].shape.batch


def test_rows_of_a_device_may_be_others():
    chosen = parse(["--devices", "1", "2", "--rows", "6", "--ways", "fsdp", "--contenders", "ours"])
    found = {
        (names["scaling"], point.devices): point for names, point in points.points(chosen, Path())
    }
    assert {at: (point.rows, point.passes) for at, point in found.items()} == {
        ("weak", 1): (6, 1),
        ("weak", 2): (12, 1),
        ("strong", 1): (8, 2),
        ("strong", 2): (8, 1),
    }
    assert {names["contender"] for names, _ in points.points(chosen, Path())} == {"ours, 6 rows"}


def test_devices_that_cannot_share_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="tiny, strong scaling: 3 devices cannot share 8 rows"):
        main(["--devices", "3", "--out", str(tmp_path)])


@pytest.mark.parametrize("rows", ["0", "-2"])
def test_a_device_has_a_row_at_least(tmp_path, rows):
    with pytest.raises(SystemExit, match=f"counts from 1, got {rows}"):
        main(["--rows", rows, "--out", str(tmp_path)])


def test_multicast_is_off_whatever_the_shell_says(monkeypatch):
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    assert environment()["NCCL_NVLS_ENABLE"] == "0"
    flags = environment({"xla_gpu_enable_triton_gemm": "False"})["XLA_FLAGS"].split()
    assert flags[-1] == "--xla_gpu_enable_triton_gemm=false"
    assert flags[:-1] == os.environ.get("XLA_FLAGS", "").split()


@pytest.mark.parametrize("case", ["tiny", "tiny-nf4"])
def test_weights_are_drawn_where_they_belong(case):
    model = ours.make_model(Job(case=case, contender="ours", layers="scanned"))
    mesh = training.make_mesh(fsdp=COUNT, devices=jax.devices()[:COUNT])
    config = lora_jax.LoraConfig(rank=4, alpha=8.0, **CASES[case].shape.lora)
    halves = jax.eval_shape(
        lambda params: lora_jax.split(params, config, jax.random.key(0), layouts=model.layouts),
        model.params,
    )
    places = training.placements(*halves, mesh, layouts=model.layouts).frozen
    drawn = weights.random_weights(model.params, CASES[case].scheme, places)
    assert jax.tree.map(lambda leaf: leaf.sharding, drawn) == places
    assert jax.tree.map(lambda leaf: leaf.shape, drawn) == jax.tree.map(
        lambda leaf: leaf.shape, model.params
    )


def test_drawing_needs_no_whole_weight():
    mesh = training.make_mesh(fsdp=COUNT, devices=jax.devices()[:COUNT])
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    key = jax.random.key(0, impl=weights.KEY)
    what = key, "kernel", (1024, 512), jax.numpy.dtype("bfloat16")
    plan = weights._drawer(place).lower(*what).compile().memory_analysis()
    part = 2 * 1024 * 512 // COUNT
    assert plan.output_size_in_bytes == part
    assert plan.temp_size_in_bytes <= 4 * part  # its bits, and it in float32


STEPS = ("--layers", "scanned", "--warmup", "1", "--rounds", "1", "--steps", "1")
ASKED = ("--cases", "tiny", "--contenders", "ours", "--scaling", "weak", *STEPS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("scaling")
    asked = ("--ways", "data", "fsdp", "--devices", "1", "8", "16", "--out", str(out))
    done = subprocess.run(
        (sys.executable, "-m", "benchmarks.scaling", *ASKED, *asked),
        cwd=ROOT,
        env=os.environ | VIRTUAL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((out / "scaling.json").read_text())
    return done, {(row["way"], row["devices"]): row for row in rows}, out


def test_data_parallel_sends_the_factors_gradients_alone(finished):
    _, rows, _ = finished
    row = rows["data", 8]
    assert row["status"] == "measured"
    assert row["rows"] == 4 * 8
    # Words of 256 that are as likely as each other, log(256), and logits that are small.
    assert row["loss"] == pytest.approx(5.5, abs=0.3)
    moved = row["wire"]
    assert moved["results"].keys() == {"all-reduce"}
    assert row["trained_bytes"] <= moved["results"]["all-reduce"] <= row["trained_bytes"] + SCALARS
    assert moved["sent"] == round(2 * 7 / 8 * moved["results"]["all-reduce"])
    assert moved["in_loops_of_unknown_length"] == 0


def test_fsdp_gathers_every_weight_forwards_and_at_most_once_more_backwards(finished):
    _, rows, _ = finished
    row = rows["fsdp", 8]
    assert row["status"] == "measured"
    found = row["wire"]["results"]
    assert found.keys() == {"all-gather", "all-reduce", "all-to-all"}
    assert row["trained_bytes"] <= found["all-reduce"] <= row["trained_bytes"] + SCALARS
    # Rows of the embedding, of a device's part of the batch, in bfloat16 or float32.
    shape = CASES["tiny"].shape
    embedded = shape.batch * shape.length * shape.fields["hidden_size"]
    assert found["all-to-all"] in (2 * embedded, 4 * embedded)
    model = ours.make_model(Job(case="tiny", contender="ours"))
    held = sum(leaf.size for leaf in jax.tree.leaves(model.params) if leaf.ndim > 1)
    # Weights are bfloat16, of which a CPU makes float32 before it gathers them.
    assert 2 * held <= found["all-gather"] <= 2 * 4 * held + row["trained_bytes"]


def test_passes_over_two_devices_send_gradients_at_most_once_each():
    fields = {"way": "data", "devices": 2, "rows": 16, "passes": 2, "layers": "scanned"}
    point = points.Point(case="tiny", contender="ours", start_only=True, **fields)
    found = scaled.measure(point)
    summed = found["wire"]["results"]["all-reduce"]
    assert found["trained_bytes"] <= summed <= 2 * (found["trained_bytes"] + SCALARS)
    assert found["loss"] == pytest.approx(5.5, abs=0.3)


def test_one_device_sends_nothing_and_is_measured_once(finished):
    _, rows, _ = finished
    alone = rows["data", 1]
    assert alone["wire"]["results"] == {}
    assert rows["fsdp", 1]["step_seconds"] == alone["step_seconds"]


def test_a_machine_with_fewer_devices_says_so(finished):
    done, rows, _ = finished
    for way in ("data", "fsdp"):
        assert rows[way, 16]["status"] == "absent"
        assert rows[way, 16]["why"] == "16 devices, and this machine has 8"
    assert "| 16 | 64 x 1 | absent: 16 devices, and this machine has 8 |" in done.stdout
    assert "tiny, ours, weak, data, 8: measured" in done.stderr


def test_what_was_measured_is_not_measured_again(finished, monkeypatch, tmp_path):
    _, rows, out = finished
    monkeypatch.setenv("XLA_FLAGS", VIRTUAL["XLA_FLAGS"])
    earlier = ("--earlier", str(out / "scaling.json"), "--minutes", "0", "--out", str(tmp_path))
    assert main([*ASKED, "--devices", "1", "8", "--ways", "fsdp", *earlier]) == 0
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert found == [rows["fsdp", 1], rows["fsdp", 8]]
    assert main([*ASKED, "--chunk", "16", "--devices", "8", "--ways", "fsdp", *earlier]) == 1
    (row,) = json.loads((tmp_path / "scaling.json").read_text())
    assert (row["status"], row["why"]) == ("not run", "the time was up")
