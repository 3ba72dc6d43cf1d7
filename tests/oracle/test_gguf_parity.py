"""A GGUF file read by us gives the logits that transformers' own reader gives."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (make test-oracle)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("gguf", reason="gguf is not installed")

from lora_jax.models import from_pretrained  # noqa: E402
from tests.lora_jax.io import gguf_files  # noqa: E402
from tests.lora_jax.io.test_gguf_families import written  # noqa: E402

IDS = np.arange(24).reshape(2, 12) % gguf_files.VOCAB


# Not Qwen3 and Gemma 3: transformers 5.24 takes heads of 128 and a scale of 256 for granted.
@pytest.mark.parametrize("case", ["llama", "qwen2", "gpt2"])
def test_logits_are_those_of_the_other_reader(tmp_path, case):
    if case == "llama":
        file = gguf_files.llama(tmp_path / "m.gguf", encoding="Q4_1")
    else:
        file = written(tmp_path, case)
        (tmp_path / "config.json").unlink()
    ours = from_pretrained(file, "causal-lm")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(IDS)).logits.numpy()
    logits = ours.apply(ours.params, IDS)
    # 1e-4 is what every family is held to where logits are about 1; these are up to 40.
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * max(1, abs(expected).max()))
