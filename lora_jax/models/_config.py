"""Reading ``config.json``: every field is honoured, harmless, or refused by name.

A field that is skipped without a word is how a model loads and computes something else. So a
family states three lists: the fields of its dataclass, the fields that may have one value
only, and the fields that change nothing.
"""

import dataclasses
import difflib
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

Config = TypeVar("Config")

MAX_SIZE = 2**31 - 1  # of an axis
MAX_LAYERS = 1_000
MAX_LABELS = 100_000  # a head of that many may be drawn, with no file that has as much
LIMITS = {"num_hidden_layers": MAX_LAYERS, "n_layer": MAX_LAYERS, "num_labels": MAX_LABELS}

BOOKKEEPING = frozenset(
    (
        *("_name_or_path", "architectures", "model_type", "transformers_version", "language"),
        *("_attn_implementation_autoset", "_attn_implementation", "attn_implementation"),
        *("torch_dtype", "dtype", "use_bfloat16", "torchscript", "xla_device", "tf_legacy_loss"),
        *("id2label", "label2id", "num_labels", "_num_labels", "finetuning_task"),
        *("problem_type", "task_specific_params", "tokenizer_class", "gradient_checkpointing"),
        *("use_cache", "output_past", "output_attentions", "output_hidden_states"),
        *("return_dict", "return_dict_in_generate", "chunk_size_feed_forward", "prefix"),
        *("bos_token_id", "eos_token_id", "eos_token_ids", "cls_token_id", "sep_token_id"),
        *("unk_token_id", "mask_token_id", "decoder_start_token_id", "tie_encoder_decoder"),
        *("do_sample", "early_stopping", "max_length", "min_length", "num_beams", "top_k"),
        *("num_return_sequences", "length_penalty", "repetition_penalty", "temperature"),
        *("top_p", "no_repeat_ngram_size", "bad_words_ids", "num_beam_groups"),
        *("diversity_penalty", "encoder_no_repeat_ngram_size", "forced_bos_token_id"),
        *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty"),
        *("suppress_tokens", "begin_suppress_tokens", "typical_p", "output_scores"),
    )
)
"""Fields that every family may carry and that change no logit of an encoder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """The fields that a family knows.

    Attributes:
        config: Its frozen dataclass, whose field names are those of ``config.json``.
        fixed: Fields that may have this value only.
        ignored: Further harmless fields.
    """

    config: type
    fixed: Mapping[str, Any]
    ignored: tuple[str, ...] = ()


def read_fields(fields: Fields, found: Mapping[str, Any], *, num_labels: int | None) -> Any:
    """Makes the family's dataclass of a ``config.json``.

    Args:
        fields: What the family knows.
        found: The file as a dictionary.
        num_labels: Overrides what the file says; None reads ``id2label`` or ``num_labels``. A
            family whose dataclass has no such field has no labels, and ignores it.

    Raises:
        ValueError: All problems in one list: fields missing, unknown, of the wrong type, too
            large, or fixed at another value.
    """
    known = {f.name: f for f in dataclasses.fields(fields.config)}
    used = {name: value for name, value in found.items() if name in known}
    if "num_labels" in known:
        used["num_labels"] = _num_labels(found) if num_labels is None else num_labels
    problems = [
        *_without_labels(found),
        *_missing(known, used),
        *_of_wrong_type(fields.config, used),
        *_too_large(used),
        *_fixed_elsewhere(fields.fixed, found),
        *_unknown(found, {*known, *fields.fixed, *fields.ignored, *BOOKKEEPING}),
    ]
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"config.json describes a model that this one is not:{listed}")
    return fields.config(**used)


def check_at_least_one(config: Any, names: Iterable[str]) -> None:
    """Refuses sizes below 1; None is left to mean what the config says.

    Raises:
        ValueError: A field of ``names`` is below 1.
    """
    for name in names:
        size = getattr(config, name)
        if size is not None and size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}.")


def check_known(config: Any, name: str, known: Collection[str]) -> None:
    """Refuses a name that nothing goes by.

    Raises:
        ValueError: The field ``name`` is none of ``known``.
    """
    if getattr(config, name) not in known:
        raise ValueError(
            f"`{name}` {getattr(config, name)!r:.80} is not supported; known: {list(known)}."
        )


def check_rates(config: Any, names: Iterable[str]) -> None:
    """Refuses rates of dropout outside ``[0, 1)``; None is left to mean what the config says.

    Raises:
        ValueError: A field of ``names`` is not a rate.
    """
    for name in names:
        rate = getattr(config, name)
        if rate is not None and not 0.0 <= rate < 1.0:
            raise ValueError(f"`{name}` must be in [0, 1), got {rate}.")


def _num_labels(found: Mapping[str, Any]) -> Any:
    labels = found.get("id2label")
    if labels and isinstance(labels, dict):
        return len(labels)
    return found.get("num_labels", found.get("_num_labels", 2))


def _without_labels(found: Mapping[str, Any]) -> list[str]:
    labels = found.get("id2label")
    fits = isinstance(labels, dict | None)
    return [] if fits else [f"`id2label` must be an object, got {labels!r:.80}."]


def _missing(known: Mapping[str, dataclasses.Field], used: Mapping[str, Any]) -> list[str]:
    needed = (n for n, f in known.items() if f.default is dataclasses.MISSING)
    return [f"`{name}` is missing." for name in needed if name not in used]


def _of_wrong_type(config: type, used: Mapping[str, Any]) -> list[str]:
    hints = typing.get_type_hints(config)
    return [
        f"`{name}` must be {_spell(hints[name])}, got {value!r:.80}."
        for name, value in used.items()
        if not _fits(value, hints[name])
    ]


def _too_large(used: Mapping[str, Any]) -> list[str]:
    """Sizes that no model has, and that would fill the memory before any tensor is looked at."""
    return [
        f"`{name}` must be at most {LIMITS.get(name, MAX_SIZE)}, got {value!s:.80}."
        for name, value in used.items()
        if isinstance(value, int) and value > LIMITS.get(name, MAX_SIZE)
    ]


def _fits(value: Any, hint: Any) -> bool:
    kinds = typing.get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def _spell(hint: Any) -> str:
    kinds = typing.get_args(hint) or (hint,)
    return " or ".join("null" if k is type(None) else k.__name__ for k in kinds)


def _fixed_elsewhere(fixed: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    return [
        f"`{name}` is {found[name]!r:.80}; only {value!r} is supported."
        for name, value in fixed.items()
        if name in found and found[name] != value
    ]


def _unknown(found: Mapping[str, Any], known: set[str]) -> list[str]:
    problems = []
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else ""
            problems.append(
                f"`{name}` is unknown.{hint} Remove it from config.json if it changes nothing."
            )
    return problems
