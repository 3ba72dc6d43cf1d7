"""What a checkpoint may look like, and what each that may not is refused for."""

import json
import os
import stat

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax.io._checkpoint_writer import write_checkpoint
from lora_jax.io._safetensors import write_tensors
from lora_jax.io.hub import find_checkpoint, looks_like_path
from lora_jax.io.hugging_face import find_tensors
from lora_jax.io.names import NameTable, Row, expand
from lora_jax.models import from_pretrained
from tests.references.checkpoints import checkpoint, config_json, sharded, tensors, write

TASK = "sequence-classification"


def index_of(directory, weight_map):
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_one_file_and_two_give_the_same(tmp_path):
    one = find_tensors(checkpoint(tmp_path / "one", "bert", TASK))
    two = find_tensors(sharded(tmp_path / "two", "bert", TASK))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name].read(), two[name].read())


@pytest.mark.parametrize(
    "shard",
    [
        pytest.param("../outside.safetensors", id="parent"),
        pytest.param("sub/../../outside.safetensors", id="through-a-folder"),
        pytest.param("/tmp/outside.safetensors", id="absolute"),
        pytest.param("sub\\outside.safetensors", id="backslash"),
        pytest.param("..", id="dots"),
        pytest.param("", id="empty"),
    ],
)
def test_a_shard_name_that_leaves_the_directory_is_refused(tmp_path, shard):
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "outside.safetensors")
    directory = tmp_path / "model"
    directory.mkdir()
    index_of(directory, {"x": shard})
    with pytest.raises(ValueError, match="only plain file names are read"):
        find_tensors(directory)


def test_a_shard_that_links_out_of_the_directory_is_refused(tmp_path):
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "outside.safetensors")
    directory = tmp_path / "model"
    directory.mkdir()
    os.symlink(tmp_path / "outside.safetensors", directory / "shard.safetensors")
    index_of(directory, {"x": "shard.safetensors"})
    with pytest.raises(ValueError, match="outside its directory"):
        find_tensors(directory)


def test_a_snapshot_of_the_hubs_cache_links_to_its_blobs(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"x": np.arange(2, dtype=np.float32)}, blobs / "1234")
    os.symlink("../../blobs/1234", snapshot / "shard.safetensors")
    index_of(snapshot, {"x": "shard.safetensors"})
    np.testing.assert_array_equal(find_tensors(snapshot)["x"].read(), [0.0, 1.0])


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        pytest.param({"x": "gone.safetensors"}, "'gone.safetensors': .* no such file", id="absent"),
        pytest.param({"x": "a.safetensors", "y": "a.safetensors"}, "about: y", id="not-in-file"),
        pytest.param([], "must be a JSON object", id="no-map"),
        pytest.param({"x": 3}, "must be a JSON object", id="not-a-name"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path, weight_map, match):
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "a.safetensors")
    index_of(tmp_path, weight_map)
    with pytest.raises(ValueError, match=match):
        find_tensors(tmp_path)


def test_a_tensor_that_the_index_does_not_list_is_refused(tmp_path):
    save_file({"x": np.zeros(2, np.float32), "z": np.zeros(2)}, tmp_path / "a.safetensors")
    index_of(tmp_path, {"x": "a.safetensors"})
    with pytest.raises(ValueError, match=r"disagree about: z \(a.safetensors\)"):
        find_tensors(tmp_path)


def test_one_file_goes_before_an_index(tmp_path):
    """As in transformers: what an earlier and larger save left behind is not read."""
    sharded(tmp_path, "bert", TASK)
    save_file({"one.weight": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    assert list(find_tensors(tmp_path)) == ["one.weight"]


def test_pickle_files_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_json("bert", TASK)))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(ValueError, match=r"pytorch_model.bin only.*pickle.*save_pretrained"):
        from_pretrained(tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    file = checkpoint(tmp_path, "bert", TASK) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        pytest.param(None, "has no config.json", id="absent"),
        pytest.param("{", "is not JSON", id="malformed"),
        pytest.param("[]", "one JSON object", id="list"),
        pytest.param("[" * 100_000, "is not JSON", id="deep"),
        pytest.param('{"model_type": ["bert"]}', "`model_type` must be a name", id="type"),
        pytest.param('{"architectures": 5}', "must be a list of names", id="architectures"),
        pytest.param('{"architectures": "BertModel"}', "must be a list of names", id="one-name"),
    ],
)
def test_a_config_that_is_none_is_refused(tmp_path, config, match):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=match):
        from_pretrained(tmp_path)


def test_all_that_does_not_fit_is_listed_at_once(tmp_path):
    stored = tensors("bert", TASK)
    del stored["bert.encoder.layer.1.attention.self.query.weight"]
    stored["bert.encoder.layer.2.output.dense.bias"] = np.zeros(32, np.float32)
    stored["bert.encoder.layer.0.intermediate.dense.weight"] = np.zeros((32, 37), np.float32)
    stored["bert.embeddings.LayerNorm.bias"] = np.zeros(32, np.int32)
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        from_pretrained(write(tmp_path, config_json("bert", TASK), stored))
    for line in (
        "missing: bert.encoder.layer.1.attention.self.query.weight (for encoder/layers/1/",
        "left over: bert.encoder.layer.2.output.dense.bias (32,)",
        "shape: bert.encoder.layer.0.intermediate.dense.weight is (32, 37), the model has (37, 32)",
        "dtype: bert.embeddings.LayerNorm.bias is I32",
    ):
        assert line in str(caught.value)


