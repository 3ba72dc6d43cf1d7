"""What is read from ``config.json``: both spellings alike, and nothing passed over."""

import pytest

from lora_jax.models import llama
from tests.references.decoders import FAMILIES, config_json

SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
OLD = {
    "llama": {"rope_theta": 10000.0, "rope_scaling": SCALING},
    "mistral": {"rope_theta": 10000.0},
    "qwen2": {"rope_scaling": None, "layer_types": ...},
    "qwen3": {"rope_theta": 10000, "rope_scaling": None, "layer_types": None},
    "gemma3": {
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
        "rope_scaling": {"type": "linear", "factor": 8.0},
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_old_and_new_spelling_give_one_config(family):
    new = llama.read_config(config_json(family))
    old = llama.read_config(config_json(family, rope_parameters=..., **OLD[family]))
    assert old == new


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_alone_and_over_the_file(family):
    fields = config_json(family)
    config = llama.read_config(fields)
    written = llama.config_fields(config)
    assert llama.read_config(written) == config
    assert llama.read_config(fields | written) == config


SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 49152,
}


def test_smollm2_is_read():
    config = llama.read_config(SMOLLM2, num_labels=3)
    assert (config.head_dim, config.rope.rope_theta, config.max_length) == (64, 100000, 8192)
    assert not any(config.sliding_layers)


def test_qwen2_5_says_what_it_has_not():
    fields = config_json("qwen2")
    assert llama.read_config(fields | {"use_mrope": False}) == llama.read_config(fields)


def test_llama_2_left_out_what_had_its_default():
    absent = dict.fromkeys(
        ("attention_bias", "mlp_bias", "rope_theta", "num_key_value_heads", "pad_token_id"), ...
    )
    fields = {k: v for k, v in (SMOLLM2 | absent).items() if v is not ...}
    config = llama.read_config(fields)
    assert (config.num_key_value_heads, config.rope.rope_theta) == (9, 10000.0)
    assert not any((config.query_key_value_bias, config.out_bias, config.mlp_bias))


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        pytest.param("mistral", {"sliding_window": None}, "..", id="mistral-without"),
        pytest.param("mistral", {}, "ss", id="mistral"),
        pytest.param("qwen2", {"use_sliding_window": False, "layer_types": ...}, "..", id="off"),
        pytest.param("qwen2", {"layer_types": ...}, ".s", id="qwen-upper-layers"),
        pytest.param(
            "qwen2", {"layer_types": ["sliding_attention"] * 2}, "ss", id="qwen-layer-types"
        ),
        pytest.param("gemma3", {"layer_types": ...}, "sss", id="gemma-five-of-six"),
        pytest.param(
            "gemma3", {"layer_types": ..., "sliding_window_pattern": 3}, "ss.", id="gemma-pattern"
        ),
    ],
)
def test_which_layers_see_a_window(family, changes, expected):
    config = llama.read_config(config_json(family, **changes))
    assert "".join("s" if sliding else "." for sliding in config.sliding_layers) == expected


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        pytest.param("llama", {"model_type": "phi"}, "`model_type` must be one of", id="family"),
        pytest.param("llama", {"hidden_act": "mish"}, "`hidden_act` 'mish'", id="activation"),
        pytest.param("llama", {"vocab_size": 10**12}, "`vocab_size` must be at most", id="large"),
        pytest.param("llama", {"num_hidden_layers": 10**9}, "must be at most 1000,", id="deep"),
        pytest.param("llama", {"sliding_window": 4}, "`sliding_window` is unknown", id="others"),
        pytest.param("mistral", {"mlp_bias": True}, "`mlp_bias` is unknown", id="others-bias"),
        pytest.param("llama", {"quantization_config": {}}, "`quantization_config`", id="quantised"),
        pytest.param("llama", {"attention_dropout": 0.1}, "`attention_dropout` is 0.1", id="drop"),
        pytest.param("llama", {"rope_interleaved": True}, "`rope_interleaved`", id="interleaved"),
        pytest.param("qwen2", {"use_mrope": True}, "`use_mrope` is True", id="mrope"),
        pytest.param(
            "gemma3",
            {"rope_parameters": {"full_attention": 3}},
            "must be an object, got 3",
            id="rope-of-no-keys",
        ),
        pytest.param("llama", {"hidden_size": "32"}, "`hidden_size` must be int", id="type"),
        pytest.param("llama", {"vocab_size": ...}, "`vocab_size` is missing", id="missing"),
        pytest.param("qwen3", {"head_dim": ...}, "`head_dim` is missing", id="head-missing"),
        pytest.param("llama", {"num_hidden_layers": 0}, "at least 1", id="no-layers"),
        pytest.param("llama", {"num_key_value_heads": 3}, "multiple of `num_key", id="groups"),
        pytest.param("llama", {"head_dim": 7}, "`head_dim` must be even", id="odd-head"),
        pytest.param(
            "llama", {"head_dim": None, "hidden_size": 33}, "must be a multiple of", id="derived"
        ),
        pytest.param("llama", {"rope_theta": 5.0}, "the old and the new", id="two-thetas"),
        pytest.param(
            "llama", {"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic'", id="rope-type"
        ),
        pytest.param("qwen2", {"layer_types": ["full_attention"]}, "1 entries for 2", id="layers"),
        pytest.param("qwen2", {"layer_types": ["chunked"] * 2}, "'chunked'", id="layer-type"),
        pytest.param("qwen2", {"sliding_window": None}, "`sliding_window` is None", id="window"),
        pytest.param("gemma3", {"sliding_window_pattern": 3}, "does not follow", id="pattern"),
        pytest.param(
            "gemma3", {"final_logit_softcapping": 30.0}, "`final_logit_softcapping`", id="softcap"
        ),
        pytest.param(
            "gemma3", {"use_bidirectional_attention": True}, "`use_bidirectional", id="both-ways"
        ),
        pytest.param(
            "gemma3", {"rope_parameters": {"rope_type": "default"}}, r"\['rope_type'\]", id="flat"
        ),
        pytest.param(
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "sliding_attention is 'linear'",
            id="sliding-rope",
        ),
    ],
)
def test_config_refuses(family, changes, match):
    with pytest.raises(ValueError, match=match):
        llama.read_config(config_json(family, **changes))


def test_config_lists_every_problem_at_once():
    fields = config_json("llama", attention_dropout=0.5, spam=1, vocab_size=1.5, hidden_size=...)
    with pytest.raises(ValueError, match=r"config.json") as caught:
        llama.read_config(fields)
    for word in ("`attention_dropout`", "`spam`", "`vocab_size`", "`hidden_size` is missing"):
        assert word in str(caught.value)
