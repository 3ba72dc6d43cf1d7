"""BLEU: the geometric mean of clipped n-gram precisions, times a brevity penalty."""

from collections.abc import Sequence
from itertools import zip_longest

from ._packages import load


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 in percent (Papineni et al., ACL 2002), by sacrebleu.

    Tokens are those of ``mteval-v13a`` without regard to case, the brevity penalty takes the
    reference closest in length: ``sacrebleu --lowercase``, and the E2E scripts' convention.
    Deviation: orders without any match are smoothed as sacrebleu does (``exp``).

    Args:
        hypotheses: The generated texts.
        references: The references of each; see `nlg_scores`.
    """
    metric = load("sacrebleu.metrics.bleu").BLEU(lowercase=True, tokenize="13a", force=True)
    streams = list(zip_longest(*references))  # None where an input has fewer references
    return float(metric.corpus_score(list(hypotheses), streams).score)
