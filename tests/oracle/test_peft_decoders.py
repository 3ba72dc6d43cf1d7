"""Decoders: PEFT trains and we load, we train and PEFT loads, with equal logits and merges."""

import warnings

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (make test-oracle)")
pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed (make test-oracle)")

from lora_jax import load_adapter, merge, save_adapter  # noqa: E402
from tests.oracle import peft_cases as cases  # noqa: E402

# PEFT calls what transformers is about to rename.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The checkpoint of a family, made once."""
    root = tmp_path_factory.mktemp("bases")

    def base(family):
        if not (root / family).exists():
            cases.make_checkpoint(root / family, family)
        return root / family

    return base


ATTENTION = ("attention/(query|value)",)
PATTERNS = {
    "rank_pattern": {"layers/0/attention/query": 2},
    "alpha_pattern": {"layers/1/attention/value": 3.0},
}
LLAMA_SCANNED = {"layouts": {"layers/.*/kernel": "stack in out"}}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        pytest.param("llama", {"targets": ATTENTION}, id="llama"),
        pytest.param("llama", {"targets": ATTENTION, **LLAMA_SCANNED}, id="llama-scanned"),
        pytest.param("llama", {"targets": ATTENTION, **PATTERNS}, id="patterns"),
        pytest.param("llama", {"targets": ATTENTION, **PATTERNS, "use_rslora": True}, id="rslora"),
        pytest.param("llama", {"targets": ("all-linear",)}, id="all-linear"),
        pytest.param("llama", {"targets": ("lm_head", "layers/1/mlp/up")}, id="output-layer"),
        pytest.param("llama", {"targets": ("embed_tokens", "query")}, id="embedding"),
        pytest.param("llama", {"targets": ATTENTION, "train": ("lm_head",)}, id="full-head"),
        pytest.param("llama", {"targets": ATTENTION, "train": ("embed_tokens",)}, id="full-table"),
        pytest.param(
            "llama", {"targets": ATTENTION, "train": ("norm/scale", ".*_norm/scale")}, id="norms"
        ),
        pytest.param("qwen2", {"targets": ATTENTION}, id="qwen2"),
        pytest.param(
            "qwen2", {"targets": ATTENTION, "train": ("(query|value)/bias",)}, id="bias-lora-only"
        ),
        pytest.param("qwen2", {"targets": ATTENTION, "train": ("bias",)}, id="bias-all"),
        pytest.param("gpt2", {"targets": ("attention/qkv",)}, id="gpt2"),
        pytest.param("gpt2", {"targets": ("attention/qkv",), **LLAMA_SCANNED}, id="gpt2-scanned"),
        pytest.param("gpt2", {"targets": ("all-linear",), "train": ("bias",)}, id="gpt2-bias-all"),
        pytest.param(
            "gpt2",
            {"targets": ("attention/qkv",), "parts": {"attention/qkv": (True, False, True)}},
            id="gpt2-parts",
        ),
        pytest.param(
            "gpt2",
            {
                "targets": ("attention/(qkv|out)",),
                "parts": {"attention/qkv": (True, False, True)},
                "use_rslora": True,
            },
            id="gpt2-parts-rslora",
        ),
        pytest.param("gpt2", {"targets": ("attention/out", "wpe")}, id="gpt2-positions"),
        pytest.param("gemma3", {"targets": ATTENTION}, id="gemma3"),
        pytest.param("gemma3", {"targets": ("all-linear",)}, id="gemma3-all-linear"),
        pytest.param("gemma3", {"targets": ATTENTION, "train": ("embed_tokens",)}, id="tied-full"),
        pytest.param("llama-tied", {"targets": ("query",), "train": ("embed_tokens",)}, id="tied"),
        pytest.param("gpt2", {"targets": ("attention/qkv",), "train": ("wte",)}, id="gpt2-tied"),
    ],
)
def test_peft_loads_what_we_save(tmp_path, bases, family, config):
    base = bases(family)
    model, apply = cases.our_model(base, scan_layers="layouts" in config)
    frozen, trainable = cases.trained(model, cases.lora(**config))
    adapter = save_adapter(tmp_path / "adapter", trainable, cases.lora(**config), model)
    theirs = cases.load_peft(base, adapter)
    expected = cases.torch_logits(theirs)
    cases.assert_same_logits(cases.our_logits(apply, merge(frozen, trainable)), expected)
    assert abs(expected - cases.torch_logits(cases.read_torch(base))).max() > 1e-2
    cases.assert_peft_would_write_the_same(theirs, adapter, tmp_path / "again")
    cases.assert_same_merge(model, frozen, trainable, theirs)


