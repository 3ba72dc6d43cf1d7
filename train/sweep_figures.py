"""A member's own figures, out of those of the steps that members took together.

pending: (step, who took it, {name: values, in their order}) of each step
"""

from typing import Any

from . import finetune


def figures_of(pending: list[Any], member: int) -> list[dict[str, Any]]:
    """One member's figures, a row for each step."""
    return [
        {"step": step, **{name: own[chosen.index(member)] for name, own in figures.items()}}
        for step, chosen, figures in pending
        if member in chosen
    ]


def until_stopped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows up to the first that is not finite, and that one."""
    stop = next((at for at, row in enumerate(rows) if not finetune.is_finite(row)), len(rows))
    return rows[: stop + 1]
