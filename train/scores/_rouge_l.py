"""ROUGE-L: how long a subsequence a text shares with its references."""

import statistics
from collections.abc import Sequence
from typing import Any

from ._packages import load
from ._tokens import caption_tokens

BETA = 1.2


class CaptionTokenizer:
    """The tokenizer that rouge-score is given in place of its own."""

    def tokenize(self, text: str) -> list[str]:
        """Splits a text into words."""
        return caption_tokens(text)


def rouge_l(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L in percent (Lin, ACL 2004) as MS COCO combines it, by rouge-score.

    rouge-score gives precision and recall against each reference, of lower-cased words without
    punctuation and without stemming. As in COCO's script the best precision and the best
    recall, of whichever references, are combined with ``beta = 1.2`` and averaged over inputs.
    On E2E's test set it is within 0.1 of that script (see `caption_tokens` for why not equal).

    Args:
        hypotheses: The generated texts.
        references: The references of each; see `nlg_scores`.
    """
    module = load("rouge_score.rouge_scorer")
    scorer = module.RougeScorer(["rougeL"], tokenizer=CaptionTokenizer())
    pairs = zip(hypotheses, references, strict=True)
    return 100 * statistics.fmean(_score(scorer, text, texts) for text, texts in pairs)


def _score(scorer: Any, hypothesis: str, references: Sequence[str]) -> float:
    scores = [scorer.score(reference, hypothesis)["rougeL"] for reference in references]
    precision = max(score.precision for score in scores)
    recall = max(score.recall for score in scores)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)
