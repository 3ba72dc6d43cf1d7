"""The comparison as Markdown: a row for each base."""

from typing import Any

FIGURES = {
    "before": "perplexity before",
    "after": "after tuning",
    "after, on the original": "its adapter on the bfloat16 base",
}


def markdown(results: dict[str, Any]) -> str:
    """The table, and a line on what it is of, from the contents of ``results.json``."""
    header = ["base", "weights held", *FIGURES.values(), "seconds a step"]
    rows = [_row(name, found) for name, found in results["bases"].items()]
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]
    return "\n".join([*lines, "", _about(results)])


def _row(name: str, found: dict[str, Any]) -> list[str]:
    training = found["training"]
    return [
        name,
        f"{training['weight_bytes'] / 1e6:.1f} MB",
        *(f"{found[name]['perplexity']:.4f}" if name in found else "-" for name in FIGURES),
        f"{training['seconds_per_step']:.3f}",
    ]


def _about(results: dict[str, Any]) -> str:
    found = next(iter(results["bases"].values()))
    return (
        f"{results['model']}; perplexity over {found['before']['tokens']:,} tokens of WikiText-2's "
        f"test text in windows of {results['window']}, tuned for {found['training']['steps']} "
        f"steps on its validation text; {results['device']}, jax {results['jax']}."
    )
