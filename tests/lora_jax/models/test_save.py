"""save_pretrained: shards, dtypes, one rounding, what is copied, and nothing where it fails."""

import json
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax
from lora_jax import LoraConfig
from lora_jax._paths import flatten
from lora_jax.io.hugging_face import find_tensors
from lora_jax.models import from_pretrained, save_merged, save_pretrained
from lora_jax.testing import assert_trees_equal
from tests.references.checkpoints import checkpoint

TASK = "sequence-classification"
INDEX = "model.safetensors.index.json"
CONFIG = LoraConfig(rank=2, alpha=3, targets=("attention/(query|value)",), train=("classifier/.*",))


def listing(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*"))


def halves(model, width=0.3):
    """The model split, with everything that trains moved."""
    layouts = {"encoder/layers/attention/.*/kernel": "stack in out"}
    config = LoraConfig(**(vars(CONFIG) | {"layouts": layouts if model.module.scan_layers else {}}))
    frozen, trainable = lora_jax.split(model.params, config, jax.random.key(0))
    return frozen, jax.tree.map(lambda x: (x + width).astype(x.dtype), trainable)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("limit", [1, 4_000, 30_000], ids="{}-bytes".format)
def test_shards_hold_what_the_limit_allows(tmp_path, limit, scan_layers):
    base = checkpoint(tmp_path / "base", "bert", TASK)
    model = from_pretrained(base, scan_layers=scan_layers)
    save_pretrained(tmp_path / "new", model, model.params, max_shard_bytes=limit)
    files = sorted((tmp_path / "new").glob("model-*.safetensors"))
    names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert [file.name for file in files] == names
    assert len(files) > 1
    assert not (tmp_path / "new" / "model.safetensors").exists()
    index = json.loads((tmp_path / "new" / INDEX).read_text())
    held = {file.name: load_file(file) for file in files}
    sizes = {name: sum(t.nbytes for t in tensors.values()) for name, tensors in held.items()}
    assert all(size <= limit or len(held[name]) == 1 for name, size in sizes.items())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert index["weight_map"] == {t: name for name, tensors in held.items() for t in tensors}
    again = from_pretrained(tmp_path / "new", new_head=False, scan_layers=scan_layers)
    assert_trees_equal(again.params, model.params)


def test_one_shard_is_one_file_without_an_index(tmp_path):
    model = from_pretrained(checkpoint(tmp_path / "base", "bert", TASK))
    save_pretrained(tmp_path / "new", model, model.params)
    assert listing(tmp_path / "new") == ["config.json", "model.safetensors"]


def test_a_limit_of_nothing_is_refused(tmp_path):
    model = from_pretrained(checkpoint(tmp_path / "base", "bert", TASK))
    with pytest.raises(ValueError, match="`max_shard_bytes` must be at least 1, got 0"):
        save_pretrained(tmp_path / "new", model, model.params, max_shard_bytes=0)


def test_the_host_holds_one_shard_at_a_time(tmp_path):
    sizes = {"vocab_size": 99, "hidden_size": 256, "num_hidden_layers": 8}
    base = tmp_path / "base"
    base.mkdir()
    fields = json.loads((checkpoint(tmp_path / "tiny", "bert", TASK) / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(fields | sizes | {"intermediate_size": 1024}))
    shapes = from_pretrained(base, abstract=True)
    params = jax.tree.map(lambda shape: jnp.ones(shape.shape, shape.dtype), shapes.params)
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    limit = total // 10
    tracemalloc.start()
    try:
        save_pretrained(tmp_path / "new", shapes, params, max_shard_bytes=limit)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The tensors of one shard, the bytes that safetensors may make of them, and change.
    print(f"{peak / 1e6:.1f} MB at the peak of writing {total / 1e6:.1f} MB")
    assert peak < 3 * limit


@pytest.mark.parametrize(
    ("stored", "asked"),
    [
        ("float32", None),
        ("float32", "bfloat16"),
        ("bfloat16", None),
        ("bfloat16", "float32"),
        ("bfloat16", "float16"),
        ("float16", None),
    ],
)
def test_weights_are_written_in_their_own_dtype_or_the_one_asked_for(tmp_path, stored, asked):
    base = checkpoint(tmp_path / "base", "roberta", TASK)
    model = from_pretrained(base, dtype=jnp.dtype(stored))
    save_pretrained(tmp_path / "new", model, model.params, dtype=asked)
    wanted = asked or stored
    again = from_pretrained(tmp_path / "new", dtype=jnp.dtype(wanted), new_head=False)
    assert {t.dtype for t in find_tensors(tmp_path / "new").values()} == {
        {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[wanted]
    }
    assert again.config_json["dtype"] == again.config_json["torch_dtype"] == wanted
    assert_trees_equal(again.params, jax.tree.map(lambda w: w.astype(wanted), model.params))


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_merging_while_writing_equals_merging_first(tmp_path, dtype, scan_layers):
    base = checkpoint(tmp_path / "base", "bert", TASK)
    model = from_pretrained(base, dtype=jnp.bfloat16, scan_layers=scan_layers)
    frozen, trainable = halves(model)
    save_merged(tmp_path / "one", model, frozen, trainable, dtype=dtype, max_shard_bytes=30_000)
    merged = lora_jax.merge(frozen, trainable, dtype=dtype)
    save_pretrained(tmp_path / "two", model, merged, max_shard_bytes=30_000)
    assert listing(tmp_path / "one") == listing(tmp_path / "two")
    for file in listing(tmp_path / "one"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_bfloat16_base_is_summed_in_float32_and_rounded_once(tmp_path, dtype):
    base = checkpoint(tmp_path / "base", "bert", TASK)
    model = from_pretrained(base, dtype=jnp.bfloat16)
    frozen, trainable = halves(model, width=1e-3)
    save_merged(tmp_path / "new", model, frozen, trainable, dtype=dtype)
    again, _ = flatten(from_pretrained(tmp_path / "new", dtype=jnp.dtype(dtype)).params)
    weights, _ = flatten(frozen, is_leaf=lambda leaf: leaf is None)
    lost = 0
    adapted = [path for path in trainable if path.endswith("kernel") and "attention" in path]
    for path in adapted:
        w, f = np.float64(weights[path]), trainable[path]
        update = f.scale * np.float64(f.a) @ np.float64(f.b)
        # Half a unit in the last place of what is written, and the float32 sum before: a unit
        # for each of its roundings, of `rank` products and sums, the scale and the last sum.
        last_place = np.float64(jnp.finfo(dtype).eps) * np.abs(w + update)
        float32 = 5 * np.finfo(np.float32).eps * (np.abs(w) + np.abs(update))
        smallest = np.float64(jnp.finfo(dtype).smallest_subnormal)
        error = np.abs(np.float64(again[path]) - (w + update))
        assert (error <= 0.5 * last_place + float32 + smallest).all()
        lost += int((np.abs(update) < np.abs(w) / 512).sum())
    assert lost > 0  # what bfloat16 cannot keep was there to be lost


def test_a_weight_out_of_range_is_named_and_nothing_is_written(tmp_path):
    model = from_pretrained(checkpoint(tmp_path / "base", "bert", TASK))
    params = jax.tree.map(lambda w: w, model.params)
    params["pooler"]["kernel"] = params["pooler"]["kernel"] * 1e6
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"'pooler/kernel' is not finite .* in float16"):
        save_pretrained(tmp_path / "new", model, params, dtype="float16")
    assert listing(tmp_path) == before


def test_a_dtype_that_is_no_float_is_refused(tmp_path):
    model = from_pretrained(checkpoint(tmp_path / "base", "bert", TASK))
    with pytest.raises(ValueError, match="`dtype` must be a float dtype"):
        save_pretrained(tmp_path / "new", model, model.params, dtype="int8")
    with pytest.raises(ValueError, match=r"`dtype` must be one of float16, .*, got float8_e4m3fn"):
        save_pretrained(tmp_path / "new", model, model.params, dtype="float8_e4m3fn")


def test_tokenizer_and_generation_config_are_copied_and_the_rest_is_not(tmp_path):
    base = checkpoint(tmp_path / "base", "bert", TASK)
    copied = ["chat_template.jinja", "generation_config.json", "tokenizer.json", "vocab.txt"]
    for name in (*copied, "README.md", "optimizer.pt"):
        (base / name).write_text(name)
    model = from_pretrained(base)
    save_pretrained(tmp_path / "new", model, model.params)
    assert listing(tmp_path / "new") == sorted([*copied, "config.json", "model.safetensors"])
    assert all((tmp_path / "new" / name).read_text() == name for name in copied)


def test_a_base_whose_directory_has_gone_is_refused(tmp_path):
    """Its tokenizer would be missing, and nothing would say so."""
    base = checkpoint(tmp_path / "base", "bert", TASK)
    model = from_pretrained(base)
    base.rename(tmp_path / "elsewhere")
    before = listing(tmp_path)
    with pytest.raises(ValueError, match=r"base, which .* no longer exists: its tokenizer"):
        save_pretrained(tmp_path / "new", model, model.params)
    with pytest.raises(ValueError, match="no longer exists"):
        save_merged(tmp_path / "new", model, *halves(model))
    assert listing(tmp_path) == before


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_tied_head_is_not_stored_twice(tmp_path, family):
    model = from_pretrained(checkpoint(tmp_path / "base", family, "masked-lm"), "masked-lm")
    save_pretrained(tmp_path / "new", model, model.params)
    assert not [name for name in find_tensors(tmp_path / "new") if "decoder" in name]


def test_every_problem_of_the_weights_is_listed(tmp_path):
    model = from_pretrained(checkpoint(tmp_path / "base", "bert", TASK))
    config = LoraConfig(rank=2, alpha=2, targets=("layers/0/.*/query",))
    params = lora_jax.combine(*lora_jax.split(model.params, config, jax.random.key(0)))
    params["poolre"] = {"bias": params["pooler"].pop("bias")}
    params["pooler"]["kernel"] = jax.ShapeDtypeStruct((32, 32), jnp.float32)
    params["classifier"] = {"kernel": jnp.ones((32, 4)), "bias": jnp.ones(3, jnp.int32)}
    params["embeddings"]["norm"]["scale"] = object()
    before = listing(tmp_path)
    with pytest.raises(ValueError, match="These are not plain weights of the model:") as caught:
        save_pretrained(tmp_path / "new", model, params)
    problems = sorted(line.strip() for line in str(caught.value).splitlines()[1:])
    assert problems == [
        "missing: pooler/bias",
        "no values: pooler/kernel; load the model with abstract=False",
        "not a float array: classifier/bias is int32",
        "not a float array: embeddings/norm/scale is object",
        "not merged: encoder/layers/0/attention/query/kernel; lora_jax.merge gives plain weights",
        "shape: classifier/kernel is (32, 4), the model has (32, 3)",
        "unknown: poolre/bias; the nearest is pooler/bias",
    ]
    assert listing(tmp_path) == before


FULL_DISK = """
import resource, sys
from lora_jax.models import from_pretrained, save_pretrained
base, new = sys.argv[1:]
model = from_pretrained(base)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
for limit in (50_000, 15_000):
    try:
        save_pretrained(new, model, model.params, max_shard_bytes=limit, overwrite=True)
    except OSError as error:
        print(error)
"""


def test_a_full_disk_leaves_what_was_there_and_nothing_else(tmp_path):
    """A limit on the size of a file, 20 kB, stands for the disk: for shards, then for a copy."""
    base = checkpoint(tmp_path / "base", "bert", TASK)
    (base / "tokenizer.json").write_bytes(b"x" * 50_000)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "precious").write_text("")
    before = listing(tmp_path)
    command = [sys.executable, "-c", FULL_DISK, str(base), str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shards, copy = done.stdout.splitlines()
    assert "model-00001-of-00002.safetensors could not be written" in shards
    assert "tokenizer.json" in copy
    assert listing(tmp_path) == before
