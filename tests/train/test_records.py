"""Rows of a causal LM: every format recognised, a bad row named."""

import gzip
import json

import pytest

from train import records
from train.config import DataSection
from train.records import Chat, Pair, Text

ASK, SAY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def write(folder, name, rows):
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def read(source, *, has_template=True, **settings):
    section = DataSection(train=source, holdout=1, **settings)
    return records.read_records(source, section, has_template=has_template)


@pytest.mark.parametrize(
    ("row", "settings", "expected"),
    [
        pytest.param({"messages": [ASK, SAY]}, {}, Chat((ASK, SAY)), id="messages"),
        pytest.param({"prompt": "a", "completion": " b"}, {}, Pair("a", " b"), id="a-pair"),
        pytest.param(
            {"prompt": "a", "completion": "b"},
            {"separator": " -> "},
            Pair("a -> ", "b"),
            id="a-separator",
        ),
        pytest.param(
            {"instruction": "Hi", "input": "", "output": "Hello"},
            {},
            Chat((ASK, SAY)),
            id="an-instruction",
        ),
        pytest.param(
            {"instruction": "Say", "input": "Hi", "output": "Hello"},
            {"has_template": False},
            Pair("Say\n\nHi\n\n", "Hello"),
            id="an-instruction-without-a-template",
        ),
        pytest.param({"text": "a", "id": 3}, {}, Text("a"), id="text"),
        pytest.param({"body": "a"}, {"text": "body"}, Text("a"), id="a-named-text"),
        pytest.param(
            {"messages": [ASK, SAY], "text": "a", "prompt": "b"},
            {"format": "text"},
            Text("a"),
            id="a-chosen-format",
        ),
    ],
)
def test_formats_are_recognised_by_their_keys(tmp_path, row, settings, expected):
    assert read(write(tmp_path, "rows.jsonl", [row]), **settings) == [expected]


@pytest.mark.parametrize(
    ("name", "form", "expected"),
    [
        pytest.param("a.txt", None, True, id="text"),
        pytest.param("a.txt", "text", True, id="as-it-says"),
        pytest.param("a.txt", "e2e", False, id="a-line-an-example"),
        pytest.param("a.txt", "messages", False, id="no-chats"),
        pytest.param("a.jsonl", None, False, id="rows"),
    ],
)
def test_which_files_are_one_text(tmp_path, name, form, expected):
    source = write(tmp_path, name, "Hi")
    section = DataSection(train=source, holdout=1, format=form)
    assert records.is_document(source, section) is expected


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_tables_hold_pairs(tmp_path, name):
    comma = "," if name.endswith("csv") else "\t"
    source = write(tmp_path, name, f"prompt{comma}completion\na{comma}b\n")
    assert read(source) == [Pair("a", "b")]


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_lines_of_e2e(tmp_path, packed):
    text = "name : A | area : B||A is in B . \nname : A | food : C||A has C .\n"
    source = tmp_path / ("e2e.txt.gz" if packed else "e2e.txt")
    source.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert read(str(source), format="e2e") == [
        Pair("name : A | area : B||", " A is in B ."),
        Pair("name : A | food : C||", " A has C ."),
    ]
    first = read(str(source), format="e2e", separator="<sep>")[0]
    assert first == Pair("name : A | area : B<sep>", " A is in B .")


def test_the_real_e2e_files(data_dir):
    rows = read(str(data_dir / "e2e" / "valid.txt"), format="e2e")
    assert len(rows) == 4672
    assert len({row.prompt for row in rows}) == 547


@pytest.mark.parametrize(
    ("name", "rows", "settings", "message"),
    [
        pytest.param(
            "r.jsonl",
            [{"promt": "a", "completion": "b"}],
            {},
            "columns .*'promt'.*nearest format is prompt, completion.*data.text",
            id="misspelt-keys",
        ),
        pytest.param(
            "r.jsonl",
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "text": "b"}],
            {},
            r"(?s)r.jsonl has 1 bad row:\n  row 2: 'completion' is empty; its keys are "
            r"\['prompt', 'text'\]. The nearest format is text",
            id="a-row-of-another-format",
        ),
        pytest.param("r.jsonl", [{"text": "  "}], {}, "row 1: 'text' is blank", id="blank"),
        pytest.param(
            "r.jsonl", [{"text": 3}], {}, "row 1: 'text' is int '3', not text", id="a-number"
        ),
        pytest.param(
            "r.jsonl", '{"text": "a\\ud800"}', {}, "'text' holds half of a", id="surrogate"
        ),
        pytest.param(
            "r.jsonl",
            [{"messages": [ASK, SAY | {"content": "a\ud800"}]}],
            {},
            "content of message 2 holds half of a surrogate",
            id="surrogate-in-a-chat",
        ),
        pytest.param(
            "r.jsonl",
            [{"messages": "Hi"}],
            {},
            "'messages' is str, not a list of messages",
            id="no-messages",
        ),
        pytest.param(
            "r.jsonl",
            [{"messages": [{"from": "user"}]}],
            {},
            "message 1 is no object with 'role' and 'content'",
            id="no-role",
        ),
        pytest.param(
            "r.jsonl",
            [{"messages": [{"role": "user", "content": [1]}]}],
            {},
            "content of message 1 is list, not text",
            id="parts",
        ),
        pytest.param(
            "r.jsonl",
            [{"messages": [{"role": None, "content": "Hi"}, SAY]}],
            {},
            "role of message 1 is NoneType, not text",
            id="a-role-of-nobody",
        ),
        pytest.param(
            "r.jsonl",
            [{"messages": [ASK, SAY]}],
            {"format": "messages", "text": "messages"},
            "`data.text` means nothing to rows of format messages",
            id="text-of-chats",
        ),
        pytest.param(
            "r.jsonl",
            [{"text": "a"}],
            {"separator": "||"},
            "`data.separator` means nothing to rows of format text",
            id="separator-of-texts",
        ),
        pytest.param(
            "r.jsonl", [{"messages": [ASK]}], {}, "no message is the assistant's", id="no-answer"
        ),
        pytest.param(
            "r.jsonl", [{"messages": [SAY]}], {}, "the assistant speaks first", id="no-question"
        ),
        pytest.param(
            "r.jsonl", [{"text": ""}] * 9, {}, "(?s)9 bad rows.*row 5.*and 4 more", id="many"
        ),
        pytest.param(
            "r.jsonl", [{"a": "b"}], {"text": "c"}, "no column 'c'; it has", id="no-such-column"
        ),
        pytest.param(
            "r.txt", "a | b || c\nd\n", {"format": "e2e"}, "line 2: 'd' is not `name", id="no-e2e"
        ),
        pytest.param("r.txt", "\n\n", {"format": "e2e"}, "holds no rows", id="blank-e2e"),
    ],
)
def test_bad_data_is_named(tmp_path, name, rows, settings, message):
    source = write(tmp_path, name, rows)
    with pytest.raises(ValueError, match=message):
        read(source, **settings)