@pytest.mark.parametrize("family", ["llama-tied", "gemma3", "gpt2"])
def test_a_tied_embedding_is_adapted_in_both_uses(tmp_path, bases, family):
    base = bases(family)
    config = cases.lora(targets=("wte" if family == "gpt2" else "embed_tokens",))
    model, apply = cases.our_model(base)
    frozen, trainable = cases.trained(model, config)
    adapter = save_adapter(tmp_path / "adapter", trainable, config, model)
    theirs = cases.load_peft(base, adapter)
    expected = cases.torch_logits(theirs)
    cases.assert_same_logits(cases.our_logits(apply, merge(frozen, trainable)), expected)
    cases.assert_peft_would_write_the_same(theirs, adapter, tmp_path / "again")
    # What the card warns of: PEFT adds the update of a tied weight once for each of its uses.
    merged_twice = cases.torch_logits(theirs.merge_and_unload())
    assert abs(merged_twice - expected).max() > 1e-1


@pytest.mark.parametrize(
    ("family", "config"),
    [
        pytest.param("llama", {"target_modules": ["q_proj", "v_proj"]}, id="llama"),
        pytest.param("llama", {"target_modules": "all-linear"}, id="all-linear"),
        pytest.param("llama", {"target_modules": ["embed_tokens", "q_proj"]}, id="embedding"),
        pytest.param("llama", {"target_modules": ["lm_head", "up_proj"]}, id="output-layer"),
        pytest.param(
            "llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, id="full-head"
        ),
        pytest.param(
            "llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, id="norms"
        ),
        pytest.param(
            "llama",
            {"target_modules": r"model\.layers\.\d+\.self_attn\.(q|k)_proj"},
            id="regular-expression",
        ),
        pytest.param(
            "llama",
            {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["up_proj"]},
            id="exclude",
        ),
        pytest.param("qwen2", {"target_modules": ["q_proj"], "bias": "all"}, id="bias-all"),
        pytest.param(
            "qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"}, id="lora-only"
        ),
        pytest.param(
            "qwen2",
            {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["k_proj"]},
            id="bias-all-and-module",
        ),
        pytest.param("gpt2", {"target_modules": ["c_attn"]}, id="gpt2"),
        pytest.param(
            "gpt2", {"target_modules": ["c_attn", "c_proj"], "bias": "all"}, id="gpt2-bias"
        ),
        pytest.param("gpt2", {"target_modules": ["c_fc", "wpe"]}, id="gpt2-positions"),
        pytest.param("gemma3", {"target_modules": ["q_proj", "down_proj"]}, id="gemma3"),
        pytest.param(
            "gemma3",
            {
                "target_modules": ["q_proj"],
                "modules_to_save": ["embed_tokens"],
                "ensure_weight_tying": True,
            },
            id="tied-full",
        ),
    ],
)
def test_we_load_what_peft_saves(tmp_path, bases, family, config):
    theirs = _train_peft(tmp_path / "adapter", bases(family), config)
    _assert_we_load(tmp_path / "adapter", bases(family), theirs)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        pytest.param("llama", {"target_modules": "all-linear"}, id="llama"),
        pytest.param("gpt2", {"target_modules": ["c_attn"], "bias": "all"}, id="gpt2-bias-all"),
        pytest.param(
            "gemma3",
            {
                "target_modules": ["q_proj"],
                "modules_to_save": ["embed_tokens"],
                "ensure_weight_tying": True,
            },
            id="tied-full",
        ),
    ],
)
def test_we_load_into_scanned_layers(tmp_path, bases, family, config):
    theirs = _train_peft(tmp_path / "adapter", bases(family), config)
    _assert_we_load(tmp_path / "adapter", bases(family), theirs, scan_layers=True)


