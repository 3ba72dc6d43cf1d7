"""The card: ``README.md`` of an adapter, with its facts and code that loads it.

Its head is what the hub reads. A base model is named by its hub id or not at all: a path means
nothing on another machine. One line of the head repeats the facts as JSON, so that whoever writes
the adapter again can keep them:

    lora_jax: {"evaluation": {"accuracy": 0.875}, "data_hash": "sha256:12ab", "quantize": "nf4"}
"""

import dataclasses
import json
import numbers
import re
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_jax._config import LoraConfig

if TYPE_CHECKING:
    from lora_jax.models import Pretrained

FILE = "README.md"
BASE, ADAPTER = "BASE", "ADAPTER"
"""What stands in the code for a base without a hub id, and for the adapter itself."""

_PACKAGES = ("lora_jax", "jax", "flax")
_KEY = "lora_jax: "
_LONGEST_HEAD = 1 << 20  # characters; the facts stand before the first section


class Facts(NamedTuple):
    """What is known of an adapter beyond its weights.

    Attributes:
        evaluation: Metric to value.
        data_hash: Names the data that it was trained on.
        quantize: The scheme that its base was held in meanwhile; None is full precision.
    """

    evaluation: Mapping[str, float]
    data_hash: str | None
    quantize: str | None = None


class _Task(NamedTuple):
    """What the hub and transformers call a task."""

    pipeline: str
    auto_class: str


_TASKS = {
    "causal-lm": _Task("text-generation", "AutoModelForCausalLM"),
    "sequence-classification": _Task("text-classification", "AutoModelForSequenceClassification"),
    "token-classification": _Task("token-classification", "AutoModelForTokenClassification"),
    "question-answering": _Task("question-answering", "AutoModelForQuestionAnswering"),
    "masked-lm": _Task("fill-mask", "AutoModelForMaskedLM"),
    "feature-extraction": _Task("feature-extraction", "AutoModel"),
}


def card(
    config: LoraConfig,
    model: "Pretrained",
    fields: Mapping[str, Any],
    facts: Facts,
    notes: Iterable[str],
) -> str:
    """The text of the card.

    Args:
        config: What was trained.
        model: The model it was trained on.
        fields: ``adapter_config.json``.
        facts: What is known of the adapter.
        notes: What a user of the adapter has to know.

    Raises:
        ValueError: A metric is no name with a number, or ``data_hash`` or ``quantize`` is not
            one line.
    """
    _check(*facts)
    base_model = fields["base_model_name_or_path"]
    sections = [
        _front_matter(base_model, _TASKS[model.task].pipeline, facts),
        _title(base_model, model),
        _evaluation(facts.evaluation),
        _code(model, base_model or BASE, fields["revision"]),
        _precision(facts.quantize),
        *notes,
        _training(config, facts.data_hash),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def read_facts(directory: Path) -> Facts:
    """The facts at the head of an adapter's card; none where the card is not ours.

    Raises:
        ValueError: The line of the facts is malformed.
    """
    file = directory / FILE
    text = ""
    if file.is_file():
        with file.open(encoding="utf-8", errors="replace") as opened:
            text = opened.read(_LONGEST_HEAD)
    head = text.partition("\n---\n")[0].split("\n") if text.startswith("---\n") else []
    lines = [line.removeprefix(_KEY) for line in head if line.startswith(_KEY)]
    if not lines:
        return Facts({}, None)
    try:
        facts = Facts(**json.loads("".join(lines), parse_int=float))
        _check(*facts)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"The facts at the head of {file} are malformed: {error}") from None
    return facts


