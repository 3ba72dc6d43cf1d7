"""CIDEr-D: cosine of tf-idf vectors of n-grams, averaged over n = 1 to 4 and over references.

idf(w) = log(inputs / inputs with w in a reference)        g(text)[w] = count(w) idf(w)
sim(h, r) = exp(-(|h| - |r|)^2 / 2 sigma^2)  min(g(h), g(r)) . g(r) / (|g(h)| |g(r)|)
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from ._tokens import caption_tokens, ngrams

ORDER = 4
SIGMA = 6.0

Vector = Mapping[tuple[str, ...], float]


def cider(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D (Vedantam et al., CVPR 2015, section 5), which MS COCO's script calls CIDEr.

    Our own code, since the only kept package runs Java. Words are lower-cased, without
    punctuation and not stemmed; rarity is counted over the given references, so the score
    belongs to the whole set (and is 0 for a single input, where nothing is rare). From 0 to 10,
    as that script scales it. On E2E's test set it is within 0.01 of that script (see
    `caption_tokens` for why not equal).

    Args:
        hypotheses: The generated texts.
        references: The references of each; see `nlg_scores`.
    """
    systems = [caption_tokens(text) for text in hypotheses]
    groups = [[caption_tokens(text) for text in texts] for texts in references]
    scores = [0.0] * len(systems)
    for n in range(1, ORDER + 1):
        rarity = inverse_document_frequency(groups, n)
        for index, (system, group) in enumerate(zip(systems, groups, strict=True)):
            hypothesis = weighted(system, n, rarity, len(groups))
            scores[index] += statistics.fmean(
                similarity(hypothesis, weighted(reference, n, rarity, len(groups)))
                * length_penalty(len(system) - len(reference))
                for reference in group
            )
    return 10 * statistics.fmean(scores) / ORDER


def inverse_document_frequency(groups: list[list[list[str]]], n: int) -> Vector:
    """``log(inputs / inputs with the n-gram in a reference)`` of every n-gram."""
    inputs = Counter(
        ngram for group in groups for ngram in {w for tokens in group for w in ngrams(tokens, n)}
    )
    return {ngram: math.log(len(groups) / count) for ngram, count in inputs.items()}


def weighted(tokens: list[str], n: int, rarity: Vector, inputs: int) -> Vector:
    """Counts of n-grams times their rarity; an unknown one is as rare as one of a single input."""
    unknown = math.log(inputs)
    return {w: count * rarity.get(w, unknown) for w, count in ngrams(tokens, n).items()}


def similarity(hypothesis: Vector, reference: Vector) -> float:
    """The clipped cosine: repeating a word beyond the reference's count gains nothing."""
    lengths = math.hypot(*hypothesis.values()) * math.hypot(*reference.values())
    shared = hypothesis.keys() & reference.keys()
    product = math.fsum(min(hypothesis[w], reference[w]) * reference[w] for w in shared)
    return product / lengths if lengths else 0.0


def length_penalty(difference: int) -> float:
    """A Gaussian of the difference in words, of width `SIGMA`."""
    return math.exp(-(difference**2) / (2 * SIGMA**2))
