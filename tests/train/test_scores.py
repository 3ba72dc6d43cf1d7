"""Scores of generated text: by hand, by the packages that define them, and their laws."""

import math
import sys

import pytest

pytest.importorskip("sacrebleu", reason="needs the extra `scores`")
pytest.importorskip("rouge_score", reason="needs the extra `scores`")
pytest.importorskip("nltk", reason="needs the extra `scores`")

import sacrebleu
from nltk.translate.nist_score import corpus_nist

from train import scores
from train.scores._tokens import caption_tokens, mteval_tokens

TEXTS = [
    "The Vaults pub near Café Adriatic has a 5 star rating .",
    "Close to Café Brazil , The Cambridge Blue pub serves delicious Tuscan Beef .",
    "It's a cheap family-friendly pub by the river , with a low rating .",
]
REFERENCES = [
    [
        "The Vaults is a pub near Café Adriatic with a 5 star rating .",
        "Near Café Adriatic there is a 5 star pub called The Vaults , by the river .",
    ],
    ["The Cambridge Blue , close to Café Brazil , is a pub that serves Tuscan Beef ."],
    ["A low rated pub by the river .", "Cheap and family-friendly .", "It is by the river ."],
]
NAMES = tuple(scores.SCORES)


@pytest.mark.parametrize(
    ("text", "mteval", "caption"),
    [
        pytest.param("The Pub.", "the pub .", "the pub", id="case-and-stop"),
        pytest.param("a , b ; c", "a , b ; c", "a b c", id="already-tokenised"),
        pytest.param("£30.50, £20-25", "£30.50 , £20 - 25", "£30.50 £20 25", id="numbers"),
        pytest.param("It's family-friendly", *["it's family-friendly"] * 2, id="inside-a-word"),
        pytest.param('"(Yes)" ...', '" ( yes ) " . . .', "( yes )", id="quotes-and-brackets"),
        pytest.param("", "", "", id="empty"),
    ],
)
def test_tokens(text, mteval, caption):
    assert mteval_tokens(text) == mteval.split()
    assert caption_tokens(text) == caption.split()


@pytest.mark.parametrize(
    ("name", "hypotheses", "references", "expected"),
    [
        # Precisions 4/5, 3/4, 2/3, 1/2; no penalty, since both have five tokens.
        pytest.param(
            "bleu",
            ["a b c d x"],
            [["a b c d e"]],
            100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25,
            id="bleu-precisions",
        ),
        # All match, four tokens where the closest reference has five.
        pytest.param(
            "bleu",
            ["a b c d"],
            [["a b c d e", "a b c d e f g"]],
            100 * math.exp(1 - 5 / 4),
            id="bleu-brevity-of-the-closest-reference",
        ),
        # Five reference words: a twice, others once. a: log2(5/2) each, others log2(5), and
        # of the longer n-grams only those that begin with `a` are news: log2(2).
        pytest.param(
            "nist",
            ["a b a c d"],
            [["a b a c d"]],
            (2 * math.log2(5 / 2) + 3 * math.log2(5)) / 5 + 2 * math.log2(2) / 4,
            id="nist-identity",
        ),
        # Two references of two and four words, mean three; the hypothesis has two words, a
        # ratio of 2/3, which halves. `a` may match twice as in one reference, not three times.
        pytest.param(
            "nist",
            ["a a"],
            [["a b", "a a c d"]],
            0.5 * (2 * math.log2(6 / 3) / 2 + 1 * math.log2(3 / 1) / 1),
            id="nist-clipped-and-penalised",
        ),
        # P = 2/3, R = 2/2, one chunk of two matches.
        pytest.param(
            "meteor",
            ["a big pub"],
            [["big pubs"]],
            100 * (2 / 3) / (0.85 * 2 / 3 + 0.15) * (1 - 0.6 * 0.5**0.2),
            id="meteor-exact-and-stem",
        ),
        # LCS 2 of 4 and 2 of 2 with the first; 3 of 4 and 3 of 6 with the second. The best of
        # each are combined.
        pytest.param(
            "rouge_l",
            ["a b c d"],
            [["a d", "a b x c y z"]],
            100 * 2.44 * (3 / 4) * 1 / (1 + 1.44 * 3 / 4),
            id="rouge-l-best-precision-best-recall",
        ),
        # Two inputs that share nothing: each n-gram has idf log 2. `a b` and `a c` share one
        # of two words (cosine 1/2), no bigram; `d e` and `d e` everything; no 3- and 4-grams.
        pytest.param(
            "cider",
            ["a b", "d e"],
            [["a c"], ["d e"]],
            10 * (0.5 / 4 + 2 / 4) / 2,
            id="cider-cosine",
        ),
        # `a a a` against `a`: clipped to one, so 1/3; two words longer.
        pytest.param(
            "cider",
            ["a a a", "x"],
            [["a"], ["b"]],
            10 * (1 / 3) / 4 * math.exp(-4 / 72) / 2,
            id="cider-clipped-and-length",
        ),
        # A word of every input says nothing (idf 0), so `a b` and `a c` have nothing in common.
        pytest.param(
            "cider",
            ["a b", "a x"],
            [["a c"], ["a d"]],
            0.0,
            id="cider-common-words-weigh-nothing",
        ),
        # Mean over references: all of one, nothing of the other.
        pytest.param("cider", ["a", "z"], [["a", "b"], ["c"]], 10 * (0.5 / 4) / 2, id="cider-mean"),
    ],
)
def test_by_hand(name, hypotheses, references, expected):
    assert scores.SCORES[name](hypotheses, references) == pytest.approx(expected, rel=1e-9)


