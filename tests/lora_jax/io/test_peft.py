"""Adapters survive the way to PEFT's files and back; what cannot go there is refused by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax._config import LoraConfig
from lora_jax._merge import merge
from lora_jax._partition import split
from lora_jax.io import load_adapter, save_adapter
from lora_jax.models import from_pretrained
from tests.references.checkpoints import HEADS, HERE, checkpoint, outputs

TASK = "sequence-classification"
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"
STACKED = {"layouts": {"encoder/layers/.*/kernel": "stack in out"}}


def lora(**changes) -> LoraConfig:
    fields = {
        "rank": 4,
        "alpha": 10.0,
        "targets": ("attention/(query|value)",),
        "train": ("classifier/.*",),
        "dropout": 0.1,
    }
    return LoraConfig(**(fields | changes))


def trained(model, config):
    """A split with every array moved, as if trained."""
    frozen, trainable = split(model.params, config, jax.random.key(0))
    draw = np.random.default_rng(1).standard_normal
    move = lambda x: jnp.asarray(np.asarray(x) + 0.1 * draw(x.shape, np.float32))  # noqa: E731
    return frozen, jax.tree.map(move, trainable)


@pytest.fixture
def model(tmp_path):
    return from_pretrained(checkpoint(tmp_path / "base", "bert", TASK))


@pytest.fixture
def adapter(tmp_path, model):
    """A saved adapter of `model`."""
    _, trainable = trained(model, lora())
    return save_adapter(tmp_path / "adapter", trainable, lora(), model)


def edit(directory, *, config=None, tensors=None):
    """Changes an adapter's files: fields to set, and a function over the tensors."""
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    if tensors:
        stored = load_file(directory / "adapter_model.safetensors")
        save_file(tensors(stored), directory / "adapter_model.safetensors")


PATTERNS = {
    "rank_pattern": {"layers/0/attention/query": 2},
    "alpha_pattern": {"layers/1/attention/value": 3.0},
}


@pytest.mark.parametrize(
    ("family", "task", "scan_layers", "config"),
    [
        pytest.param("bert", TASK, False, {}, id="bert"),
        pytest.param("roberta", TASK, False, {}, id="roberta"),
        pytest.param("bert", TASK, True, STACKED, id="bert-scanned"),
        pytest.param("roberta", TASK, True, STACKED, id="roberta-scanned"),
        pytest.param("bert", TASK, False, PATTERNS, id="patterns"),
        pytest.param("bert", TASK, False, {"rank": 3, "use_rslora": True}, id="rslora"),
        pytest.param("bert", TASK, False, PATTERNS | {"use_rslora": True}, id="rslora-patterns"),
        pytest.param("bert", TASK, False, {"targets": ("mlp/(up|down)",)}, id="mlp"),
        pytest.param("bert", TASK, False, {"targets": ("layers/1/.*/query",)}, id="one-layer"),
        pytest.param("bert", TASK, False, {"train": ("pooler/.*", "classifier/.*")}, id="pooler"),
        pytest.param("roberta", TASK, False, {"train": ("classifier/.*", "norm/.*")}, id="norms"),
        pytest.param("bert", TASK, True, STACKED | {"train": ("mlp/norm/.*",)}, id="scanned-norms"),
        pytest.param("bert", "token-classification", False, {}, id="token-classification"),
        pytest.param(
            "bert", "question-answering", False, {"train": ("qa_outputs/.*",)}, id="answers"
        ),
        pytest.param("bert", TASK, False, {"targets": ("word_embeddings",)}, id="embedding"),
        pytest.param(
            "bert", TASK, False, {"train": ("(query|value)/bias", "classifier/.*")}, id="lora-only"
        ),
        pytest.param(
            "bert", TASK, True, STACKED | {"train": ("bias", "classifier/.*")}, id="bias-all"
        ),
        pytest.param("bert", TASK, False, {"train": ("bias",)}, id="bias-all-and-no-head"),
        pytest.param("bert", "masked-lm", False, {"train": ()}, id="masked-lm"),
        pytest.param("bert", "masked-lm", False, {"train": ("bias",)}, id="bias-all-tied"),
        pytest.param("bert", "masked-lm", False, {"train": ("lm_head/.*",)}, id="tied-head"),
        pytest.param(
            "roberta", "masked-lm", False, {"train": ("word_embeddings",)}, id="tied-in-full"
        ),
        pytest.param(
            "bert", "masked-lm", False, {"targets": ("word_embeddings",), "train": ()}, id="tied"
        ),
        pytest.param(
            "bert", "masked-lm", False, {"targets": ("lm_head/dense",), "train": ()}, id="in-head"
        ),
        pytest.param("bert", "feature-extraction", False, {"train": ()}, id="features"),
    ],
)
def test_saving_and_loading_is_the_identity(tmp_path, family, task, scan_layers, config):
    directory = checkpoint(tmp_path / "base", family, task if task in HEADS else None)
    model = from_pretrained(directory, task, scan_layers=scan_layers)
    frozen, trainable = trained(model, lora(**config))
    save_adapter(tmp_path / "adapter", trainable, lora(**config), model)
    again_frozen, again, again_config = load_adapter(tmp_path / "adapter", model)
    assert jax.tree.structure(again) == jax.tree.structure(trainable)  # scales are in it
    jax.tree.map(np.testing.assert_array_equal, again, trainable)
    assert jax.tree.structure(again_frozen) == jax.tree.structure(frozen)
    anew = split(model.params, again_config, jax.random.key(0))[1]
    assert jax.tree.structure(anew) == jax.tree.structure(trainable)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("name", ["peft", "peft-rslora-patterns"])
