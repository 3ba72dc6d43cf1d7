"""Decoders' adapters that PEFT made, against the logits that it computed; and back to files."""

import functools
import json
from shutil import copytree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from lora_jax import LoraConfig, LoraFactors, PartFactors, load_adapter, merge, save_adapter, split
from lora_jax.models import from_pretrained
from tests.references.checkpoints import HERE

PEFT = HERE / "peft"
WEIGHTS = "adapter_model.safetensors"
PARTS = {"attention/qkv": (True, False, True)}
QKV = "layers/0/attention/qkv/kernel"


@functools.cache
def model_of(family, **options):
    return from_pretrained(PEFT / family / "base", "causal-lm", **options)


def trained(model, config):
    """A split with every array moved, as if trained."""
    frozen, trainable = split(model.params, config, jax.random.key(0))
    draw = np.random.default_rng(1).standard_normal
    move = lambda x: jnp.asarray(np.asarray(x) + 0.1 * draw(x.shape, np.float32))  # noqa: E731
    return frozen, jax.tree.map(move, trainable)


def lora(**changes) -> LoraConfig:
    return LoraConfig(**({"rank": 4, "alpha": 10.0, "targets": ("query",)} | changes))


@pytest.mark.parametrize(
    ("family", "name", "scan_layers"),
    [
        ("llama", "patterns", False),
        ("llama", "embedding", True),
        ("llama", "head-in-full", False),
        ("llama-tied", "tied", False),
        ("qwen2", "bias-all", False),
        ("qwen2", "bias-lora-only", True),
        ("gpt2", "conv1d", False),
        ("gpt2", "conv1d-bias-all", True),
    ],
)
def test_an_adapter_of_pefts_gives_pefts_logits(tmp_path, family, name, scan_layers):
    model = model_of(family, scan_layers=scan_layers)
    frozen, trainable, config = load_adapter(PEFT / family / name, model)
    with np.load(PEFT / family / "logits.npz") as stored:
        ids, mask, expected = stored["input_ids"], stored["mask"], stored[name]
    kept = mask.astype(bool)
    logits = jax.jit(model.apply)(merge(frozen, trainable), ids, mask)
    largest = max(1.0, np.abs(expected[kept]).max())
    np.testing.assert_allclose(logits[kept], expected[kept], rtol=0, atol=1e-5 * largest)

    save_adapter(tmp_path / "again", trainable, config, model)
    ours, theirs = (
        load_file(tmp_path / "again" / WEIGHTS),
        load_file(PEFT / family / name / WEIGHTS),
    )
    assert ours.keys() == {key for key in theirs if "base_layer.weight" not in key}
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[key])


def test_an_adapter_of_one_use_of_a_tied_weight_is_refused():
    with pytest.raises(ValueError, match=r"only model\.embed_tokens has factors.*both uses"):
        load_adapter(PEFT / "llama-tied" / "lookup-only", model_of("llama-tied"))


def stored(**arrays):
    """Keys of an adapter of the tied model, by their short names."""
    ends = {
        "a": "model.embed_tokens.lora_embedding_A",
        "b": "model.embed_tokens.lora_embedding_B",
        "head_a": "lm_head.lora_A.weight",
        "head_b": "lm_head.lora_B.weight",
    }
    return {f"base_model.model.{ends[name]}": array for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param(
            {"head_a": None}, "missing: base_model.model.lm_head.lora_A.weight", id="half"
        ),
        pytest.param({"head_a": None, "head_b": None}, "only model.embed_tokens has", id="lookup"),
        pytest.param({"a": None, "b": None}, "only lm_head has factors", id="output"),
        pytest.param({"head_b": 2.0}, "factors of model.embed_tokens and lm_head diff", id="other"),
    ],
)
def test_factors_of_a_tied_weight_must_agree(tmp_path, change, match):
    model = model_of("llama-tied")
    config = lora(targets=("embed_tokens",))
    adapter = save_adapter(tmp_path / "adapter", trained(model, config)[1], config, model)
    tensors = load_file(adapter / WEIGHTS)
    for name, factor in change.items():
        (key,) = stored(**{name: None})
        tensors = {k: t * factor if k == key else t for k, t in tensors.items()} if factor else {
            k: t for k, t in tensors.items() if k != key
        }  # fmt: skip
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(ValueError, match=match):
        load_adapter(adapter, model)


