"""NIST: n-gram precisions in which rare n-grams weigh more.

info(w_1 ... w_n) = log2(count(w_1 ... w_n-1) / count(w_1 ... w_n))     counts over references
NIST = penalty * sum over n of (info of the matched n-grams / n-grams in the hypotheses)
"""

import math
from collections import Counter
from collections.abc import Sequence

from ._tokens import mteval_tokens, ngrams

ORDER = 5
# So that a hypothesis of two thirds of the reference's length scores half.
BETA = math.log(0.5) / math.log(1.5) ** 2


def nist(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus NIST-5 (Doddington, HLT 2002), as the E2E scripts count it.

    Tokens are those of ``mteval-v13a``, lower-cased. As in BLEU, an n-gram matches up to the
    highest count in any one reference; the penalty takes the mean length of the references.
    Our own code: nltk's ``corpus_nist`` instead scores each hypothesis and order against the
    single best reference, which is the same with one reference and lower with several.

    Args:
        hypotheses: The generated texts.
        references: The references of each; see `nlg_scores`.
    """
    systems = [mteval_tokens(text) for text in hypotheses]
    groups = [[mteval_tokens(text) for text in texts] for texts in references]
    written = sum(len(tokens) for group in groups for tokens in group)
    shorter: Counter[tuple[str, ...]] = Counter({(): written})
    total = 0.0
    for n in range(1, ORDER + 1):
        counts = counted(groups, n)
        information, possible = 0.0, 0
        for system, group in zip(systems, groups, strict=True):
            found = ngrams(system, n)
            possible += found.total()
            for ngram, times in matched(found, group, n).items():
                information += times * math.log2(shorter[ngram[:-1]] / counts[ngram])
        total += information / possible if possible else 0.0
        shorter = counts
    expected = sum(sum(map(len, group)) / len(group) for group in groups)
    return total * length_penalty(sum(map(len, systems)) / expected)


def counted(groups: list[list[list[str]]], n: int) -> Counter[tuple[str, ...]]:
    """How often each n-gram occurs in the references, all of them together."""
    counts: Counter[tuple[str, ...]] = Counter()
    for group in groups:
        for tokens in group:
            counts.update(ngrams(tokens, n))
    return counts


def matched(
    found: Counter[tuple[str, ...]], group: list[list[str]], n: int
) -> Counter[tuple[str, ...]]:
    """The n-grams that occur in a reference, each up to its highest count in one of them."""
    allowed: Counter[tuple[str, ...]] = Counter()
    for tokens in group:
        allowed |= ngrams(tokens, n)
    return found & allowed


def length_penalty(ratio: float) -> float:
    """``exp(beta log(ratio)^2)``, one from a ratio of one upwards (Doddington 2002, eq. 3)."""
    if ratio >= 1:
        return 1.0
    return math.exp(BETA * math.log(ratio) ** 2) if ratio > 0 else 0.0
