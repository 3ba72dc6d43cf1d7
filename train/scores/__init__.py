"""Scores of generated text: the five numbers that E2E NLG is reported in.

    nlg_scores(["Zizzi is a pub ."], [["Zizzi is a pub .", "A pub called Zizzi ."]])
    -> {"bleu": ..., "nist": ..., "meteor": ..., "rouge_l": ..., "cider": ...}

Each module beside this one is one score. They follow the scripts of the E2E NLG Challenge
(``tuetschek/e2e-metrics``): BLEU and NIST as ``mteval-v13a`` has them, the others as MS COCO's
caption evaluation has them. What differs from those is said where it happens.
"""

from collections.abc import Sequence

from ._bleu import bleu as bleu
from ._cider import cider as cider
from ._meteor import meteor as meteor
from ._nist import nist as nist
from ._rouge_l import rouge_l as rouge_l

SCORES = {"bleu": bleu, "nist": nist, "meteor": meteor, "rouge_l": rouge_l, "cider": cider}
LABELS = {
    "bleu": "BLEU",
    "nist": "NIST",
    "meteor": "METEOR (exact, stem)",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
}
"""What to call each score in a table. METEOR's says what it lacks: see `meteor`."""


def nlg_scores(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The five scores of E2E NLG; higher is better in each.

    Args:
        hypotheses: The generated texts, one for each input. They may be empty.
        references: For each of them the texts that people wrote; their number may vary.

    Returns:
        ``bleu``, ``meteor`` and ``rouge_l`` in percent; ``nist`` and ``cider`` on their own
        scales, from 0 up. None depends on the order of the references.

    Raises:
        ValueError: Nothing to score, lists of unequal length, an input without references, or a
            blank reference; also if a package is missing.
    """
    _check(hypotheses, references)
    return {name: score(hypotheses, references) for name, score in SCORES.items()}


def _check(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not hypotheses:
        raise ValueError("There is nothing to score: `hypotheses` is empty.")
    if len(hypotheses) != len(references):
        raise ValueError(
            f"{len(hypotheses)} hypotheses but references for {len(references)} inputs; "
            "give one list of references for each hypothesis."
        )
    if loose := [index for index, texts in enumerate(references) if isinstance(texts, str)]:
        raise ValueError(f"References must be lists of texts; a bare text stands at {_few(loose)}.")
    if bare := [index for index, texts in enumerate(references) if not texts]:
        raise ValueError(f"Every input needs a reference; there is none at {_few(bare)}.")
    blank = [i for i, texts in enumerate(references) if not all(text.strip() for text in texts)]
    if blank:
        raise ValueError(f"References must not be blank; one is at {_few(blank)}.")


def _few(indices: list[int]) -> str:
    shown = ", ".join(map(str, indices[:5]))
    return f"{shown} and {len(indices) - 5} more" if len(indices) > 5 else shown