def _check(evaluation: Mapping[str, float], data_hash: str | None, quantize: str | None) -> None:
    for metric, value in evaluation.items():
        is_name = isinstance(metric, str) and re.fullmatch(r"[^\n|`<>]+", metric)
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (is_name and is_number):
            raise ValueError(f"`evaluation` must give names numbers, got {metric!r}: {value!r}.")
    if data_hash is not None and not re.fullmatch(r"[\w.:+=/ -]+", data_hash):
        raise ValueError(f"`data_hash` must be one line of a hash, got {data_hash!r}.")
    if quantize is not None and not re.fullmatch(r"\w+", quantize):
        raise ValueError(f"`quantize` must be the name of a scheme, got {quantize!r}.")


def _front_matter(base_model: str | None, pipeline: str, facts: Facts) -> str:
    base = [f"base_model: {base_model}"] if base_model else []
    library = ["library_name: peft", f"pipeline_tag: {pipeline}"]
    tags = ["tags:", "- lora", "- lora_jax", "- transformers"]
    return "\n".join(["---", *base, *library, *tags, *_fact_line(facts), "---"])


def _fact_line(facts: Facts) -> list[str]:
    """The facts as one line of JSON, which is YAML too; nothing where there are none."""
    if not any(facts):
        return []
    evaluation = {metric: float(value) for metric, value in facts.evaluation.items()}
    known = facts._asdict() | {"evaluation": evaluation}
    return [_KEY + json.dumps(known, ensure_ascii=False)]


def _title(base_model: str | None, model: "Pretrained") -> str:
    of = f"`{base_model}`" if base_model else f"a model of type `{model.config_json['model_type']}`"
    return f"# LoRA adapter\n\nAn adapter of {of} for {model.task}, trained with lora_jax."


def _evaluation(evaluation: Mapping[str, float]) -> str:
    if not evaluation:
        return ""
    rows = [f"| {metric} | {value:.6g} |" for metric, value in evaluation.items()]
    return "\n".join(["## Evaluation", "", "| metric | value |", "|---|---|", *rows])


def _precision(quantize: str | None) -> str:
    if quantize is None:
        return ""
    return (
        f"It was trained on the base quantised to {quantize} "
        f"(`from_pretrained(..., quantize={json.dumps(quantize)})`). It runs on the base in either "
        "precision; the code above merges it into the original one."
    )


def _code(model: "Pretrained", base: str, revision: str | None) -> str:
    labels = f", num_labels={model.config.num_labels}" if "classification" in model.task else ""
    auto_class = _TASKS[model.task].auto_class
    head = ", new_head=True" if model.new else ""
    at = f", revision={json.dumps(revision)}" if revision else ""
    where = f"BASE = {json.dumps(base)}\nADAPTER = {json.dumps(ADAPTER)}"
    lines = [
        "## Loading",
        "",
        "`ADAPTER` is this directory (for PEFT, its hub id too)"
        + (", `BASE` the base model's." if base == BASE else "."),
        "",
        "With PEFT:",
        "",
        "```python",
        "from peft import PeftModel",
        f"from transformers import {auto_class}",
        "",
        where,
        f"base = {auto_class}.from_pretrained(BASE{at}{labels})",
        "model = PeftModel.from_pretrained(base, ADAPTER).eval()",
        "```",
        "",
        "With lora_jax:",
        "",
        "```python",
        "import lora_jax",
        "from lora_jax.models import from_pretrained",
        "",
        where,
        f"model = from_pretrained(BASE, {json.dumps(model.task)}{at}{labels}{head})",
        "frozen, trainable, config = lora_jax.load_adapter(ADAPTER, model)",
        "params = lora_jax.merge(frozen, trainable)  # then: model.apply(params, input_ids)",
        "```",
    ]
    return "\n".join(lines)


def _training(config: LoraConfig, data_hash: str | None) -> str:
    chosen = json.dumps(dataclasses.asdict(config), indent=2).replace("`", "\\u0060")
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    data = [f"Data: `{data_hash}`", ""] if data_hash else []
    return "\n".join(
        ["## Training", "", *data, f"Versions: {versions}", "", "```json", chosen, "```"]
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed as a package)"
