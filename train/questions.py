"""What to ask a model of its evaluation rows, and how good its answers are.

Rows with the same prompt are one question, and their completions are its references: E2E has
several sentences for each meaning, and BLEU is meant for several references.
"""

from collections.abc import Sequence
from typing import NamedTuple

from .tokens import Tokens

LONGEST = 600  # characters of a text in the report


class Question(NamedTuple):
    """A prompt, as token ids, and the answers that are known to it; none of a plain text."""

    prompt: tuple[int, ...]
    references: tuple[str, ...]


def questions(examples: Sequence[Tokens]) -> list[Question]:
    """The different prompts of some examples, in the order in which they first come.

    An example whose prompt was cut off, or that has none, asks nothing.
    """
    found: dict[tuple[int, ...], list[str]] = {}
    for one in examples:
        if 0 < one.prompt < len(one.ids):
            references = found.setdefault(tuple(one.ids[: one.prompt].tolist()), [])
            references.extend(filter(None, [one.answer]))
    return [Question(prompt, tuple(references)) for prompt, references in found.items()]


def scored(asked: Sequence[Question], texts: Sequence[str]) -> dict[str, float]:
    """Scores of what was written to the questions that have references, and their number."""
    pairs = [(text, q) for q, text in zip(asked, texts, strict=True) if q.references]
    if not pairs:
        return {}
    from .scores import nlg_scores

    found = nlg_scores([text for text, _ in pairs], [list(q.references) for _, q in pairs])
    return {**found, "prompts": len(pairs)}


def clip(text: str) -> str:
    """A text's beginning.

    >>> clip("a" * 700)[-3:], len(clip("a" * 700))
    ('aa…', 601)
    """
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"
