"""GPT-2 against the PyTorch implementation, live."""

import inspect

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (make test-oracle)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from lora_jax.models import from_pretrained, init_cache, save_pretrained  # noqa: E402

SIZES = {
    "vocab_size": 99,
    "n_positions": 40,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 98,
    "eos_token_id": 98,
}
TOLERANCE = 1e-5
FORMS = pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])


def torch_model(**changes):
    """A model with every weight drawn, and wide enough that a mix-up shows."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(SIZES | changes))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    return model


def tokens(rows=3, length=17):
    """Rows that are full, padded at the right, padded at the left."""
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (rows, length))
    mask = np.ones_like(ids)
    mask[1, 9:], mask[2, :5] = 0, 0
    return ids, mask


def torch_logits(model, ids, mask, **more):
    positions = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        return model(**{name: torch.from_numpy(array) for name, array in given.items()}, **more)


def largest_difference(ours, theirs, mask):
    difference = np.abs(np.asarray(ours) - theirs.numpy())[mask.astype(bool)].max()
    print(f"largest difference {difference:.1e}, largest logit {theirs.abs().max():.0f}")
    return difference


@FORMS
@pytest.mark.parametrize(
    "changes",
    [pytest.param({}, id="plain")]
    + [
        pytest.param({"activation_function": act}, id=act)
        for act in ("gelu", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")
    ]
    + [
        pytest.param({"layer_norm_epsilon": 0.1}, id="layer-norm-epsilon"),
        pytest.param({"n_inner": 20}, id="n-inner"),
        pytest.param({"n_head": 1}, id="one-head"),
        pytest.param({"tie_word_embeddings": False}, id="untied"),
    ],
)
def test_logits_are_pytorchs(tmp_path, changes, scan_layers):
    theirs = torch_model(**changes)
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, "causal-lm", scan_layers=scan_layers)
    ids, mask = tokens()
    logits = jax.jit(ours.apply)(ours.params, ids, mask)
    expected = torch_logits(theirs, ids, mask).logits
    assert largest_difference(logits, expected, mask) < TOLERANCE
    assert ours.new == ()


@FORMS
def test_cached_logits_are_pytorchs_cached_logits(tmp_path, scan_layers):
    theirs = torch_model()
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, "causal-lm", scan_layers=scan_layers)
    ids, mask = tokens()
    taken = inspect.signature(theirs.forward).parameters
    name = "cache" if "cache" in taken else "past_key_values"  # as the release has it
    step = jax.jit(lambda p, i, m, c: ours.apply(p, i, m, cache=c))
    cache, past = init_cache(ours.config, 3, 20), transformers.DynamicCache(config=theirs.config)
    for start, stop in ((0, 6), (6, 7), (7, 8), (8, 17)):
        logits, cache = step(ours.params, ids[:, start:stop], mask[:, start:stop], cache)
        expected = torch_logits(theirs, ids[:, start:stop], mask[:, :stop], **{name: past})
        assert largest_difference(logits, expected.logits, mask[:, start:stop]) < TOLERANCE


def test_the_gradient_is_pytorchs(tmp_path):
    theirs = torch_model()
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, "causal-lm")
    ids, mask = tokens()
    kept = mask.astype(np.float32)[:, :, None]
    gradient = jax.jit(jax.grad(lambda p: ((ours.apply(p, ids, mask) * kept) ** 2).mean()))(
        ours.params
    )
    positions = torch.from_numpy(np.maximum(mask.cumsum(1) - 1, 0))
    logits = theirs(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        position_ids=positions,
    ).logits
    (logits * torch.from_numpy(kept)).square().mean().backward()
    found = gradient["layers"]["1"]["attention"]["qkv"]["kernel"]
    expected = theirs.transformer.h[1].attn.c_attn.weight.grad.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_sharded_checkpoint_is_read(tmp_path):
    theirs = torch_model()
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    ours = from_pretrained(tmp_path, "causal-lm")
    ids, mask = tokens()
    logits = jax.jit(ours.apply)(ours.params, ids, mask)
    assert largest_difference(logits, torch_logits(theirs, ids, mask).logits, mask) < TOLERANCE


def test_the_bare_decoders_file_is_read(tmp_path):
    theirs = torch_model()
    theirs.transformer.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, "causal-lm")
    ids, mask = tokens()
    logits = jax.jit(ours.apply)(ours.params, ids, mask)
    assert largest_difference(logits, torch_logits(theirs, ids, mask).logits, mask) < TOLERANCE


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@FORMS
def test_pytorch_loads_what_we_save(tmp_path, tied, scan_layers):
    torch_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs", "causal-lm", scan_layers=scan_layers)
    moved = jax.tree.map(lambda weight: weight * 0.9, ours.params)
    save_pretrained(tmp_path / "ours", ours, moved)
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ids, mask = tokens()
    logits = jax.jit(ours.apply)(moved, ids, mask)
    expected = torch_logits(theirs.eval(), ids, mask).logits
    assert largest_difference(logits, expected, mask) < TOLERANCE
