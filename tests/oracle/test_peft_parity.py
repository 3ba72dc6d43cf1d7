"""PEFT loads what we write and we load what it writes, with equal logits, live."""

import re
import warnings

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (make test-oracle)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed (make test-oracle)")

from lora_jax._config import LoraConfig  # noqa: E402
from lora_jax._merge import merge  # noqa: E402
from lora_jax.io import load_adapter, save_adapter  # noqa: E402
from lora_jax.models import from_pretrained  # noqa: E402
from tests.oracle import peft_cases as cases  # noqa: E402
from tests.references.checkpoints import checkpoint, outputs  # noqa: E402

TASKS = {
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "masked-lm": transformers.AutoModelForMaskedLM,
}
SEQUENCE = "sequence-classification"
TOLERANCE = 1e-5
# PEFT calls what transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def inputs(family):
    stored = outputs(family)
    return {name: stored[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


def torch_logits(model, given):
    # PEFT's own forward for question answering loses token_type_ids: ask the model inside.
    model = model.base_model.model if isinstance(model, peft.PeftModel) else model
    with torch.no_grad():
        output = model(**{name: torch.from_numpy(array) for name, array in given.items()})
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1).numpy()
    return output.logits.numpy()


def assert_same(ours, theirs):
    """To rounding, next to the largest logit."""
    difference = np.abs(ours - theirs).max() / max(1.0, np.abs(theirs).max())
    print(f"largest difference {difference:.1e}, next to the largest logit")
    assert difference < TOLERANCE


def lora(**changes) -> LoraConfig:
    fields = {"rank": 4, "alpha": 10.0, "targets": ("attention/(query|value)",), "dropout": 0.1}
    return LoraConfig(**(fields | {"train": ("classifier/.*",)} | changes))


PATTERNS = {
    "rank_pattern": {"layers/0/attention/query": 2},
    "alpha_pattern": {"layers/1/attention/value": 3.0},
}
SCANNED = {"layouts": {"encoder/layers/.*/kernel": "stack in out"}}


@pytest.mark.parametrize(
    ("family", "task", "config"),
    [
        pytest.param("bert", SEQUENCE, {}, id="bert"),
        pytest.param("roberta", SEQUENCE, {}, id="roberta"),
        pytest.param("bert", SEQUENCE, SCANNED, id="scanned"),
        pytest.param("bert", SEQUENCE, PATTERNS, id="patterns"),
        pytest.param("bert", SEQUENCE, PATTERNS | {"use_rslora": True}, id="rslora"),
        pytest.param("bert", SEQUENCE, {"targets": ("attention/.*", "mlp/.*/kernel")}, id="linear"),
        pytest.param("bert", SEQUENCE, {"targets": ("layers/1/.*/query",)}, id="one-layer"),
        pytest.param("bert", SEQUENCE, {"targets": ("pooler", "mlp/up")}, id="pooler-target"),
        pytest.param("bert", SEQUENCE, {"train": ("pooler/.*", "classifier/.*")}, id="pooler"),
        pytest.param("roberta", SEQUENCE, {"train": ("classifier/.*", "norm/.*")}, id="norms"),
        pytest.param("bert", SEQUENCE, {"train": ("embeddings/.*", "classifier/.*")}, id="tables"),
        pytest.param("bert", SEQUENCE, {"train": ()}, id="trained-head-left"),
        pytest.param("bert", "token-classification", {}, id="token-classification"),
        pytest.param("bert", "question-answering", {"train": ("qa_outputs/.*",)}, id="answers"),
        pytest.param("roberta", "masked-lm", {"train": ()}, id="masked-lm"),
        pytest.param("bert", SEQUENCE, {"targets": ("word_embeddings", "query")}, id="embedding"),
        pytest.param(
            "bert", SEQUENCE, {"train": ("(query|value)/bias", "classifier/.*")}, id="lora-only"
        ),
        pytest.param("bert", SEQUENCE, {"train": ("bias", "classifier/.*")}, id="bias-all"),
        pytest.param("bert", SEQUENCE, {"train": ("bias",)}, id="bias-all-and-no-head"),
        pytest.param("bert", "masked-lm", {"train": ("bias",)}, id="bias-all-tied"),
        pytest.param("bert", "masked-lm", {"train": ("lm_head/.*",)}, id="tied-head"),
        pytest.param("bert", "masked-lm", {"train": ("word_embeddings",)}, id="tied-in-full"),
        pytest.param(
            "roberta", "masked-lm", {"targets": ("word_embeddings",), "train": ()}, id="tied"
        ),
    ],
)
def test_peft_loads_what_we_save(tmp_path, family, task, config):
    base = checkpoint(tmp_path / "base", family, task)
    model = from_pretrained(base, task, scan_layers="layouts" in config)
    if "attention/.*" in config.get("targets", ()):
        config = config | {"exclude": ("bias", "scale")}
    frozen, trainable = cases.trained(model, lora(**config))
    adapter = save_adapter(tmp_path / "adapter", trainable, lora(**config), model)
    plain = TASKS[task].from_pretrained(base).eval()
    given = inputs(family)
    before = torch_logits(plain, given)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of keys that PEFT does not find
        theirs = peft.PeftModel.from_pretrained(plain, adapter).eval()
    expected = torch_logits(theirs, given)
    ours = np.asarray(jax.jit(model.apply)(merge(frozen, trainable), **given))
    assert_same(ours, expected)
    assert np.abs(expected - before).max() > 1e-2
    cases.assert_peft_would_write_the_same(theirs, adapter, tmp_path / "again")


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(
    ("family", "task", "config"),
    [
        pytest.param("bert", SEQUENCE, {"target_modules": ["query", "value"]}, id="bert"),
        pytest.param("roberta", SEQUENCE, {"target_modules": ["query", "value"]}, id="roberta"),
        pytest.param("bert", SEQUENCE, {"target_modules": ["query"], "use_rslora": True}, id="rs"),
        pytest.param("bert", SEQUENCE, {"target_modules": "all-linear"}, id="all-linear"),
        pytest.param("bert", SEQUENCE, {"target_modules": r".*\.self\.(key|query)"}, id="regex"),
        pytest.param(
            "bert",
            SEQUENCE,
            {"target_modules": ["dense"], "exclude_modules": ["pooler.dense"]},
            id="exclude",
        ),
        pytest.param(
            "bert",
            SEQUENCE,
            {"target_modules": ["query"], "modules_to_save": ["pooler"]},
            id="save",
        ),
        pytest.param("bert", "question-answering", {"target_modules": ["value"]}, id="answers"),
        pytest.param("roberta", "token-classification", {"target_modules": ["key"]}, id="tokens"),
        pytest.param(
            "bert",
            SEQUENCE,
            {"target_modules": ["query"], "init_lora_weights": "gaussian"},
            id="gaussian",
        ),
        pytest.param(
            "bert", SEQUENCE, {"target_modules": ["query", "word_embeddings"]}, id="embedding"
        ),
        pytest.param("bert", SEQUENCE, {"target_modules": ["query"], "bias": "all"}, id="bias-all"),
        pytest.param(
            "roberta", SEQUENCE, {"target_modules": ["query"], "bias": "all"}, id="bias-all-head"
        ),
        pytest.param(
            "roberta",
            SEQUENCE,
            {"target_modules": ["query"], "bias": "lora_only"},
            id="bias-lora-only",
        ),
    ],
)
def test_we_load_what_peft_saves(tmp_path, family, task, config, scan_layers):
    types = {SEQUENCE: "SEQ_CLS", "question-answering": "QUESTION_ANS"}
    base = checkpoint(tmp_path / "base", family, task)
    wanted = peft.LoraConfig(
        task_type=types.get(task, "TOKEN_CLS"), r=4, lora_alpha=6, lora_dropout=0.1, **config
    )
    theirs = peft.get_peft_model(TASKS[task].from_pretrained(base), wanted).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn(weight.shape))
    theirs.save_pretrained(tmp_path / "adapter")
    model = from_pretrained(base, task, scan_layers=scan_layers)
    frozen, trainable, _ = load_adapter(tmp_path / "adapter", model)
    given = inputs(family)
    ours = np.asarray(jax.jit(model.apply)(merge(frozen, trainable), **given))
    assert_same(ours, torch_logits(theirs, given))


@pytest.mark.parametrize("profile", ["peft", "vllm"])
def test_pefts_code_on_the_card_runs(tmp_path, profile):
    base = checkpoint(tmp_path / "base", "bert", SEQUENCE)
    model = from_pretrained(base)
    config = lora(train=() if profile == "vllm" else ("classifier/.*",), **PATTERNS)
    frozen, trainable = cases.trained(model, config)
    adapter = save_adapter(tmp_path / "adapter", trainable, config, model, profile=profile)
    card = (adapter / "README.md").read_text()
    block = re.search(r"With PEFT:\n\n```python\n(.*?)```", card, re.DOTALL)[1]
    scope = {}
    exec(block.replace('"BASE"', repr(str(base))).replace('"ADAPTER"', repr(str(adapter))), scope)
    given = inputs("bert")
    ours = np.asarray(jax.jit(model.apply)(merge(frozen, trainable), **given))
    assert_same(ours, torch_logits(scope["model"], given))
