"""from_pretrained: which head comes from where, what is held, and the way back to a file."""

import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax._paths import flatten
from lora_jax.models import NewHeadWarning, from_pretrained, save_pretrained
from tests.references.checkpoints import (
    FAMILIES,
    HEADS,
    checkpoint,
    config_json,
    outputs,
    tensors,
    write,
)

TASK = "sequence-classification"


def assert_trees_equal(one, two):
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_head_in_the_checkpoint_is_used_and_not_announced(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = from_pretrained(checkpoint(tmp_path, "bert", TASK))
    assert (model.new, model.config.num_labels) == ((), 3)


@pytest.mark.parametrize(
    ("family", "task", "expected"),
    [
        pytest.param("bert", TASK, ("classifier/kernel", "classifier/bias"), id="bert"),
        pytest.param(
            "roberta",
            TASK,
            tuple(f"classifier/{d}/{w}" for d in ("dense", "out_proj") for w in ("kernel", "bias")),
            id="roberta",
        ),
        pytest.param(
            "bert",
            "masked-lm",
            tuple(f"lm_head/{w}" for w in ("dense/kernel", "dense/bias"))
            + tuple(f"lm_head/{w}" for w in ("norm/scale", "norm/bias", "bias")),
            id="masked-lm",
        ),
        pytest.param("bert", "feature-extraction", (), id="no-head"),
    ],
)
def test_a_new_head_is_announced_and_listed(tmp_path, family, task, expected):
    directory = checkpoint(tmp_path, family, None)
    if not expected:
        assert from_pretrained(directory, task).new == ()
        return
    with pytest.warns(NewHeadWarning, match=f"no head for '{task}': {expected[0]}") as caught:
        model = from_pretrained(directory, task)
    assert model.new == expected
    assert caught[0].filename == __file__


def test_a_new_head_is_drawn_from_the_key_and_the_path(tmp_path):
    directory = checkpoint(tmp_path, "roberta", None)
    default, same, other = (
        from_pretrained(directory, new_head=True, key=key).params["classifier"]
        for key in (None, jax.random.key(0), jax.random.key(1))
    )
    assert_trees_equal(default, same)
    dense, again = default["dense"]["kernel"], other["dense"]["kernel"]
    assert not np.allclose(dense, again)
    assert not np.allclose(dense[:, :2], default["out_proj"]["kernel"])
    assert abs(float(np.std(dense)) - 0.2) < 0.02
    assert not default["dense"]["bias"].any()


def test_a_pooler_is_drawn_where_the_checkpoint_has_none(tmp_path):
    stored = {k: v for k, v in tensors("bert", None).items() if "pooler" not in k}
    model = from_pretrained(write(tmp_path, config_json("bert", None), stored), new_head=True)
    assert model.new == ("pooler/kernel", "pooler/bias", "classifier/kernel", "classifier/bias")


def test_new_head_false_demands_a_trained_one(tmp_path):
    with pytest.raises(ValueError, match=r"missing: classifier.weight \(for classifier/kernel\)"):
        from_pretrained(checkpoint(tmp_path, "bert", None), new_head=False)


def test_new_head_true_leaves_the_checkpoints_head(tmp_path):
    directory = checkpoint(tmp_path, "bert", TASK)
    with pytest.raises(ValueError, match=r"(?s)classifier.weight is \(3, 32\).*new_head=True"):
        from_pretrained(directory, num_labels=5)
    model = from_pretrained(directory, num_labels=5, new_head=True)
    assert model.new == ("classifier/kernel", "classifier/bias")
    np.testing.assert_array_equal(
        model.params["pooler"]["bias"], tensors("bert", TASK)["bert.pooler.dense.bias"]
    )


def test_another_tasks_head_of_the_same_name_is_not_taken(tmp_path):
    directory = checkpoint(tmp_path, "bert", "token-classification")
    with pytest.warns(NewHeadWarning, match="BertForTokenClassification"):
        assert from_pretrained(directory).new == ("classifier/kernel", "classifier/bias")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", HEADS)
def test_every_checkpoint_serves_every_task(tmp_path, family, stored):
    directory = checkpoint(tmp_path, family, stored)
    for task in (*HEADS, "feature-extraction"):
        model = from_pretrained(directory, task, new_head=None if task == stored else True)
        assert bool(model.new) == (task not in (stored, "feature-extraction"))


def test_half_a_head_is_an_error(tmp_path):
    stored = tensors("bert", TASK)
    del stored["classifier.bias"]
    with pytest.raises(ValueError, match=r"missing: classifier.bias"):
        from_pretrained(write(tmp_path, config_json("bert", TASK), stored))


def test_a_stranger_is_left_over_even_with_a_new_head(tmp_path):
    stored = tensors("bert", TASK) | {"spam.weight": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"left over: spam.weight"):
        from_pretrained(write(tmp_path, config_json("bert", TASK), stored), new_head=True)


def test_an_unknown_task_lists_the_known(tmp_path):
    with pytest.raises(ValueError, match=r"'summarise' is unknown to .*; known: sequence-"):
        from_pretrained(checkpoint(tmp_path, "bert", None), "summarise")


def test_scanned_weights_are_the_unrolled_ones_stacked(tmp_path):
    directory = checkpoint(tmp_path, "bert", TASK)
    unrolled, scanned = (
        flatten(from_pretrained(directory, scan_layers=scan).params)[0] for scan in (False, True)
    )
    for path, weight in scanned.items():
        if "/layers/" not in path:
            np.testing.assert_array_equal(weight, unrolled[path])
            continue
        for layer in range(2):
            one = unrolled[path.replace("/layers/", f"/layers/{layer}/")]
            np.testing.assert_array_equal(weight[layer], one)


@pytest.mark.parametrize("with_weights", [True, False], ids=["with-weights", "config-alone"])
@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_abstract_gives_the_same_shapes_and_reads_no_weight(tmp_path, with_weights, scan_layers):
    directory = checkpoint(tmp_path, "roberta", TASK)
    options = {"scan_layers": scan_layers, "dtype": jnp.bfloat16}
    whole = from_pretrained(directory, **options)
    if not with_weights:
        (directory / "model.safetensors").unlink()
    model = from_pretrained(directory, abstract=True, **options)
    assert jax.eval_shape(lambda: whole.params) == model.params
    logits = jax.eval_shape(model.apply, model.params, jnp.zeros((2, 5), jnp.int32))
    assert (logits.shape, logits.dtype) == ((2, 3), jnp.float32)


def test_abstract_checks_names_too(tmp_path):
    stored = tensors("bert", TASK) | {"spam.weight": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"left over: spam.weight"):
        from_pretrained(write(tmp_path, config_json("bert", TASK), stored), abstract=True)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("task", [*HEADS, "feature-extraction"])
def test_saving_and_loading_is_the_identity(tmp_path, family, task, scan_layers):
    directory = checkpoint(tmp_path / "one", family, task if task in HEADS else None)
    (directory / "vocab.txt").write_text("[PAD]\n")
    model = from_pretrained(directory, task, scan_layers=scan_layers)
    save_pretrained(tmp_path / "two", model, model.params)
    again = from_pretrained(tmp_path / "two", task, scan_layers=scan_layers)
    assert_trees_equal(model.params, again.params)
    assert again.config == model.config
    assert again.new == ()
    assert (tmp_path / "two" / "vocab.txt").read_text() == "[PAD]\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_saving_keeps_bfloat16_and_a_new_width(tmp_path):
    directory = checkpoint(tmp_path / "one", "bert", None)
    model = from_pretrained(directory, num_labels=7, new_head=True, dtype=jnp.bfloat16)
    save_pretrained(tmp_path / "two", model, model.params)
    again = from_pretrained(tmp_path / "two", dtype=jnp.bfloat16, new_head=False)
    assert again.config.num_labels == 7
    assert again.config_json["dtype"] == "bfloat16"
    assert len(again.config_json["label2id"]) == 7
    assert_trees_equal(model.params, again.params)


def test_models_import_and_load_without_the_train_extra(tmp_path):
    directory = checkpoint(tmp_path, "bert", TASK)
    barred = ("torch", "transformers", "huggingface_hub", "tokenizers", "datasets")
    script = f"""
import sys
for name in {barred}:
    sys.modules[name] = None
from lora_jax.models import from_pretrained
print(from_pretrained({str(directory)!r}).config.model_type)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "bert\n"), done.stderr


def test_jit_over_eight_devices_equals_one(tmp_path):
    model = from_pretrained(checkpoint(tmp_path, "bert", TASK))
    ids = np.resize(outputs("bert")["input_ids"], (8, 12))
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(model.params, everywhere)
    spread = jax.jit(model.apply)(params, jax.device_put(ids, rows))
    assert len(spread.sharding.device_set) == 8
    np.testing.assert_allclose(spread, model.apply(model.params, ids), rtol=0, atol=1e-6)
