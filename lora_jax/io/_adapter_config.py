"""``adapter_config.json``: everything explicit when written, everything honoured when read.

PEFT falls back without a word where a field is absent (a scale of ``8 / r``) or narrower than
the file (tensors dropped). So what we write leaves nothing to a default, and what we read is
refused if it says something that we would not do.
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FILE = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TASK_TYPES = {
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "feature-extraction": "FEATURE_EXTRACTION",
    "masked-lm": None,
}

_REQUIRED = {"r": int, "lora_alpha": (int, float)}
_HONOURED = {
    "rank_pattern": dict,
    "alpha_pattern": dict,
    "use_rslora": bool,
    "lora_dropout": (int, float),
    "target_modules": (list, str),
    "exclude_modules": (list, str),
    "layers_to_transform": (list, int),
    "modules_to_save": list,
}
_FIXED = {"peft_type": "LORA", "bias": "none"}
# PiSSA, OLoRA, CorDA and LoftQ change the base weights when they begin.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_HARMLESS = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("peft_version", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
    *("eva_config", "layers_pattern"),
)


def read(directory: Path) -> dict[str, Any]:
    """The fields of an adapter's config that matter, absent ones at their defaults.

    Raises:
        ValueError: The file is absent or malformed, or says something that is not supported;
            all such fields are listed. A field that is unknown and neutral (null, false or
            empty) changes nothing.
    """
    file = directory / FILE
    if not file.is_file():
        raise ValueError(f"{directory} has no {FILE}: it is not an adapter's directory.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold one JSON object.")
    problems = list(_problems(found))
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{file} describes an adapter that is not supported:{listed}")
    neutral = {"rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "lora_dropout": 0.0}
    given = {name: found[name] for name in (*_REQUIRED, *_HONOURED) if found.get(name) is not None}
    return dict.fromkeys(_HONOURED) | neutral | given


def _problems(found: Mapping[str, Any]) -> Iterable[str]:
    for name, kinds in (_REQUIRED | _HONOURED).items():
        value = found.get(name)
        if value is None:
            if name in _REQUIRED:
                yield f"`{name}` is missing: the scale would be a guess."
        elif not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            yield f"`{name}` is {value!r}."
    for name, value in _FIXED.items():
        if found.get(name, value) != value:
            yield f"`{name}` is {found[name]!r}; only {value!r} is supported."
    if found.get("init_lora_weights") not in _PLAIN_STARTS:
        yield (
            f"`init_lora_weights` is {found['init_lora_weights']!r}, which changed the base "
            "weights: convert the adapter to plain LoRA where it was made."
        )
    known = {*_REQUIRED, *_HONOURED, *_FIXED, *_HARMLESS, "init_lora_weights"}
    for name in sorted(found.keys() - known):
        if found[name] not in (None, False, {}, []):
            yield f"`{name}` is {found[name]!r}, which is not supported."


def resolve(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches ``module``, as PEFT resolves it.

    Example:
        >>> resolve({"layer.0.attention.self.query": 2}, "bert.layer.0.attention.self.query", 8)
        2
    """
    matching = (v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module))
    return next(matching, default)


def names_module(names: list[str] | str | None, module: str) -> bool:
    """Whether ``target_modules`` names ``module``: a list of last segments, or one regex."""
    if isinstance(names, str):
        return names == "all-linear" or re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def covering_names(modules: Iterable[str], all_modules: Iterable[str]) -> list[str]:
    """The shortest list for ``target_modules`` that names ``modules`` and nothing else.

    Last segments where they name exactly these among ``all_modules``, else whole names.

    Example:
        >>> covering_names(["a.query", "b.query"], ["a.query", "b.query", "a.key"])
        ['query']
        >>> covering_names(["a.query"], ["a.query", "b.query", "a.key"])
        ['a.query']
    """
    wanted = set(modules)
    last = sorted({module.rpartition(".")[2] for module in wanted})
    if {module for module in all_modules if names_module(last, module)} == wanted:
        return last
    return sorted(wanted)
