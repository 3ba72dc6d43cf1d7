"""``adapter_config.json``: everything explicit when written, everything honoured when read.

PEFT falls back without a word where a field is absent (a scale of ``8 / r``) or narrower than
the file (tensors dropped). So what we write leaves nothing to a default, and what we read is
refused if it says something that we would not do.
"""

import dataclasses
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lora_jax.io._json import read_object
from lora_jax.io.peft import _matching as matching

Value = TypeVar("Value")

FILE = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "token-classification": "TOKEN_CLS",
    "question-answering": "QUESTION_ANS",
    "feature-extraction": "FEATURE_EXTRACTION",
    "masked-lm": None,
}
HEAD_TYPES = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")
"""Task types under which PEFT saves the head in full without being told to."""

MAX_ENTRIES = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The fields of ``adapter_config.json`` that decide what an adapter computes.

    Attributes are named as in the file; an absent field has PEFT's default.
    """

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    use_rslora: bool = False
    lora_dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    fan_in_fan_out: bool = False

    def rank(self, module: str) -> int:
        """The rank of a module's factors."""
        return matching.resolve(self.rank_pattern, module, self.r)

    def alpha(self, module: str) -> float:
        """The numerator of a module's scale."""
        return matching.resolve(self.alpha_pattern, module, self.lora_alpha)

    def saves(self, module: str) -> bool:
        """Whether the module is trained in full."""
        return matching.saves_module(self.modules_to_save or (), module)

    def targets(self, module: str) -> bool:
        """Whether the module is adapted. ``"all-linear"`` is asked of matrices that may be."""
        if self.saves(module) or matching.names_module(self.exclude_modules, module):
            return False
        if self.target_modules == "all-linear":
            return True
        if isinstance(self.target_modules, list) and module in self.target_modules:
            return True  # named in full: `layers_to_transform` is not asked
        layers, patterns = self.layers_to_transform, self.layers_pattern or []
        layers = [layers] if isinstance(layers, int) else layers
        patterns = [patterns] if isinstance(patterns, str) else patterns
        named = matching.names_module(self.target_modules, module)
        return named and (not layers or matching.in_layers(module, layers, patterns))


class _Kind(NamedTuple):
    """What a field must be, in words and as a check."""

    words: str
    fits: Callable[[Any], bool]


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and 0 < value <= sys.float_info.max


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _all(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, list) and all(map(kind, values))


def _table(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda table: isinstance(table, dict) and all(map(kind, table.values()))


_RANK = _Kind("an integer of at least 1", _is_rank)
_ALPHA = _Kind("a number above 0", _is_alpha)
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_NAMES = _Kind("a list of names", _all(_is_name))
_NAME_OR_NAMES = _Kind("a list of names or one", lambda v: _is_name(v) or _NAMES.fits(v))

_REQUIRED = {"r": _RANK, "lora_alpha": _ALPHA}
_HONOURED = {
    "rank_pattern": _Kind("an object of integers of at least 1", _table(_is_rank)),
    "alpha_pattern": _Kind("an object of numbers above 0", _table(_is_alpha)),
    "use_rslora": _FLAG,
    "lora_dropout": _Kind("a number in [0, 1)", lambda v: _is_number(v) and 0 <= v < 1),
    "target_modules": _NAME_OR_NAMES,
    "exclude_modules": _NAME_OR_NAMES,
    "layers_to_transform": _Kind(
        "a list of integers or one", lambda v: _is_index(v) or _all(_is_index)(v)
    ),
    "layers_pattern": _NAME_OR_NAMES,
    "modules_to_save": _NAMES,
    "bias": _Kind("'none', 'all' or 'lora_only'", lambda v: v in ("none", "all", "lora_only")),
    "fan_in_fan_out": _FLAG,
}
# PiSSA, OLoRA, CorDA, LoftQ and the like change the base weights when they begin.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_HARMLESS = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("peft_version", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
    *("eva_config", "init_lora_weights", "peft_type"),
)
_NOT_YET = {
    "use_dora": "DoRA (a magnitude for each output)",
    "target_parameters": "factors of a parameter that is no module's, such as experts",
    "trainable_token_indices": "training single rows of an embedding",
    "lora_bias": "a bias in lora_B",
    "layer_replication": "layers that occur several times",
    "alora_invocation_tokens": "factors that wait for a token",
}


def read(directory: Path) -> AdapterConfig:
    """Reads an adapter's config.

    Raises:
        ValueError: The file is absent, too large or malformed, or says something that is not
            supported; all such fields are listed. A field that is unknown and neutral (null,
            false or empty) changes nothing.
    """
    found, file = read_fields(directory), directory / FILE
    problems = list(_problems(found))
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{file} describes an adapter that is not supported:{listed}")
    known = (*_REQUIRED, *_HONOURED)
    return AdapterConfig(**{name: found[name] for name in known if found.get(name) is not None})


def read_fields(directory: Path) -> dict[str, Any]:
    """The fields of an adapter's config as they stand there.

    Raises:
        ValueError: The file is absent, too large or malformed.
    """
    file = directory / FILE
    if not file.is_file():
        raise ValueError(f"{directory} has no {FILE}: it is not an adapter's directory.")
    return read_object(file)


def _problems(found: Mapping[str, Any]) -> Iterable[str]:
    if found.get("peft_type", "LORA") != "LORA":
        yield f"`peft_type` is {_short(found['peft_type'])}; only 'LORA' is supported."
    for name, kind in (_REQUIRED | _HONOURED).items():
        value = found.get(name)
        if value is None and name in _REQUIRED:
            yield f"`{name}` is missing: the scale would be a guess."
        elif value is not None and not kind.fits(value):
            yield f"`{name}` is {_short(value)}; it must be {kind.words}."
        elif isinstance(value, list | dict) and len(value) > MAX_ENTRIES:
            yield f"`{name}` has {len(value)} entries, more than {MAX_ENTRIES}."
        else:
            yield from _faults(name, value)
    start = found.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        yield (
            f"`init_lora_weights` is {_short(start)}, which changed the base weights: convert "
            "the adapter to plain LoRA where it was made."
        )
    for name in sorted(found.keys() - {*_REQUIRED, *_HONOURED, *_HARMLESS}):
        if found[name] not in (None, False, {}, []):
            what = f": {_NOT_YET[name]}" if name in _NOT_YET else ""
            yield f"`{name}` is {_short(found[name])}, which is not supported{what}."


def _faults(name: str, value: Any) -> Iterable[str]:
    """What is wrong with the regular expressions of a field, if it holds any."""
    ends = name in ("rank_pattern", "alpha_pattern", "layers_pattern")
    whole = name in ("target_modules", "exclude_modules") and _is_name(value)
    if ends or whole:
        for pattern in [value] if isinstance(value, str) else value or ():
            if fault := matching.fault(pattern, whole=whole):
                yield f"`{name}` has {_short(pattern)}, which {fault}."


def commonest(values: Iterable[Value]) -> Value:
    """The value that occurs most often; the first of several."""
    return Counter(values).most_common(1)[0][0]


def tidy(value: float, digits: int) -> float:
    """Without the rounding of ``alpha / rank * rank``, and whole numbers as such."""
    value = float(f"{value:.{digits}g}")
    return int(value) if value.is_integer() else value


def _short(value: Any) -> str:
    """A value for a message, cut where it is long or deep."""
    cut = reprlib.Repr()
    cut.maxstring = 200
    return cut.repr(value)
