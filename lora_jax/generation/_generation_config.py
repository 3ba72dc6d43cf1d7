"""The generation settings that a checkpoint comes with, as ``GenerationOptions``.

    {"do_sample": true, "temperature": 0.6}   ->   GenerationOptions(temperature=0.6, top_k=50)

A field is honoured, harmless, allowed at the one value that changes nothing, or refused by name.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..io._json import read_object
from ..io.hub import GENERATION_CONFIG
from ._options import GenerationOptions, listed

_SAME_NAME = frozenset(field.name for field in dataclasses.fields(GenerationOptions))
_HARMLESS = frozenset(
    (
        *("_from_model_config", "transformers_version", "_commit_hash", "bos_token_id"),
        *("use_cache", "return_dict_in_generate", "output_scores", "output_logits"),
        *("output_attentions", "output_hidden_states", "cache_implementation"),
    )
)
_ONLY: dict[str, Any] = {
    "early_stopping": False,
    "num_return_sequences": 1,
    "min_length": 0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
}
_DEFAULT_TOP_K = 50  # of transformers, where a checkpoint samples and does not say


def read_options(directory: str | os.PathLike, **changes: Any) -> GenerationOptions:
    """The generation settings that a checkpoint comes with.

    `generate` never reads them by itself.

    Args:
        directory: The checkpoint, with its ``generation_config.json``.
        **changes: Options that override the file's, by their names in `GenerationOptions`. A
            ``max_length`` in the file, which counts the prompt, gives way to
            ``max_new_tokens``; without that it is refused.

    Raises:
        ValueError: There is no such file, it has fields that are not honoured, or its values
            cannot be used (all listed).
    """
    path = Path(directory) / GENERATION_CONFIG
    try:
        found = read_object(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error} Give the options yourself.") from None
    stated = {name: value for name, value in found.items() if value is not None}
    if problems := list(_not_honoured(stated, changes)):
        raise ValueError(listed(f"{path} asks for what is not supported", problems))
    try:
        return GenerationOptions(**(_translated(stated) | changes))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _not_honoured(stated: Mapping[str, Any], changes: Mapping[str, Any]) -> Iterable[str]:
    for name, value in stated.items():
        if name in _ONLY:
            if value != _ONLY[name]:
                yield f"`{name}` is {value!r}; only {_ONLY[name]!r} is supported."
        elif name == "max_length":
            if "max_new_tokens" not in {*stated, *changes}:
                yield f"`max_length` is {value!r} and counts the prompt: give `max_new_tokens`."
        elif name not in _SAME_NAME | _HARMLESS | {"do_sample"}:
            yield f"`{name}` is unknown; remove it if it changes nothing."
    for name in changes:
        if name not in _SAME_NAME:
            yield f"`{name}` is no option of ours; known: {', '.join(sorted(_SAME_NAME))}."


def _translated(stated: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in stated.items() if name in _SAME_NAME}
    if stated.get("do_sample"):
        return {"temperature": 1.0, "top_k": _DEFAULT_TOP_K} | options
    # The field means nothing where nothing is sampled, and its usual value there is 1.
    if options.get("temperature") == 1.0:
        del options["temperature"]
    elif "temperature" in options:
        raise ValueError("`temperature` is set and `do_sample` is not: give `temperature`.")
    return options
