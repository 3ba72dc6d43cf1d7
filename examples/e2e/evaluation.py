"""Every figure of the comparison: what a model writes for E2E's inputs, and what it still knows.

    figures = evaluate(model, params, tokenizer, exam, decoding)

``params`` are plain or adapted weights, wherever they were trained.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax.generation import GenerationOptions, generate_text
from train.config import DataSection
from train.lm_evaluation import lambada, read_lambada, read_wikitext, text_perplexity
from train.records import Pair, read_records
from train.scores import nlg_scores

WINDOW = 1024  # tokens of WikiText that are read at once
SAMPLES = 3


class Exam(NamedTuple):
    """What every method is asked.

    Attributes:
        prompts: Different meanings, each as training has it before a text.
        references: What people wrote for each.
        passages: LAMBADA's passages.
        text: WikiText-2's test text.
        tokens: How many of its tokens to use; None for all.
    """

    prompts: list[str]
    references: list[list[str]]
    passages: list[str]
    text: str
    tokens: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of each test set is used, from its start; None for all of it."""

    inputs: int | None = None
    passages: int | None = None
    tokens: int | None = None


def read_exam(data: Path, section: DataSection, limits: Limits) -> Exam:
    """Reads the test sets from the folders ``e2e``, ``lambada`` and ``wikitext-2`` of ``data``.

    Args:
        data: Where the folders are.
        section: How the training run reads E2E; its separator stands between meaning and text.
        limits: How much to use.

    Raises:
        ValueError: A file is missing, or is not what it should be.
    """
    grouped: dict[str, list[str]] = {}
    for record in read_records(str(data / "e2e" / "test.txt"), section, has_template=False):
        if isinstance(record, Pair):
            grouped.setdefault(record.prompt, []).append(record.completion.strip())
    return Exam(
        prompts=list(grouped)[: limits.inputs],
        references=list(grouped.values())[: limits.inputs],
        passages=read_lambada(data / "lambada" / "lambada_test.jsonl")[: limits.passages],
        text=read_wikitext(data / "wikitext-2" / "test.txt"),
        tokens=limits.tokens,
    )


def evaluate(
    model: Any,
    params: Any,
    tokenizer: Any,
    exam: Exam,
    decoding: GenerationOptions,
    *,
    batch_size: int,
    batch_tokens: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Asks a model everything.

    Args:
        model: What `from_pretrained` gave for ``"causal-lm"``.
        params: Its weights, plain or adapted.
        tokenizer: Its tokenizer.
        exam: What to ask.
        decoding: How it writes.
        batch_size: Inputs that are written for at once.
        batch_tokens: Tokens of LAMBADA and WikiText that are read at once.
        say: Told what was found, as it is.

    Returns:
        ``scores`` (see `nlg_scores`), ``lambada``, ``wikitext``, ``samples``, ``texts`` (one for
        each prompt) and ``seconds``, as JSON has them.
    """
    started = time.perf_counter()
    texts = generate_text(model, params, tokenizer, exam.prompts, decoding, batch_size=batch_size)
    texts = [text.strip() for text in texts]
    writing = time.perf_counter() - started
    scores = nlg_scores(texts, exam.references)
    say(f"wrote {len(texts)} texts in {writing:.1f} s: {_shown(scores)}")
    started = time.perf_counter()
    words = lambada(model, params, tokenizer, exam.passages, batch_tokens=batch_tokens)._asdict()
    text = text_perplexity(
        model,
        params,
        tokenizer,
        exam.text,
        window=WINDOW,
        limit=exam.tokens,
        batch_tokens=batch_tokens,
    )._asdict()
    reading = time.perf_counter() - started
    say(f"LAMBADA: {_shown(words)}; WikiText-2: {_shown(text)}; read in {reading:.1f} s")
    return {
        "scores": scores,
        "lambada": words,
        "wikitext": text,
        "samples": samples(exam, texts),
        "texts": texts,
        "seconds": {"writing": writing, "reading": reading},
    }


def samples(exam: Exam, texts: Sequence[str]) -> list[dict[str, str]]:
    """Three prompts, spread over the test set, each with a reference and what was written."""
    places = [len(texts) * (2 * n + 1) // (2 * SAMPLES) for n in range(SAMPLES)]
    return [
        {
            "prompt": exam.prompts[place],
            "reference": exam.references[place][0],
            "text": texts[place],
        }
        for place in dict.fromkeys(places)
    ]


def _shown(figures: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
