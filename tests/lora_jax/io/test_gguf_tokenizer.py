"""The tokenizer inside a GGUF file."""

import pytest

from lora_jax.io.gguf import load_tokenizer, write_tokenizer
from tests.lora_jax.io import gguf_files
from tests.lora_jax.io.gguf_files import TOKENIZER_KEYS, TOKENS, changed

transformers = pytest.importorskip("transformers")


def tokenizer_file(tmp_path, **changes):
    keys = changed(TOKENIZER_KEYS, **changes)
    return gguf_files.write(tmp_path / "t.gguf", {}, gguf_files.LLAMA_KEYS, tokenizer=keys)


def pieces(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        pytest.param("gpt-2", "hello 12", ["hello", "Ġ", "12"], id="gpt2-keeps-numbers"),
        pytest.param("smollm", "hello 12", ["hello", "Ġ", "1", "2"], id="smollm-cuts-digits"),
        pytest.param("qwen2", "12 hello", ["1", "2", "Ġhello"], id="qwen2-cuts-digits"),
        pytest.param("llama-bpe", "1212", ["<|im_start|>", "12", "1", "2"], id="llama3-by-three"),
        pytest.param("qwen2", "e\u0301", ["Ã", "©"], id="qwen2-composes"),
        pytest.param("gpt-2", "e\u0301", ["e", "Ì", "ģ"], id="gpt2-does-not"),
        pytest.param("gpt-2", "x<|im_end|>hello", ["x", "<|im_end|>", "hello"], id="special"),
    ],
)
def test_text_is_cut_as_the_published_tokenizer_does(tmp_path, pre, text, expected):
    tokenizer = load_tokenizer(tokenizer_file(tmp_path, pre=pre, add_bos_token=None))
    assert pieces(tokenizer, text) == expected


def test_every_text_comes_back(tmp_path):
    tokenizer = load_tokenizer(tokenizer_file(tmp_path))
    for text in ("hello  hello\n\n\t1234", "naïve — 東京 🎉", " '\"<|im_start|>user\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_have_their_roles(tmp_path):
    tokenizer = load_tokenizer(tokenizer_file(tmp_path))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert (tokenizer.unk_token_id, tokenizer.pad_token_id) == (0, 2)
    assert tokenizer.model_max_length == 128
    ids = tokenizer("<|im_start|>hello<|im_end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello"


def test_eos_pads_where_no_token_does(tmp_path):
    tokenizer = load_tokenizer(tokenizer_file(tmp_path, padding_token_id=None))
    assert tokenizer.pad_token_id == 2


@pytest.mark.parametrize(
    ("ends", "single", "pair"),
    [
        pytest.param({}, "x", "xy", id="neither"),
        pytest.param({"add_bos_token": True}, "<x", "<x<y", id="bos"),
        pytest.param({"add_eos_token": True}, "x>", "x>y>", id="eos"),
        pytest.param({"add_bos_token": True, "add_eos_token": True}, "<x>", "<x><y>", id="both"),
    ],
)
def test_ends_are_added_as_the_file_says(tmp_path, ends, single, pair):
    tokenizer = load_tokenizer(tokenizer_file(tmp_path, **ends))
    short = {1: "<", 2: ">"} | {TOKENS.index(letter): letter for letter in "xy"}
    assert "".join(short[i] for i in tokenizer("x")["input_ids"]) == single
    assert "".join(short[i] for i in tokenizer("x", "y")["input_ids"]) == pair


def test_the_written_tokenizer_is_the_same(tmp_path):
    file = tokenizer_file(tmp_path, add_bos_token=True)
    ours = load_tokenizer(file)
    directory = tmp_path / "written"
    directory.mkdir()
    write_tokenizer(file, directory)
    written = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    text = "hello 1234 <|im_start|>"
    assert written(text)["input_ids"] == ours(text)["input_ids"]
    assert written.chat_template == ours.chat_template == gguf_files.CHAT
    assert written.special_tokens_map == ours.special_tokens_map
    assert (written.model_max_length, len(written)) == (128, len(TOKENS))


def test_a_chat_is_written_by_the_file_s_template(tmp_path):
    pytest.importorskip("jinja2")
    tokenizer = load_tokenizer(tokenizer_file(tmp_path))
    messages = [{"role": "user", "content": "hello"}]
    written = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert written == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        pytest.param({"model": "llama"}, "only 'gpt2', byte-level BPE", id="sentencepiece"),
        pytest.param({"model": None}, "'tokenizer.ggml.model' is None", id="none"),
        pytest.param({"pre": "smolm"}, "'smolm'; the nearest is 'smollm'", id="pre-tokenizer"),
        pytest.param({"pre": None}, "'tokenizer.ggml.pre' is None", id="no-pre-tokenizer"),
        pytest.param({"pre": ["gpt2"]}, r"'tokenizer.ggml.pre' is \['gpt2'\]", id="pre-list"),
        pytest.param({"add_space_prefix": True}, "must be false", id="space"),
        pytest.param({"charsmap": "x"}, "'tokenizer.ggml.charsmap' is unknown", id="unknown"),
        pytest.param({"tokens": None}, "tokens' must be a list", id="no-tokens"),
        pytest.param({"tokens": 7, "token_type": None}, "tokens' must be a list", id="a-number"),
        pytest.param({"tokens": ["a", "a"]}, "has a token twice", id="token-twice"),
        pytest.param({"token_type": [1]}, "must have one number a token", id="types"),
        pytest.param({"merges": ["h q"]}, "'h q' is not of two tokens", id="merge"),
        pytest.param({"merges": ["h"]}, "'h' is not of two tokens", id="no-pair"),
        pytest.param({"bos_token_id": 999}, "is 999, of 265 tokens", id="id"),
        pytest.param({"add_bos_token": 1}, "must be true or false", id="bool"),
        pytest.param(
            {"add_bos_token": True, "bos_token_id": None}, "adds bos to a text", id="bos-unnamed"
        ),
    ],
)
def test_a_tokenizer_that_is_not_known_is_refused(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        load_tokenizer(tokenizer_file(tmp_path, **changes))
