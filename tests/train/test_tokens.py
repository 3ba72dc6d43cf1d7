"""Tokens and what is learned of them, spelled out token by token."""

import copy

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from train import questions, tokens
from train.config import DataSection
from train.records import Chat, Pair, Text

SECTION = DataSection(train="rows.jsonl", holdout=1)
ALL = SECTION.model_copy(update={"loss_on": "all"})
PAIR = Pair("name : Aroma||", " Aroma is there.")
TALK = Chat(
    (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello there"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Bye now"},
    )
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As templates do that keep only the last answer's thinking.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if loop.last %}{{ ' now' }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenise(tokenizer, record, section):
    (found,) = tokens.tokenise(tokenizer, [record], section)
    return found


def spell(tokenizer, found):
    """Tokens as they read, with a star before those that are learned."""
    words = tokenizer.convert_ids_to_tokens(found.ids.tolist())
    pairs = zip(words, found.learned, strict=True)
    return [f"*{word}" if learned else word for word, learned in pairs]


def with_template(tokenizer, template):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


# fmt: off
@pytest.mark.parametrize(
    ("record", "section", "expected"),
    [
        pytest.param(
            PAIR, SECTION,
            ["name", " :", " Aroma", "||", "* Aroma", "* is", "* there", "*.", "*<|im_end|>"],
            id="a-completion-and-its-end",
        ),
        pytest.param(
            PAIR, ALL,
            ["name", "* :", "* Aroma", "*||", "* Aroma", "* is", "* there", "*.", "*<|im_end|>"],
            id="all-but-the-first",
        ),
        pytest.param(
            Text("Hi there."), SECTION,
            ["Hi", "* there", "*.", "*<|im_end|>"],
            id="a-plain-text",
        ),
        pytest.param(
            Chat(TALK.messages[:2]), SECTION,
            ["<|im_start|>", "user", "\n", "Hi", "<|im_end|>", "\n",
             "<|im_start|>", "assistant", "\n", "*Hello", "* there", "*<|im_end|>", "*\n"],
            id="one-answer",
        ),
        pytest.param(
            TALK, SECTION,
            ["<|im_start|>", "user", "\n", "Hi", "<|im_end|>", "\n",
             "<|im_start|>", "assistant", "\n", "*Hello", "* there", "*<|im_end|>", "*\n",
             "<|im_start|>", "user", "\n", "Bye", "<|im_end|>", "\n",
             "<|im_start|>", "assistant", "\n", "*Bye", "* now", "*<|im_end|>", "*\n"],
            id="every-answer-of-a-chat",
        ),
        pytest.param(
            Chat(({"role": "system", "content": "Be kind"}, *TALK.messages[:3])), SECTION,
            ["<|im_start|>", "system", "\n", "Be", " kind", "<|im_end|>", "\n",
             "<|im_start|>", "user", "\n", "Hi", "<|im_end|>", "\n",
             "<|im_start|>", "assistant", "\n", "*Hello", "* there", "*<|im_end|>", "*\n",
             "<|im_start|>", "user", "\n", "Bye", "<|im_end|>", "\n"],
            id="a-system-turn-and-an-open-end",
        ),
    ],
)
def test_what_is_learned(tokenizer, record, section, expected):
    assert spell(tokenizer, tokenise(tokenizer, record, section)) == expected


def test_a_templates_own_marks_win(tokenizer):
    found = tokenise(with_template(tokenizer, MARKED), TALK, SECTION)
    assert spell(tokenizer, found)[6:13] == [
        "<|im_start|>", "assistant", "\n", "*Hello", "* there", "*<|im_end|>", "\n",
    ]
    assert int(found.learned.sum()) == 6


def test_what_a_tokenizer_starts_and_ends_texts_with_is_kept_and_not_doubled(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <|im_end|>", special_tokens=[("<bos>", 1), ("<|im_end|>", 3)]
    )
    found = tokenise(tokenizer, PAIR, SECTION)
    assert spell(tokenizer, found) == [
        "<bos>", "name", " :", " Aroma", "||", "* Aroma", "* is", "* there", "*.", "*<|im_end|>",
    ]
    chat = spell(tokenizer, tokenise(tokenizer, TALK, SECTION))
    assert (chat[0], chat[-2:]) == ("<|im_start|>", ["*<|im_end|>", "*\n"])
