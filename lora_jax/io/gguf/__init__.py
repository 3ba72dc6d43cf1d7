"""GGUF files: a model in one file, most of its weights in blocks of a few bits.

config_json = read_config_json(file)          # what the published config.json says
weights = find_tensors(file)                  # the published names; .read() gives float32
tokenizer = load_tokenizer(file)
"""

from ._file import (
    GgufTensor as GgufTensor,
    find_tensors as find_tensors,
    read_config_json as read_config_json,
)
from ._tokenizer import load_tokenizer as load_tokenizer, write_tokenizer as write_tokenizer
