"""``lora-jax merge``: transformers loads what it writes, PEFT's own merge is the same, live."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (make test-oracle)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed (make test-oracle)")

from lora_jax import cli  # noqa: E402
from lora_jax.models import from_pretrained, save_pretrained  # noqa: E402
from tests.oracle.peft_cases import IDS, MASK, make_checkpoint  # noqa: E402
from tests.references.checkpoints import checkpoint  # noqa: E402

SEQUENCE, CAUSAL = "sequence-classification", "causal-lm"
CLASSES = {
    SEQUENCE: transformers.AutoModelForSequenceClassification,
    CAUSAL: transformers.AutoModelForCausalLM,
}
LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
CASES = [
    pytest.param("bert", SEQUENCE, {"target_modules": ["query", "value"]}, id="bert"),
    pytest.param("roberta", SEQUENCE, {"target_modules": ["query", "dense"]}, id="roberta"),
    pytest.param("llama", CAUSAL, LLAMA, id="llama"),
    pytest.param("llama-tied", CAUSAL, LLAMA | {"use_rslora": True}, id="llama-tied-rslora"),
    pytest.param("qwen2", CAUSAL, LLAMA | {"rank_pattern": {"q_proj": 2}}, id="qwen2-patterns"),
    pytest.param("gemma3", CAUSAL, LLAMA, id="gemma3"),
    pytest.param(
        "gpt2", CAUSAL, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}, id="gpt2"
    ),
]
TYPES = {SEQUENCE: "SEQ_CLS", CAUSAL: "CAUSAL_LM"}
# PEFT calls what transformers is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def make_base(directory, family, task):
    if task == CAUSAL:
        make_checkpoint(directory, family)
    else:
        checkpoint(directory, family, task)
    (directory / "generation_config.json").write_text('{"max_new_tokens": 7}')
    return directory


def make_adapter(directory, base, task, options):
    """What PEFT trains and saves, everything that trains moved; and its model."""
    config = peft.LoraConfig(task_type=TYPES[task], r=4, lora_alpha=6, **options)
    model = peft.get_peft_model(CLASSES[task].from_pretrained(base), config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn(weight.shape))
    model.save_pretrained(directory)
    return model


def torch_logits(model, task):
    given = {"input_ids": torch.from_numpy(IDS), "attention_mask": torch.from_numpy(MASK)}
    if task == CAUSAL:  # GPT-2 would count padding too
        given["position_ids"] = torch.from_numpy(np.maximum(MASK.cumsum(1) - 1, 0))
    with torch.no_grad():
        return model(**given).logits.numpy()


@pytest.mark.parametrize(("family", "task", "options"), CASES)
def test_transformers_loads_the_merged_model_and_peft_merges_alike(tmp_path, family, task, options):
    base = make_base(tmp_path / "base", family, task)
    theirs = make_adapter(tmp_path / "adapter", base, task, options)
    adapted = torch_logits(theirs, task)
    command = [
        "merge",
        "--base",
        base,
        "--adapter",
        tmp_path / "adapter",
        "--out",
        tmp_path / "new",
    ]
    assert cli.main(list(map(str, command))) == 0
    loaded, report = CLASSES[task].from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    if task == CAUSAL:
        assert loaded.generation_config.max_new_tokens == 7
    by_peft = theirs.merge_and_unload().state_dict()
    by_us = loaded.state_dict()
    assert by_us.keys() == by_peft.keys()
    for name, tensor in by_us.items():
        difference = (tensor - by_peft[name]).abs().max().item()
        # Both sum rank products in float32 and add them to the weight, in an order of their own.
        bound = 8 * torch.finfo(torch.float32).eps * max(1.0, tensor.abs().max().item())
        assert difference <= bound, name
    ours = from_pretrained(tmp_path / "new", task, new_head=False)
    logits = np.asarray(jax.jit(ours.apply)(ours.params, IDS, MASK))
    kept = MASK.astype(bool) if logits.ndim == 3 else slice(None)
    for one, other in ((torch_logits(loaded.eval(), task), adapted), (logits, adapted)):
        difference = np.abs(one - other)[kept].max()
        print(f"largest difference {difference:.1e}")
        assert difference < 1e-4
    plain = torch_logits(CLASSES[task].from_pretrained(base).eval(), task)
    assert np.abs(plain - adapted)[kept].max() > 1e-2


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_transformers_reads_the_dtype_that_was_asked_for(tmp_path, dtype):
    base = make_base(tmp_path / "base", "llama", CAUSAL)
    make_adapter(tmp_path / "adapter", base, CAUSAL, LLAMA)
    command = [
        "merge",
        "--base",
        base,
        "--adapter",
        tmp_path / "adapter",
        "--out",
        tmp_path / "new",
    ]
    assert cli.main([*map(str, command), "--dtype", dtype]) == 0
    loaded = CLASSES[CAUSAL].from_pretrained(tmp_path / "new", dtype="auto")
    assert {weight.dtype for weight in loaded.parameters()} == {getattr(torch, dtype)}
    assert loaded.config.dtype == getattr(torch, dtype)


def test_transformers_reads_shards(tmp_path):
    base = make_base(tmp_path / "base", "gpt2", CAUSAL)
    model = from_pretrained(base, CAUSAL)
    save_pretrained(tmp_path / "new", model, model.params, max_shard_bytes=10_000)
    assert len(list((tmp_path / "new").glob("model-*.safetensors"))) > 2
    loaded, report = CLASSES[CAUSAL].from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    expected = CLASSES[CAUSAL].from_pretrained(base).state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
