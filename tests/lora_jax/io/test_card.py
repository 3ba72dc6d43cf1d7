"""The card: what the hub reads at its head, its facts, and code that a test runs."""

import json
import re

import jax
import numpy as np
import pytest
import yaml

from lora_jax import merge, save_adapter
from lora_jax.io.peft._card import Facts, read_facts
from lora_jax.models import from_pretrained
from tests.lora_jax.io import test_peft_decoders as decoders
from tests.lora_jax.io.test_peft import TASK, lora, trained
from tests.references.checkpoints import checkpoint, hub_cache


def front_matter(card):
    return yaml.safe_load(card.split("---\n")[1])


def code(card, owner):
    """The block of Python under a line that names its library."""
    return re.search(rf"With {owner}:\n\n```python\n(.*?)```", card, re.DOTALL)[1]


@pytest.fixture
def model(tmp_path):
    return from_pretrained(checkpoint(tmp_path / "base", "bert", TASK))


@pytest.fixture
def save(tmp_path, model):
    """Saves an adapter; gives its directory and its card."""

    def saved(**options):
        _, trainable = trained(model, lora())
        directory = save_adapter(tmp_path / "adapter", trainable, lora(), model, **options)
        return directory, (directory / "README.md").read_text()

    return saved


def test_the_head_names_the_base_by_its_hub_id(save):
    _, card = save(base_model="google-bert/bert-base-uncased")
    assert front_matter(card) == {
        "base_model": "google-bert/bert-base-uncased",
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["lora", "lora_jax", "transformers"],
    }
    assert 'BASE = "google-bert/bert-base-uncased"' in code(card, "PEFT")