def _assert_we_load(adapter, base, theirs, *, scan_layers=False):
    model, apply = cases.our_model(base, scan_layers)
    frozen, trainable, _ = load_adapter(adapter, model)
    ours = cases.our_logits(apply, merge(frozen, trainable))
    cases.assert_same_logits(ours, cases.torch_logits(theirs))
    cases.assert_same_merge(model, frozen, trainable, theirs)


def test_layers_to_transform(tmp_path, bases):
    config = {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]}
    theirs = _train_peft(tmp_path / "adapter", bases("llama"), config)
    model, apply = cases.our_model(bases("llama"))
    frozen, trainable, _ = load_adapter(tmp_path / "adapter", model)
    assert all(path.startswith("layers/1/") for path in trainable)
    ours = cases.our_logits(apply, merge(frozen, trainable))
    cases.assert_same_logits(ours, cases.torch_logits(theirs))


def test_a_tied_embedding_that_peft_ties(tmp_path, bases):
    config = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    theirs = _train_peft(tmp_path / "adapter", bases("llama-tied"), config)
    model, apply = cases.our_model(bases("llama-tied"))
    frozen, trainable, _ = load_adapter(tmp_path / "adapter", model)
    ours = cases.our_logits(apply, merge(frozen, trainable))
    cases.assert_same_logits(ours, cases.torch_logits(theirs))


@pytest.mark.parametrize(
    ("family", "config", "match"),
    [
        pytest.param(
            "llama-tied",
            {"target_modules": ["embed_tokens"]},
            "only model.embed_tokens has factors.*one weight here",
            id="lookup-only",
        ),
        pytest.param(
            "llama-tied",
            {"target_modules": ["lm_head"]},
            "only lm_head has factors.*one weight here",
            id="output-only",
        ),
        pytest.param(
            "llama-tied",
            {"target_modules": ["embed_tokens", "lm_head"]},
            "factors of model.embed_tokens and lm_head differ",
            id="both-and-differ",
        ),
        pytest.param(
            "llama-tied",
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
            "embed_tokens.weight is trained and lm_head.weight, one weight with it here, is not",
            id="full-lookup-only",
        ),
        pytest.param(
            "llama", {"target_modules": ["q_proj"], "use_dora": True}, "use_dora.*DoRA", id="dora"
        ),
        pytest.param(
            "llama",
            {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
            "trainable_token_indices.*single rows",
            id="tokens",
        ),
        pytest.param(
            "qwen2",
            {"target_modules": ["q_proj"], "lora_bias": True},
            "`lora_bias`",
            id="lora-bias",
        ),
        pytest.param(
            "llama",
            {"target_parameters": ["q_proj.weight"], "target_modules": []},
            "target_parameters.*experts",
            id="experts",
        ),
    ],
)
def test_what_we_cannot_express_is_refused(tmp_path, bases, family, config, match):
    _train_peft(tmp_path / "adapter", bases(family), config)
    model, _ = cases.our_model(bases(family))
    with pytest.raises(ValueError, match=match):
        load_adapter(tmp_path / "adapter", model)


def _train_peft(directory, base, config):
    """An adapter that PEFT made, with everything moved that trains."""
    wanted = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, **({"lora_dropout": 0.1} | config
        if "target_parameters" not in config else config),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theirs = cases.moved(peft.get_peft_model(cases.read_torch(base), wanted)).eval()
        theirs.save_pretrained(directory)
    return theirs
