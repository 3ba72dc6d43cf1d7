"""The comparison as Markdown: a row for each method, then what each wrote."""

from typing import Any

from train.scores import LABELS

NAMES = {"base": "base", "lora": "LoRA", "full": "full fine-tuning"}


def markdown(results: dict[str, Any]) -> str:
    """Both tables and the samples, from the contents of ``results.json``."""
    methods: dict[str, Any] = results["methods"]
    quality = [_scores(name, found) for name, found in methods.items()]
    price = [_price(name, found) for name, found in methods.items()]
    memory = ["LAMBADA accuracy", "LAMBADA perplexity", "WikiText-2 perplexity"]
    return "\n".join(
        [
            *_table(["method", *LABELS.values(), *memory], quality),
            "",
            *_table(["method", "trained parameters", "saved", "seconds a step", "steps"], price),
            "",
            *_samples(methods),
        ]
    )


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]


def _scores(name: str, found: dict[str, Any]) -> list[str]:
    scores = found["scores"]
    return [
        NAMES[name],
        *(f"{scores[key]:.2f}" for key in LABELS),
        f"{100 * found['lambada']['accuracy']:.2f} %",
        f"{found['lambada']['perplexity']:.2f}",
        f"{found['wikitext']['perplexity']:.2f}",
    ]


def _price(name: str, found: dict[str, Any]) -> list[str]:
    training = found.get("training")
    if training is None:
        return [NAMES[name], *["0", "-", "-", "0"]]
    return [
        NAMES[name],
        f"{training['trained_parameters']:,}",
        f"{training['checkpoint_bytes'] / 1e6:,.2f} MB",
        f"{training['seconds_per_step']:.4f}",
        f"{training['steps']:,}",
    ]


def _samples(methods: dict[str, Any]) -> list[str]:
    lines = []
    for place, first in enumerate(next(iter(methods.values()))["samples"]):
        lines += [f"> {first['prompt']}", ">", f"> a person: {first['reference']}"]
        for name, found in methods.items():
            lines += [">", f"> {NAMES[name]}: {_line(found['samples'][place]['text'])}"]
        lines.append("")
    return lines


def _line(text: str) -> str:
    return " ".join(text.split())