def test_bleu_is_sacrebleus_with_lower_case():
    most = max(map(len, REFERENCES))
    streams = [[(r + [None] * most)[i] for r in REFERENCES] for i in range(most)]
    theirs = sacrebleu.corpus_bleu(TEXTS, streams, lowercase=True, force=True).score
    assert scores.bleu(TEXTS, REFERENCES) == pytest.approx(theirs, rel=1e-12)


def test_nist_with_one_reference_is_nltks():
    single = [texts[:1] for texts in REFERENCES]
    theirs = corpus_nist(
        [[mteval_tokens(text) for text in texts] for texts in single],
        [mteval_tokens(text) for text in TEXTS],
    )
    assert scores.nist(TEXTS, single) == pytest.approx(theirs, rel=1e-9)


def test_meteor_looks_nothing_up():
    """A synonym is no match, whether or not WordNet is installed (nltk's own would ask it)."""
    assert scores.meteor(["cheap"], [["inexpensive"]]) == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_reference_itself_is_the_best_answer(name):
    single = [texts[:1] for texts in REFERENCES]
    right = [texts[0] for texts in single]
    best = scores.SCORES[name](right, single)
    for index, text in enumerate(TEXTS):
        other = [*right[:index], text, *right[index + 1 :]]
        assert scores.SCORES[name](other, single) < best


@pytest.mark.parametrize(("name", "highest"), [("bleu", 100), ("rouge_l", 100), ("cider", 10)])
def test_identity_gives_the_maximum(name, highest):
    single = [texts[:1] for texts in REFERENCES]
    right = [texts[0] for texts in single]
    assert scores.SCORES[name](right, single) == pytest.approx(highest, rel=1e-9)


def test_the_order_of_references_does_not_matter():
    turned = [texts[::-1] for texts in REFERENCES]
    assert scores.nlg_scores(TEXTS, turned) == pytest.approx(
        scores.nlg_scores(TEXTS, REFERENCES), rel=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
def test_case_does_not_matter(name):
    upper = [text.upper() for text in TEXTS]
    score = scores.SCORES[name]
    assert score(upper, REFERENCES) == pytest.approx(score(TEXTS, REFERENCES), rel=1e-12)


def test_nothing_generated_scores_nothing():
    nothing = scores.nlg_scores([""] * 3, REFERENCES)
    assert nothing == dict.fromkeys(NAMES, 0.0)


@pytest.mark.parametrize(
    ("hypotheses", "references", "message"),
    [
        pytest.param([], [], "nothing to score", id="nothing"),
        pytest.param(["a", "b"], [["a"]], "2 hypotheses but references for 1", id="lengths"),
        pytest.param(["a", "b"], [["a"], []], "none at 1", id="no-reference"),
        pytest.param(["a"], [["a", " "]], "one is at 0", id="blank-reference"),
        pytest.param(["a"], ["a"], "a bare text stands at 0", id="text-for-a-list"),
    ],
)
def test_refused(hypotheses, references, message):
    with pytest.raises(ValueError, match=message):
        scores.nlg_scores(hypotheses, references)


@pytest.mark.parametrize(
    ("package", "name"),
    [
        ("sacrebleu.metrics.bleu", "bleu"),
        ("rouge_score.rouge_scorer", "rouge_l"),
        ("nltk.translate.meteor_score", "meteor"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"pip install 'lora_jax\[scores\]'"):
        scores.SCORES[name](TEXTS, REFERENCES)


def test_people_on_e2e(data_dir):
    """One person's text for each test input against the others': figures of the very texts.

    METEOR 1.5, ROUGE-L and CIDEr of MS COCO's scripts on these are 45.6, 63.92 and 1.894.
    """
    groups: dict[str, list[str]] = {}
    for line in (data_dir / "e2e" / "test.txt").read_text(encoding="utf-8").splitlines():
        meaning, text = line.split("||")
        groups.setdefault(meaning, []).append(text.strip())
    several = [texts for texts in groups.values() if len(texts) > 1]
    found = scores.nlg_scores([texts[0] for texts in several], [texts[1:] for texts in several])
    expected = {"bleu": 61.18, "nist": 8.929, "meteor": 43.22, "rouge_l": 63.92, "cider": 1.894}
    assert len(groups) == 630
    assert found == pytest.approx(expected, rel=2e-3)  # what PTB's tokens change