def test_a_copy_of_a_trained_tied_weight_must_agree(tmp_path):
    model, config = model_of("llama-tied"), lora(train=("embed_tokens",))
    adapter = save_adapter(tmp_path / "adapter", trained(model, config)[1], config, model)
    tensors = load_file(adapter / WEIGHTS)
    save_file(tensors | {"base_model.model.lm_head.weight": np.ones((48, 16), np.float32)},
              adapter / WEIGHTS)  # fmt: skip
    with pytest.raises(ValueError, match=r"lm_head.weight differs from embed_tokens/embedding"):
        load_adapter(adapter, model)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"target_modules": ["c_proj"]}, id="narrower"),
        pytest.param({"target_modules": None}, id="none"),
        pytest.param({"exclude_modules": ["c_attn"]}, id="excluded"),
        pytest.param({"layers_to_transform": [1]}, id="other-layers"),
    ],
)
def test_factors_that_peft_would_drop_are_refused(tmp_path, fields):
    adapter = copytree(PEFT / "gpt2" / "conv1d", tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match=r"untargeted: transformer\.h\.0\.attn\.c_attn"):
        load_adapter(adapter, model_of("gpt2"))


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rslora"])
def test_parts_of_a_fused_kernel_are_saved_and_read_back(tmp_path, scan_layers, use_rslora):
    model = model_of("gpt2", scan_layers=scan_layers)
    layouts = {"layers/.*/kernel": "stack in out"} if scan_layers else {}
    config = lora(
        rank=3,
        targets=("qkv", "attention/out"),
        parts=PARTS,
        use_rslora=use_rslora,
        layouts=layouts,
    )
    frozen, trainable = trained(model, config)
    adapter = save_adapter(tmp_path / "adapter", trainable, config, model)
    _, again, again_config = load_adapter(adapter, model)
    jax.tree.map(np.testing.assert_array_equal, again, trainable)
    assert jax.tree.structure(again) == jax.tree.structure(trainable)  # scales and parts are in it
    anew = split(model.params, again_config, jax.random.key(0))[1]
    assert jax.tree.structure(anew) == jax.tree.structure(trainable)

    tensors = load_file(adapter / WEIGHTS)  # what another library reads
    assert tensors["base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"].shape == (6, 16)
    save_file(tensors, adapter / WEIGHTS)
    _, whole, _ = load_adapter(adapter, model)
    assert not any(isinstance(factors, PartFactors) for factors in whole.values())
    one, two = (merge(frozen, each) for each in (whole, trainable))
    # Zeros are added to sums of three products, which other orders round differently.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), one, two)


@pytest.mark.parametrize(
    ("note", "match"),
    [
        pytest.param(
            '{"transformer.h.0.attn.c_attn": [true, true, false]}', "not zero outside", id="other"
        ),
        pytest.param('{"transformer.h.0.attn.c_attn": [true]}', None, id="one-part"),
        pytest.param('{"h.9": [true, false]}', "names h.9, which has no factors", id="nobody"),
        pytest.param(
            '{"transformer.h.0.attn.c_attn": [true, true, true, true, true]}', "divide", id="five"
        ),
        pytest.param("[1]", "does not name parts", id="list"),
        pytest.param('{"h": [1, 2]}', "does not name parts", id="numbers"),
        pytest.param("[" * 100_000, "does not name parts", id="deep"),
    ],
)
def test_a_note_on_parts_is_checked(tmp_path, note, match):
    model = model_of("gpt2")
    config = lora(targets=("layers/0/attention/qkv",), parts=PARTS)
    adapter = save_adapter(tmp_path / "adapter", trained(model, config)[1], config, model)
    with safe_open(adapter / WEIGHTS, "numpy") as opened:
        assert opened.metadata().keys() == {"format", "lora_jax.parts"}
    save_file(load_file(adapter / WEIGHTS), adapter / WEIGHTS, metadata={"lora_jax.parts": note})
    if match is None:
        assert load_adapter(adapter, model)[1][QKV].b.shape == (1, 8, 48)
        return
    with pytest.raises(ValueError, match=match):
        load_adapter(adapter, model)


@pytest.mark.parametrize(
    ("family", "config", "expected"),
    [
        pytest.param(
            "gpt2",
            {"targets": ("qkv",)},
            {"fan_in_fan_out": True, "target_modules": ["c_attn"], "bias": "none"},
            id="conv1d",
        ),
        pytest.param(
            "llama-tied",
            {"targets": ("embed_tokens",)},
            {"ensure_weight_tying": True, "target_modules": ["embed_tokens", "lm_head"]},
            id="tied",
        ),
        pytest.param(
            "llama-tied",
            {"train": ("embed_tokens",)},
            {
                "ensure_weight_tying": True,
                "modules_to_save": ["lm_head", "model.embed_tokens"],
                "target_modules": ["q_proj"],
            },
            id="tied-in-full",
        ),
        pytest.param(
            "llama",
            {"train": ("norm/scale",)},
            {"modules_to_save": ["model.norm"], "task_type": "CAUSAL_LM"},
            id="norm",
        ),
        pytest.param("qwen2", {"train": ("query/bias",)}, {"bias": "lora_only"}, id="lora-only"),
        pytest.param("qwen2", {"train": ("bias",)}, {"bias": "all"}, id="all"),
        pytest.param(
            "gpt2",
            {"targets": ("qkv",), "parts": PARTS},
            {"r": 8, "lora_alpha": 20, "rank_pattern": {}, "alpha_pattern": {}},
            id="parts-have-the-scale",
        ),
    ],
)
def test_what_the_config_says(tmp_path, family, config, expected):
    model = model_of(family)
    _, trainable = split(model.params, lora(**config), jax.random.key(0))
    adapter = save_adapter(tmp_path / "adapter", trainable, lora(**config), model)
    fields = json.loads((adapter / "adapter_config.json").read_text())
    assert {name: fields[name] for name in expected} == expected


def test_half_weights_keep_float32_factors():
    model = model_of("gpt2", dtype=jnp.bfloat16)
    _, trainable, _ = load_adapter(PEFT / "gpt2" / "conv1d-bias-all", model)
    assert isinstance(trainable[QKV], LoraFactors)
    assert trainable[QKV].a.dtype == jnp.float32
    assert trainable["norm/bias"].dtype == jnp.bfloat16
