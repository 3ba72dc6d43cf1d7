"""A checkpoint of zeros: a file with a header and a hole, for peers that load from a directory.

The hole takes no room on the disk and no time to write, at any size; weights are drawn after
loading (`weights.fill`).
"""

import json
import struct
from pathlib import Path

import torch
import transformers

WORDS = ("<pad>", "<s>", "</s>", "<unk>")  # the whole vocabulary of its tokenizer


def write_zeros(config: transformers.PreTrainedConfig, directory: Path) -> None:
    """Writes config, tokenizer and bfloat16 weights of a decoder.

    Args:
        config: Of the model.
        directory: Exists, and is empty.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.config.save_pretrained(directory)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        if name not in tied:
            begin, end = end, end + 2 * tensor.numel()
            fields = {"dtype": "BF16", "shape": list(tensor.shape)}
            header[name] = fields | {"data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns its data
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    write_tokenizer(directory)


def write_tokenizer(directory: Path) -> None:
    """A tokenizer of four words: Unsloth loads one, and a step uses none."""
    from tokenizers import Tokenizer, models

    words = {word: number for number, word in enumerate(WORDS)}
    pad, begin, end, unknown = WORDS
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token=unknown)),
        pad_token=pad,
        bos_token=begin,
        eos_token=end,
        unk_token=unknown,
    ).save_pretrained(directory)
