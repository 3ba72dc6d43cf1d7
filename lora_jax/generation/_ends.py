"""Which tokens end a text: whatever tokenizer, config.json or generation_config.json calls eos.

A chat model often ends its turns with a token that its tokenizer does not call eos.
"""

import dataclasses
from pathlib import Path
from typing import Any

from ..io._json import read_object
from ._generation_config import GENERATION_CONFIG
from ._options import GenerationOptions


def with_tokens_of(model: Any, tokenizer: Any, options: GenerationOptions) -> GenerationOptions:
    """The options, with ends and padding of a model and its tokenizer where they state none.

    Args:
        model: A `lora_jax.models.Pretrained`; any other decoder names no ends of its own.
        tokenizer: Of the transformers library.
        options: What they state is kept.
    """
    changes: dict[str, Any] = {}
    if options.eos_token_id is None and (ends := end_tokens(model, tokenizer)):
        changes["eos_token_id"] = ends
    if options.pad_token_id is None and tokenizer.pad_token_id is not None:
        changes["pad_token_id"] = tokenizer.pad_token_id
    return dataclasses.replace(options, **changes)


def end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end a text, the tokenizer's eos first.

    Raises:
        ValueError: The checkpoint's ``generation_config.json`` is not a JSON object.
    """
    stated = (
        tokenizer.eos_token_id,
        getattr(model, "config_json", {}).get("eos_token_id"),
        _generation_config(getattr(model, "directory", None)).get("eos_token_id"),
    )
    ids = (token for one in stated for token in (one if isinstance(one, list) else [one]))
    return tuple(dict.fromkeys(token for token in ids if token is not None))


def _generation_config(directory: Path | None) -> dict[str, Any]:
    file = None if directory is None else directory / GENERATION_CONFIG
    return {} if file is None or not file.is_file() else read_object(file)
