"""The tokenizer that belongs to a checkpoint, wherever the checkpoint is.

directory            its own tokenizer files
file or package      the vocabulary inside the GGUF file
hub id               the tokenizer files of the hub, or of its local cache
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import gguf, hub
from ._json import read_object

VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""A directory without any of these has no tokenizer, whatever else it holds."""

CONFIG = "tokenizer_config.json"
_NAME_FILES_TOO = ("vocab", "merges", "source_spm", "target_spm")
_NOT_OVERRIDDEN = ("fast_tokenizer_files", "init_inputs")
_WHY = "the directory says which files there are"
MAX_BYTES = 256 << 20  # of a file; the tokenizer.json of a vocabulary of 262,144 has 33 MB


def load_tokenizer(source: str | os.PathLike, *, revision: str | None = None) -> Any:
    """Loads a checkpoint's tokenizer with the transformers library.

    One without a padding token, as most decoders', pads with its eos token: padding is masked,
    so which token it is changes nothing.

    Args:
        source: Anything that `lora_jax.io.hub.find_checkpoint` finds.
        revision: Branch, tag or commit on the hub.

    Raises:
        ValueError: There is none, it cannot pad, or transformers is not installed.
    """
    # transformers says on import that it found no PyTorch; its models are not used here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    found = hub.find_checkpoint(source, revision=revision, weights=False)
    tokenizer = gguf.load_tokenizer(found) if found.is_file() else _from_directory(found)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"The tokenizer of {source} has neither a padding nor an eos token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def chat_prompt(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Writes a conversation as the tokenizer's chat template does, up to the next answer.

    Args:
        tokenizer: Of `load_tokenizer`.
        messages: ``{"role": "user", "content": "..."}`` and so on.

    Returns:
        Token ids, special tokens included.

    Raises:
        ValueError: The tokenizer has no chat template, or jinja2 is not installed, or the
            template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise ValueError("The tokenizer has no chat template: give plain prompts.")
    try:
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except ImportError as error:
        raise ValueError("A chat template needs jinja2: pip install 'lora_jax[train]'.") from error
    except Exception as error:  # a template is code: it raises what it likes
        raise ValueError(f"The chat template refuses these messages: {error}") from None
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _from_directory(directory: Path) -> Any:
    if not any((directory / name).is_file() for name in VOCABULARIES):
        # transformers would make a tokenizer that knows no word.
        raise ValueError(f"{directory} has no tokenizer: none of {', '.join(VOCABULARIES)}.")
    for name in hub.TOKENIZER_FILES:
        file = directory / name
        if file.is_file() and file.stat().st_size > MAX_BYTES:
            raise ValueError(f"{file} is larger than {MAX_BYTES >> 20} MiB: no tokenizer's is.")
    elsewhere = _files_elsewhere(directory)
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            "A tokenizer is read by transformers: pip install 'lora_jax[train]'."
        ) from error
    try:
        return transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **elsewhere
        )
    except Exception as error:  # a broken file makes transformers raise almost anything
        raise ValueError(f"{directory} has no tokenizer that can be read: {error}") from None


def _files_elsewhere(directory: Path) -> dict[str, None]:
    """The fields of a tokenizer's config that name its files; None lets the directory say.

    transformers 5.0 opens what such a field names, wherever that is. Configs of good faith have
    such fields too: where the files were on the machine that saved them.

    Raises:
        ValueError: The config is malformed, or has a field that cannot be overridden so.
    """
    file = directory / CONFIG
    if not file.is_file():
        return {}
    fields = read_object(file)
    for name in _NOT_OVERRIDDEN:
        if fields.get(name):
            raise ValueError(f"{file}: `{name}` is {fields[name]!r:.200}: remove it, {_WHY}.")
    return {
        name: None
        for name, value in fields.items()
        if isinstance(value, str) and (name.endswith("_file") or name in _NAME_FILES_TOO)
    }