# fmt: on


@pytest.mark.parametrize(
    ("template", "message"),
    [
        pytest.param(FORGETFUL, "writes turn 2 of 4 differently", id="turns-that-change"),
        pytest.param(None, "no chat template", id="no-template"),
        pytest.param(
            "{{ raise_exception('no users here') }}", "refuses a chat.*no users", id="refused"
        ),
    ],
)
def test_a_template_that_cannot_tell_is_an_error(tokenizer, template, message):
    with pytest.raises(ValueError, match=message):
        tokenise(with_template(tokenizer, template), TALK, SECTION)


def test_turns_that_change_can_be_learned_whole(tokenizer):
    found = tokenise(with_template(tokenizer, FORGETFUL), TALK, ALL)
    assert found.learned.tolist() == [False] + [True] * (len(found.ids) - 1)
    assert questions.questions([found]) == []


def test_a_token_across_the_boundary_is_counted_and_not_learned(tokenizer):
    found = tokenise(tokenizer, Pair("name : Aro", "ma is"), SECTION)
    assert spell(tokenizer, found) == ["name", " :", " Aroma", "* is", "*<|im_end|>"]
    assert found.shared == 1


@pytest.mark.parametrize("trim", [False, True])
def test_tokens_of_spaces_alone_are_learned(trim):
    # Some byte-level tokenizers leave spaces out of a token's place in the text.
    vocabulary = {"<eos>": 0, "a": 1, "b": 2, "Ġ": 3}
    spelled = tokenizers.Tokenizer(models.BPE(vocabulary, merges=[]))
    spelled.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled.post_processor = processors.ByteLevel(trim_offsets=trim)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=spelled, eos_token="<eos>")
    found = tokenise(tokenizer, Pair("a ", "b  b "), SECTION)
    assert spell(tokenizer, found) == ["a", "Ġ", "*b", "*Ġ", "*Ġ", "*b", "*Ġ", "*<eos>"]


@pytest.mark.parametrize("marked", [False, True])
def test_a_template_sees_one_date(tokenizer, marked):
    rest = MARKED if marked else tokenizer.chat_template
    today = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}"
    )
    dated = with_template(tokenizer, today + "{{ date_string == '26 Jul 2024' and 'Hi' }}" + rest)
    assert spell(tokenizer, tokenise(dated, TALK, SECTION))[:2] == ["Hi", "<|im_start|>"]


def test_cutting_keeps_the_start(tokenizer):
    found = tokenise(tokenizer, PAIR, SECTION).cut(6)
    assert spell(tokenizer, found) == ["name", " :", " Aroma", "||", "* Aroma", "* is"]


def test_windows_learn_every_token_of_a_text_once(tokenizer):
    text = " ".join(["name : Aroma."] * 9)
    whole = tokenizer(text)["input_ids"]
    parts = tokens.windows(tokenizer, text, 8)
    assert max(len(part.ids) for part in parts) == 8
    learned = [part.ids[part.learned] for part in parts]
    np.testing.assert_array_equal(np.concatenate(learned), whole[1:])


def test_learned_text_is_marked(tokenizer):
    found = tokenise(tokenizer, PAIR, SECTION)
    shown = tokens.marked_text(tokenizer, found)
    assert shown == "name : Aroma||⟦ Aroma is there.<|im_end|>⟧"


def test_equal_prompts_are_one_question_with_all_their_answers(tokenizer):
    records = [PAIR, Pair("name : Cotto||", " Cotto is."), Pair(PAIR.prompt, " Aroma now."), TALK]
    found = questions.questions([tokenise(tokenizer, one, SECTION) for one in records])
    assert [question.references for question in found] == [
        ("Aroma is there.", "Aroma now."),
        ("Cotto is.",),
        ("Bye now",),
    ]
    assert tokenizer.decode(list(found[0].prompt)) == PAIR.prompt
    assert tokenizer.decode(list(found[2].prompt)).endswith("<|im_start|>assistant\n")
