"""The profile of vLLM: one rank, one scale and no pattern, with the same merged weights."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import save_adapter, split
from lora_jax.io.peft import _modules
from tests.lora_jax.io.test_peft_decoders import WEIGHTS, lora, model_of, trained

MIXED = {
    "targets": ("query", "value", "mlp/up"),
    "rank_pattern": {"layers/0/attention/query": 2, "mlp/up": 8},
    "alpha_pattern": {"layers/1/attention/value": 3.0},
}


def updates_as_vllm_reads_them(adapter):
    """``lora_alpha / r * B @ A`` of every module, by its name."""
    fields = json.loads((adapter / "adapter_config.json").read_text())
    stored = load_file(adapter / WEIGHTS)
    scale = fields["lora_alpha"] / fields["r"]
    return {
        re.sub(r"\.lora_(embedding_)?A.*", "", key): scale
        * (stored[re.sub("_A(?=$|.weight)", "_B", key)] @ stored[key])
        for key in stored
        if re.search(r"_A(\.weight)?$", key)
    }


@pytest.mark.parametrize(
    ("family", "config"),
    [
        pytest.param("llama", {}, id="plain"),
        pytest.param("llama", MIXED, id="patterns"),
        pytest.param("llama", MIXED | {"use_rslora": True}, id="rslora"),
        pytest.param("llama", {"alpha": 0.7}, id="no-integer"),
        pytest.param("llama", {"targets": ("embed_tokens", "query")}, id="embedding"),
        pytest.param(
            "gpt2", {"targets": ("qkv",), "parts": {"qkv": (True, False, True)}}, id="parts"
        ),
    ],
)
def test_one_global_scale_gives_the_same_weights(tmp_path, family, config):
    model = model_of(family)
    _, trainable = trained(model, lora(**config))
    adapter = save_adapter(tmp_path / "a", trainable, lora(**config), model, profile="vllm")
    fields = json.loads((adapter / "adapter_config.json").read_text())
    assert fields["rank_pattern"] == fields["alpha_pattern"] == {}
    assert not fields["use_rslora"]
    assert isinstance(fields["lora_alpha"], int)
    ends = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
    stored = load_file(adapter / WEIGHTS)
    assert all(key.endswith(ends) for key in stored)
    for key, tensor in stored.items():
        assert tensor.shape[1 if "_B" in key else 0] == fields["r"]
    updates = updates_as_vllm_reads_them(adapter)
    for path, factors in trainable.items():
        whole = jax.tree.map(np.asarray, factors.whole())
        (module,) = model.names.entries[path].modules
        update = updates.pop(f"base_model.model.{module}")
        # Scales move between factors, each rounded once, in sums of eight products at most.
        atol = 16 * np.finfo(np.float32).eps * max(1.0, np.abs(update).max())
        np.testing.assert_allclose(update.T, whole.scale * whole.a @ whole.b, rtol=0, atol=atol)
    assert not updates


def test_a_config_that_vllm_reads_already_changes_no_value(tmp_path):
    model = model_of("llama")
    _, trainable = trained(model, lora())
    for profile in ("peft", "vllm"):
        save_adapter(tmp_path / profile, trainable, lora(), model, profile=profile)
    one, two = (load_file(tmp_path / profile / WEIGHTS) for profile in ("peft", "vllm"))
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], two[key])


@pytest.mark.parametrize(
    ("family", "config", "match"),
    [
        pytest.param(
            "llama", {"train": ("lm_head",)}, "lm_head/kernel: vLLM reads no weights", id="full"
        ),
        pytest.param("qwen2", {"train": ("query/bias",)}, "query/bias.*vLLM reads no", id="bias"),
        pytest.param(
            "llama-tied", {"targets": ("embed_tokens",)}, "lm_head: tied to an embedding", id="tied"
        ),
    ],
)
def test_what_vllm_refuses_is_refused(tmp_path, family, config, match):
    model = model_of(family)
    _, trainable = split(model.params, lora(**config), jax.random.key(0))
    with pytest.raises(ValueError, match=match):
        save_adapter(tmp_path / "a", trainable, lora(**config), model, profile="vllm")
    assert not (tmp_path / "a").exists()


def test_a_rank_above_vllms_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_modules, "VLLM_MAX_RANK", 3)
    model = model_of("llama")
    _, trainable = split(model.params, lora(), jax.random.key(0))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj: vLLM takes ranks up to 3"):
        save_adapter(tmp_path / "a", trainable, lora(), model, profile="vllm")