def test_a_base_in_a_directory_is_not_named(save, tmp_path):
    directory, card = save()
    assert "base_model" not in front_matter(card)
    fields = json.loads((directory / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] is None
    assert str(tmp_path) not in card


def test_the_facts_are_there(save):
    _, card = save(
        evaluation={"accuracy": 0.875, "BLEU-4": 66, "loss": float("inf")}, data_hash="sha256:12ab"
    )
    assert "| accuracy | 0.875 |\n| BLEU-4 | 66 |\n| loss | inf |" in card
    assert "Data: `sha256:12ab`" in card
    assert re.search(r"Versions: lora_jax [\d(].*, jax \d.*, flax \d", card)
    config = json.loads(re.search(r"```json\n(.*?)```", card, re.DOTALL)[1])
    assert config["rank"] == 4
    assert config["targets"] == ["attention/(query|value)"]


@pytest.mark.parametrize(
    "facts",
    [
        Facts({}, None),
        Facts({"accuracy": 1 / 3, 'Größe 📏: "x"': -2.0, "loss": float("inf")}, "sha256:12ab"),
        Facts({}, "12ab"),
        Facts({"accuracy": 1.0}, None),
        Facts({}, None, "nf4"),
    ],
    ids=["none", "both", "data", "evaluation", "quantised"],
)
def test_the_facts_are_read_back_exactly(save, facts):
    directory, card = save(**facts._asdict())
    assert read_facts(directory) == facts
    assert ("lora_jax" in front_matter(card)) == any(facts)
    if facts.data_hash:
        assert front_matter(card)["lora_jax"]["data_hash"] == facts.data_hash
        assert front_matter(card)["lora_jax"]["evaluation"].keys() == facts.evaluation.keys()


@pytest.mark.parametrize(
    "card",
    [
        None,
        "",
        "# lora_jax\n",
        "---\nbase_model: a/b\n---\n",
        '---\ntags: []\n---\nlora_jax: {"evaluation": {}, "data_hash": "no head"}\n',
    ],
    ids=["no-card", "empty", "no-head", "no-line", "below-the-head"],
)
def test_a_card_of_others_has_no_facts(tmp_path, card):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert read_facts(tmp_path) == Facts({}, None)


def test_facts_that_do_not_name_a_scheme_are_of_a_plain_base(tmp_path):
    line = '{"evaluation": {"accuracy": 0.5}, "data_hash": "12ab"}'
    (tmp_path / "README.md").write_text(f"---\nlora_jax: {line}\n---\n")
    assert read_facts(tmp_path) == Facts({"accuracy": 0.5}, "12ab", None)


@pytest.mark.parametrize(
    "line",
    [
        "5",
        "{",
        "[" * 100_000,
        '{"evaluation": {}}',
        '{"evaluation": [], "data_hash": null}',
        '{"evaluation": {"accuracy": "high"}, "data_hash": null}',
        '{"evaluation": {}, "data_hash": 5}',
        '{"evaluation": {}, "data_hash": null, "quantize": 4}',
        '{"evaluation": {}, "data_hash": null, "more": 1}',
        '{"evaluation": {}, "data_hash": null}\nlora_jax: {}',
    ],
    ids=["number", "cut", "deep", "half", "list", "words", "hash", "scheme", "more", "twice"],
)
def test_malformed_facts_are_refused(tmp_path, line):
    (tmp_path / "README.md").write_text(f"---\nlora_jax: {line}\n---\n")
    with pytest.raises(ValueError, match=r"facts at the head of .*README.md are malformed"):
        read_facts(tmp_path)


def test_a_base_on_the_hub_is_named_with_its_revision(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    cache = hub_cache(tmp_path / "hub", checkpoint(tmp_path / "b", "bert", TASK), "me/tiny", "v1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    model = from_pretrained("me/tiny", revision="v1")
    assert (model.hub_id, model.revision) == ("me/tiny", "v1")
    frozen, trainable = trained(model, lora())
    directory = save_adapter(tmp_path / "adapter", trainable, lora(), model)
    fields = json.loads((directory / "adapter_config.json").read_text())
    assert (fields["base_model_name_or_path"], fields["revision"]) == ("me/tiny", "v1")
    card = (directory / "README.md").read_text()
    assert 'from_pretrained(BASE, revision="v1"' in code(card, "PEFT")
    scope = {}
    exec(code(card, "lora_jax").replace('"ADAPTER"', repr(str(directory))), scope)
    jax.tree.map(np.testing.assert_array_equal, scope["params"], merge(frozen, trainable))
    other = save_adapter(tmp_path / "other", trainable, lora(), model, base_model="you/tiny")
    assert json.loads((other / "adapter_config.json").read_text())["revision"] is None


def test_a_revision_is_of_a_base_on_the_hub(save, tmp_path):
    with pytest.raises(ValueError, match="`revision` 'v1' is of no base"):
        save(revision="v1")
    _, card = save(base_model="google-bert/bert-base-uncased", revision="v1")
    assert code(card, "PEFT").count('revision="v1"') == 1
    assert from_pretrained(tmp_path / "base", revision="v1").revision is None


def test_our_code_runs(save, model, tmp_path):
    directory, card = save()
    block = code(card, "lora_jax")
    assert block.count('"BASE"') == block.count('"ADAPTER"') == 1
    block = block.replace('"BASE"', repr(str(tmp_path / "base")))
    scope = {}
    exec(block.replace('"ADAPTER"', repr(str(directory))), scope)
    frozen, trainable = trained(model, lora())
    jax.tree.map(np.testing.assert_array_equal, scope["params"], merge(frozen, trainable))


def test_our_code_runs_where_the_base_has_no_head(tmp_path):
    base = checkpoint(tmp_path / "base", "bert", None)
    model = from_pretrained(base, new_head=True, num_labels=5)
    frozen, trainable = trained(model, lora())
    directory = save_adapter(tmp_path / "adapter", trainable, lora(), model)
    block = code((directory / "README.md").read_text(), "lora_jax")
    block = block.replace('"BASE"', repr(str(base))).replace('"ADAPTER"', repr(str(directory)))
    scope = {}
    exec(block, scope)
    jax.tree.map(np.testing.assert_array_equal, scope["params"], merge(frozen, trainable))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"evaluation": {"a | b": 1.0}}, "must give names numbers"),
        ({"evaluation": {"accuracy": True}}, "must give names numbers"),
        ({"evaluation": {3: 1.0}}, "must give names numbers"),
        ({"evaluation": {"accuracy": "high"}}, "must give names numbers"),
        ({"data_hash": "a\n# b"}, "`data_hash` must be one line"),
        ({"quantize": "a\n# b"}, "`quantize` must be the name of a scheme"),
    ],
)
def test_facts_that_are_none_are_refused(save, options, match):
    with pytest.raises(ValueError, match=match):
        save(**options)


@pytest.mark.parametrize(
    ("family", "config", "note"),
    [
        ("llama-tied", {"targets": ("embed_tokens",)}, "merge_and_unload. adds the update.*twice"),
        ("gpt2", {"targets": ("qkv",), "parts": {"qkv": (True, False, True)}}, "adapted in part"),
    ],
)
def test_what_a_user_of_the_file_must_know_is_there(tmp_path, family, config, note):
    config = decoders.lora(**config)
    model = decoders.model_of(family)
    directory = save_adapter(tmp_path / "a", decoders.trained(model, config)[1], config, model)
    card = (directory / "README.md").read_text()
    assert re.search(note, card, re.DOTALL)
    assert "AutoModelForCausalLM" in code(card, "PEFT")
    assert front_matter(card)["pipeline_tag"] == "text-generation"


def test_the_precision_of_the_base_is_said(tmp_path):
    base = checkpoint(tmp_path / "base", "bert", TASK)
    model = from_pretrained(base, quantize="int8")
    _, trainable = trained(model, lora())
    directory = save_adapter(tmp_path / "adapter", trainable, lora(), model)
    card = (directory / "README.md").read_text()
    assert "trained on the base quantised to int8" in card
    assert front_matter(card)["lora_jax"]["quantize"] == "int8"
    plain = save_adapter(tmp_path / "plain", trainable, lora(), from_pretrained(base))
    assert "quantised" not in (plain / "README.md").read_text()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (directory / name).read_bytes() == (plain / name).read_bytes()
