"""The Llama family against the PyTorch implementation, live."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (make test-oracle)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from lora_jax.models import from_pretrained, init_cache, save_pretrained  # noqa: E402

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 37,
    "max_position_embeddings": 64,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 5}
LINEAR = {"rope_type": "linear", "factor": 4.0}
CASES = {
    "llama-2": ("Llama", {"num_key_value_heads": 4}),
    "llama-3": ("Llama", {"rope_scaling": LLAMA_3, "rope_theta": 5e5}),
    "llama-linear-rope": ("Llama", {"rope_scaling": LINEAR}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 0.1}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 5, "head_dim": 16}),
    "qwen2": ("Qwen2", {"rope_theta": 1e6}),
    "qwen2-upper-windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-untied-biases": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "gemma3": ("Gemma3", GEMMA | {"sliding_window_pattern": 2}),
    "gemma3-linear-rope": (
        "Gemma3",
        GEMMA | {"layer_types": ["full_attention"] * 3, "rope_scaling": LINEAR},
    ),
}
FORMS = [pytest.param(False, id="unrolled"), pytest.param(True, id="scanned")]
TOLERANCE = 1e-5


def torch_model(case):
    """A model with every weight drawn, and wide enough that a mix-up shows."""
    family, changes = CASES[case]
    config = getattr(transformers, f"{family}{'Text' if family == 'Gemma3' else ''}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config(**SIZES | changes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    return model


def tokens(rows=3, length=17):
    """Rows of tokens, the mask of their padding, and the positions that generation gives them."""
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (rows, length))
    mask = np.ones_like(ids)
    mask[1, 12:], mask[2, :5] = 0, 0
    return ids, mask, np.maximum(mask.cumsum(1) - 1, 0)


def torch_logits(model, ids, mask=None, positions=None, **more):
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    given = {k: torch.from_numpy(v) for k, v in given.items() if v is not None}
    with torch.no_grad():
        return model(**given, **more).logits.numpy()


@pytest.mark.parametrize("scan_layers", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_pytorchs(tmp_path, case, scan_layers):
    theirs = torch_model(case)
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, "causal-lm", scan_layers=scan_layers)
    ids, mask, positions = tokens()
    apply, kept = jax.jit(ours.apply), mask == 1
    plain = np.abs(apply(ours.params, ids) - torch_logits(theirs, ids)).max()
    padded = apply(ours.params, ids, mask) - torch_logits(theirs, ids, mask, positions)
    padded = np.abs(padded)[kept].max()
    print(f"largest difference {plain:.1e}, with padding {padded:.1e}")
    assert plain < TOLERANCE
    assert padded < TOLERANCE


@pytest.mark.parametrize("case", ["llama-3", "mistral-window", "qwen2-upper-windows", "gemma3"])
def test_logits_with_a_cache_are_pytorchs_with_its_cache(tmp_path, case):
    theirs = torch_model(case)
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, "causal-lm", scan_layers=True)
    ids, mask, positions = tokens()
    apply, kept = jax.jit(ours.apply), mask == 1
    whole = torch_logits(theirs, ids, mask, positions)
    own = init_cache(ours.config, len(ids), 20)
    other = transformers.DynamicCache(config=theirs.config)
    for start, stop in [(0, 4), (4, 9), *((i, i + 1) for i in range(9, 17))]:
        new = slice(start, stop)
        found, own = apply(ours.params, ids[:, new], mask[:, new], cache=own)
        expected = torch_logits(
            theirs, ids[:, new], mask[:, :stop], positions[:, new], cache=other, use_cache=True
        )
        at = kept[:, new]
        np.testing.assert_allclose(found[at], expected[at], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(found[at], whole[:, new][at], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("case", "scan_layers"),
    [(case, case in ("llama-3", "gemma3", "qwen2-upper-windows")) for case in CASES],
)
def test_pytorch_loads_what_we_save(tmp_path, case, scan_layers):
    torch_model(case).save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs", "causal-lm", scan_layers=scan_layers)
    moved = jax.tree.map(lambda weight: weight * 0.9, ours.params)
    save_pretrained(tmp_path / "ours", ours, moved)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, mask, positions = tokens()
    logits = np.asarray(jax.jit(ours.apply)(moved, ids, mask))
    expected = torch_logits(theirs.eval(), ids, mask, positions)
    np.testing.assert_allclose(logits[mask == 1], expected[mask == 1], rtol=0, atol=TOLERANCE)


def test_rounding_of_bfloat16_is_the_size_of_pytorchs(tmp_path):
    theirs = torch_model("gemma3")
    theirs.save_pretrained(tmp_path)
    ids, *_ = tokens()
    exact = torch_logits(theirs, ids)
    ours = from_pretrained(tmp_path, "causal-lm", dtype="bfloat16")
    found = np.asarray(jax.jit(ours.apply)(ours.params, ids))
    other = torch_logits(theirs.to(torch.bfloat16).float(), ids)  # rounded weights alone
    both = [np.abs(each - exact).mean() for each in (found, other)]
    print(f"mean error {both[0]:.1e}; of rounded weights alone {both[1]:.1e}")
    assert both[0] < 4 * both[1]