def test_known_buffers_and_old_names_are_read(tmp_path):
    stored = tensors("bert", None)
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, ancient in old.items():
        for name in [name for name in stored if name.endswith(new)]:
            stored[name.replace(new, ancient)] = stored.pop(name)
    stored["embeddings.position_ids"] = np.arange(24)[None]
    model = from_pretrained(
        write(tmp_path, config_json("bert", None), stored), "feature-extraction"
    )
    np.testing.assert_array_equal(
        model.params["embeddings"]["norm"]["scale"], stored["embeddings.LayerNorm.gamma"]
    )


def test_a_weight_in_both_spellings_is_refused(tmp_path):
    stored = tensors("bert", TASK)
    stored["bert.embeddings.LayerNorm.gamma"] = stored["bert.embeddings.LayerNorm.weight"] + 1
    with pytest.raises(ValueError, match=r"one weight twice: .*LayerNorm.gamma"):
        from_pretrained(write(tmp_path, config_json("bert", TASK), stored))


@pytest.mark.parametrize("differs", [False, True], ids=["equal", "different"])
def test_a_tied_copy_must_be_equal(tmp_path, differs):
    stored = tensors("roberta", "masked-lm")
    words = stored["roberta.embeddings.word_embeddings.weight"]
    stored["lm_head.decoder.weight"] = words + 1 if differs else words.copy()
    directory = write(tmp_path, config_json("roberta", "masked-lm"), stored)
    if differs:
        with pytest.raises(ValueError, match=r"tied: lm_head.decoder.weight differs"):
            from_pretrained(directory, "masked-lm")
    else:
        assert from_pretrained(directory, "masked-lm").new == ()


@pytest.mark.parametrize(
    "source",
    [
        pytest.param("./nothing", id="dot"),
        pytest.param("/no/such/place", id="absolute"),
        pytest.param("~/no-such-place", id="home"),
        pytest.param("a/b/c", id="two-separators"),
        pytest.param("runs/", id="trailing-separator"),
        pytest.param("C:\\models", id="windows"),
        pytest.param("has space", id="not-an-id"),
        pytest.param("here/model", id="first-segment-is-a-directory"),
        pytest.param("file.txt", id="a-file"),
    ],
)
def test_what_looks_like_a_path_is_never_fetched(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file.txt").write_text("")
    assert looks_like_path(source)
    with pytest.raises(ValueError, match=r"name the directory that holds config.json"):
        find_checkpoint(source)


def test_a_path_object_is_never_fetched(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        find_checkpoint(tmp_path / "nothing")


def test_a_hub_id_that_is_not_cached_says_so_offline(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="No directory 'nobody/no-such-model' here"):
        find_checkpoint("nobody/no-such-model")


@pytest.mark.parametrize("there", ["a-file", "empty", "nothing"])
def test_writing_through_a_symlink_keeps_it(tmp_path, there):
    table = NameTable(expand([Row("x/kernel", "x.weight", "linear")], 0, stacked=False), prefix="p")
    weights = {"x/kernel": np.ones((2, 3), np.float32)}
    if there != "nothing":
        (tmp_path / "real").mkdir()
    if there == "a-file":
        (tmp_path / "real" / "old.txt").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_checkpoint(tmp_path / "link", table, weights, {}, source=None, overwrite=True)
    assert (tmp_path / "link").readlink() == tmp_path / "real"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]
    written = ["config.json", "model.safetensors"]
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == written


@pytest.mark.parametrize("mode", [0o755, 0o700])
def test_a_file_may_be_read_by_whoever_may_read_its_directory(tmp_path, mode):
    tmp_path.chmod(mode)
    write_tensors(tmp_path / "a.safetensors", {"a": np.ones(3)})
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == mode & 0o666


def test_writing_refuses_other_weights_and_a_full_directory(tmp_path):
    table = NameTable(expand([Row("x/kernel", "x.weight", "linear")], 0, stacked=False), prefix="p")
    with pytest.raises(ValueError, match="not those of the model: x/kernel, y/kernel"):
        write_checkpoint(tmp_path / "new", table, {"y/kernel": np.zeros(2)}, {}, source=None)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "precious").write_text("")
    weights = {"x/kernel": np.ones((2, 3), np.float32)}
    with pytest.raises(ValueError, match="holds files already"):
        write_checkpoint(tmp_path / "old", table, weights, {}, source=None)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["old", "precious"]
    write_checkpoint(tmp_path / "old", table, weights, {}, source=None, overwrite=True)
    assert find_tensors(tmp_path / "old")["x.weight"].shape == (3, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]