def test_an_adapter_of_pefts_gives_pefts_logits(tmp_path, family, name, scan_layers):
    directory = checkpoint(tmp_path, family, TASK)
    model = from_pretrained(directory, TASK, scan_layers=scan_layers)
    adapter = HERE / family / name
    if scan_layers and name != "peft":
        with pytest.raises(ValueError, match=r"its layers differ.*scan_layers=False"):
            load_adapter(adapter, model)
        return
    frozen, trainable, _ = load_adapter(adapter, model)
    expected = outputs(family)
    inputs = (expected[n] for n in ("input_ids", "attention_mask", "token_type_ids"))
    logits = jax.jit(model.apply)(merge(frozen, trainable), *inputs)
    np.testing.assert_allclose(logits, expected[name], rtol=0, atol=1e-5)
    assert not np.allclose(expected[name], expected[TASK], atol=1e-2)


def test_what_is_written_leaves_nothing_to_a_default(adapter):
    fields = json.loads((adapter / "adapter_config.json").read_text())
    assert fields == {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": None,
        "revision": None,
        "r": 4,
        "lora_alpha": 10,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "lora_dropout": 0.1,
        "target_modules": ["query", "value"],
        "modules_to_save": ["classifier"],
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    stored = load_file(adapter / "adapter_model.safetensors")
    assert stored[f"{QUERY}.lora_A.weight"].shape == (4, 32)
    assert stored[f"{QUERY}.lora_B.weight"].shape == (32, 4)
    assert stored["base_model.model.classifier.weight"].shape == (3, 32)
    assert len(stored) == 2 * 2 * 2 + 2


@pytest.mark.parametrize(
    ("task", "config", "match"),
    [
        pytest.param(
            TASK,
            {"layouts": {"layers/0/attention/query/kernel": "out in"}},
            r"layers/0/attention/query/kernel: only kernels and embeddings, laid out .'in', 'out'",
            id="layout",
        ),
        pytest.param(
            TASK,
            {"targets": ("query",), "train": ("layers/0/.*/query/bias", "classifier/.*")},
            r"PEFT trains the biases of all adapted modules .also train .*layers/1/.*query/bias",
            id="some-biases",
        ),
        pytest.param(
            TASK,
            {"targets": ("query",), "train": ("(query|key)/bias", "classifier/.*")},
            r"leave out .*layers/0/attention/key/bias.*or all biases .also train .*pooler/bias",
            id="too-many-biases",
        ),
        pytest.param(
            TASK,
            {"train": ("classifier/kernel",)},
            "also train .'classifier/bias'",
            id="half-a-head",
        ),
        pytest.param(
            TASK,
            {"targets": ("classifier/kernel",), "train": ("pooler/.*",), "rank": 2},
            "classifier/kernel: PEFT trains a head in full",
            id="factors-in-a-head",
        ),
        pytest.param(
            "masked-lm",
            {"targets": ("word_embeddings",), "train": ("lm_head/.*",)},
            "has factors, and cls.predictions.decoder, which is tied to it, is saved in full",
            id="tied",
        ),
        pytest.param(
            TASK, {"targets": (), "train": ("classifier/.*",)}, "no weight is adapted", id="full"
        ),
    ],
)
def test_what_the_format_cannot_express_is_refused(tmp_path, task, config, match):
    model = from_pretrained(checkpoint(tmp_path / "base", "bert", task), task)
    _, trainable = trained(model, lora(**config))
    with pytest.raises(ValueError, match=match):
        save_adapter(tmp_path / "adapter", trainable, lora(**config), model)
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_that_has_diverged_is_refused(tmp_path, model):
    _, trainable = trained(model, lora())
    first = min(trainable)
    trainable[first] = jax.tree.map(lambda x: x.at[0].set(jnp.nan), trainable[first])
    with pytest.raises(ValueError, match="diverged; not finite: base_model"):
        save_adapter(tmp_path / "adapter", trainable, lora(), model)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_an_untrained_new_head_is_refused(tmp_path):
    model = from_pretrained(checkpoint(tmp_path / "base", "bert", None), new_head=True)
    _, trainable = trained(model, lora(train=()))
    with pytest.raises(ValueError, match="classifier/kernel was newly drawn and is not trained"):
        save_adapter(tmp_path / "adapter", trainable, lora(train=()), model)


def test_weights_of_another_model_are_refused(tmp_path, model):
    _, trainable = trained(model, lora())
    with pytest.raises(ValueError, match="spam/kernel is not a weight of the model"):
        save_adapter(tmp_path / "new", trainable | {"spam/kernel": jnp.ones(2)}, lora(), model)


def rename(old, new):
    return lambda stored: {name.replace(old, new): tensor for name, tensor in stored.items()}


def also(name, *shape):
    """Adds a tensor of ones."""
    return lambda stored: stored | {name: np.ones(shape, np.float32)}


def in_integers(stored):
    return {name: tensor.astype(np.int32) for name, tensor in stored.items()}


def without(name):
    return lambda stored: {key: tensor for key, tensor in stored.items() if name not in key}


@pytest.mark.parametrize(
    ("config", "tensors", "match"),
    [
        pytest.param({}, rename("base_model.model.", ""), "unmapped: bert.encoder", id="no-prefix"),
        pytest.param(
            {}, rename(".query.", ".qeury."), "unmapped: .*self.qeury.lora_A", id="unknown"
        ),
        pytest.param(
            {}, without("layer.0.attention.self.query"), f"missing: {QUERY}.lora_A", id="no-module"
        ),
        pytest.param({}, without("layer.0.attention.self.query.lora_B"), "query.lora_B", id="no-b"),
        pytest.param({}, without("classifier.bias"), "model.classifier.bias", id="half-a-head"),
        pytest.param({}, without("classifier"), "model.classifier.weight", id="no-head"),
        pytest.param(
            {"r": 8}, None, r"is \(4, 32\), the model and config say \(8, 32\)", id="rank"
        ),
        pytest.param({"r": None}, None, "`r` is missing", id="no-r"),
        pytest.param({"lora_alpha": None}, None, "`lora_alpha` is missing", id="no-alpha"),
        pytest.param({"peft_type": "IA3"}, None, "`peft_type` is 'IA3'", id="other-kind"),
        pytest.param({"bias": "all"}, None, "missing: .*pooler.dense.bias", id="bias-all"),
        pytest.param(
            {"bias": "lora_only"}, None, f"missing: {QUERY}.base_layer.bias", id="bias-lora-only"
        ),
        pytest.param({"use_dora": True}, None, "`use_dora` is True.*DoRA", id="dora"),
        pytest.param(
            {"fan_in_fan_out": True}, None, "`fan_in_fan_out` is True.*Conv1D", id="fan-in-fan-out"
        ),
        pytest.param({}, also(f"{QUERY}.lora_magnitude_vector", 32), "magnitude", id="magnitude"),
        pytest.param(
            {}, also(f"{QUERY}.lora_embedding_A", 4, 32), "unmapped: .*embedding_A", id="no-table"
        ),
        pytest.param(
            {},
            also(QUERY[:-5] + "spam.lora_A.weight", 4, 32, 3, 5),
            r"spam.*\(4, 32, 3, 5\)",
            id="conv",
        ),
        pytest.param(
            {}, also(f"{QUERY}.base_layer.weight", 32, 32), "is not the model's", id="other-base"
        ),
        pytest.param(
            {}, also(f"{QUERY}.base_layer.weight", 9), "is not the model's", id="base-of-a-shape"
        ),
        pytest.param({}, also(f"{QUERY}.weight", 32, 32), "twice: .*query/kernel", id="full-too"),
        pytest.param(
            {},
            also("base_model.model.classifier.modules_to_save.bias", 3),
            "twice: .*modules_to_save.bias is not what the file has",
            id="another-copy",
        ),
        pytest.param(
            {},
            also(f"{QUERY}.lora_A.weight".replace("bert.", ""), 4, 32),
            "twice: .*are one factor",
            id="two-spellings",
        ),
        pytest.param({}, in_integers, "dtype: .* is I32", id="integers"),
        pytest.param(
            {"rank_pattern": {"0.attention.self.query": 33}},
            None,
            "factors of rank 33",
            id="too-high",
        ),
        pytest.param({"init_lora_weights": "pissa"}, None, "changed the base weights", id="pissa"),
        pytest.param({"hologram": 3}, None, "`hologram` is 3", id="unknown-field"),
        pytest.param({"rank_pattern": [2]}, None, r"`rank_pattern` is \[2\]", id="type"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(adapter, model, config, tensors, match):
    edit(adapter, config=config, tensors=tensors)
    with pytest.raises(ValueError, match=match):
        load_adapter(adapter, model)


def test_a_neutral_unknown_field_changes_nothing(adapter, model):
    before = load_adapter(adapter, model)[1]
    edit(adapter, config={"hologram": None, "lasers": [], "use_dora": False})
    jax.tree.map(np.testing.assert_array_equal, load_adapter(adapter, model)[1], before)


def test_scanned_layers_need_an_adapter_on_each(tmp_path):
    directory = checkpoint(tmp_path / "base", "bert", TASK)
    unrolled = from_pretrained(directory)
    config = lora(targets=("layers/1/attention/query",))
    _, trainable = trained(unrolled, config)
    adapter = save_adapter(tmp_path / "adapter", trainable, config, unrolled)
    scanned = from_pretrained(directory, scan_layers=True)
    with pytest.raises(ValueError, match=r"only layers \[1\] are adapted: load.*scan_layers=False"):
        load_adapter(adapter, scanned)


def test_an_unrolled_adapter_loads_into_scanned_layers(tmp_path, model, adapter):
    scanned = from_pretrained(model.directory, scan_layers=True)
    ids = outputs("bert")["input_ids"]
    one, two = (
        jax.jit(each.apply)(merge(*load_adapter(adapter, each)[:2]), ids)
        for each in (model, scanned)
    )
    np.testing.assert_allclose(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        pytest.param((), "has no adapter_config.json", id="empty"),
        pytest.param(("adapter_config.json",), "has no adapter_model.safetensors", id="no-weights"),
        pytest.param(
            ("adapter_config.json", "adapter_model.bin"), "adapter_model.bin only", id="pickle"
        ),
    ],
)
def test_a_directory_that_is_no_adapter_is_refused(tmp_path, model, files, match):
    for name in files:
        (tmp_path / name).write_text('{"r": 4, "lora_alpha": 8}')
    with pytest.raises(ValueError, match=match):
        load_adapter(tmp_path, model)


def test_bfloat16_weights_keep_float32_factors(tmp_path, adapter, model):
    half = from_pretrained(model.directory, dtype=jnp.bfloat16)
    _, trainable, _ = load_adapter(adapter, half)
    kept = load_adapter(adapter, model)[1]
    path = "encoder/layers/0/attention/query/kernel"
    np.testing.assert_array_equal(trainable[path].a, kept[path].a)
    assert trainable["classifier/kernel"].dtype == jnp.bfloat16


def test_weights_under_the_factors_are_accepted_where_they_are_the_bases(adapter, model):
    kernel = model.params["encoder"]["layers"]["0"]["attention"]["query"]["kernel"]
    base = {
        f"{QUERY}.base_layer.weight": np.ascontiguousarray(np.asarray(kernel).T),
        "base_model.model.classifier.original_module.bias": np.ones(3, np.float32),
    }
    before = load_adapter(adapter, model)[1]
    edit(adapter, tensors=lambda stored: stored | base)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(adapter, model)[1], before)


def test_an_unknown_profile_and_a_path_for_a_base_are_refused(tmp_path, model):
    _, trainable = trained(model, lora())
    with pytest.raises(ValueError, match=r"`profile` must be one of .*'vllm'.*got 'gguf'"):
        save_adapter(tmp_path / "new", trainable, lora(), model, profile="gguf")
    with pytest.raises(ValueError, match="`base_model` must be a hub id, got the path"):
        save_adapter(tmp_path / "new", trainable, lora(), model, base_model=str(tmp_path))
