"""Tokenizers: found beside a checkpoint, or refused in words."""

import pytest

from lora_jax.io.tokenizers import load_tokenizer
from tests.lora_jax.generation import toys


def test_one_without_padding_pads_with_its_eos(tmp_path):
    toys.tokenizer("a", "b").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("b a")["input_ids"] == [1, 0]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_its_own_padding_is_kept(tmp_path):
    toys.tokenizer("a", "b", pad_token="a").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == 0


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param({}, "has no tokenizer: none of tokenizer.json", id="nothing"),
        pytest.param({"tokenizer_config.json": "{}"}, "none of tokenizer.json", id="config-alone"),
        pytest.param({"tokenizer.json": "{"}, "no tokenizer that can be read", id="broken"),
        pytest.param({"tokenizer.json": "[]"}, "no tokenizer that can be read", id="a-list"),
        pytest.param({"tokenizer.json": "[" * 100_000}, "that can be read", id="deep"),
    ],
)
def test_what_has_no_tokenizer(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_neither_padding_nor_eos(tmp_path):
    tokenizer = toys.tokenizer("a", "b")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a padding nor an eos token"):
        load_tokenizer(tmp_path)


def test_a_path_that_is_not_there():
    with pytest.raises(ValueError, match=r"'\./nowhere' does not exist"):
        load_tokenizer("./nowhere")
