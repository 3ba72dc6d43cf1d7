"""From rows to what a causal LM learns from: chats, prompts with completions, plain texts.

    messages                        [{"role": ..., "content": ...}, ...]    Chat
    prompt, completion                                                      Pair
    instruction, (input,) output    Chat where the tokenizer has a template, else Pair
    text                                                                    Text
    name : X | area : Y||text       a line of the E2E data set, format e2e  Pair

A bad row is a ValueError that names the file, the row, the keys it has and the nearest format.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .config import DataSection
from .files import Row, Rows, read_rows, read_text, suffix

FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
"""The keys that each format is recognised by, in the order in which they are looked for."""
E2E_SEPARATOR = "||"
SHOWN = 5  # bad rows that a message names


class Chat(NamedTuple):
    """A conversation, as the tokenizer's chat template takes it."""

    messages: tuple[dict[str, Any], ...]


class Pair(NamedTuple):
    """What is given and what is to be written; the two joined are the text."""

    prompt: str
    completion: str


class Text(NamedTuple):
    """A text to be learned as a whole."""

    text: str


Record = Chat | Pair | Text


def read_records(source: str, section: DataSection, *, has_template: bool) -> list[Record]:
    """Reads one file or hub data set and checks every row.

    Args:
        source: The file's or data set's name.
        section: How to read it.
        has_template: Whether instructions become chats.

    Raises:
        ValueError: It cannot be read, or rows cannot be used; the first five are named.
    """
    if section.format == "e2e":
        _refuse_idle(section, "e2e")
        return _read_e2e(source, section)
    rows = read_rows(source, section.columns)
    kind = section.format or ("text" if section.text else _recognise(rows))
    _refuse_idle(section, kind)
    text = section.text or "text"
    keys = (text,) if kind == "text" else FORMATS[kind]
    if missing := [key for key in keys if key not in rows.columns]:
        raise ValueError(
            f"{source} has no column {missing[0]!r}; it has {list(rows.columns)}. "
            f"{_nearest_format(rows.columns)}"
        )
    separator = section.separator or ""
    make: dict[str, Callable[[Row], Record]] = {
        "messages": lambda row: Chat(tuple(row["messages"])),
        "prompt-completion": lambda row: Pair(row["prompt"] + separator, row["completion"]),
        "instruction": lambda row: _instruction(row, has_template),
        "text": lambda row: Text(row[text]),
    }
    _refuse(source, rows, [_problem(row, kind, keys) for row in rows.rows])
    return [make[kind](row) for row in rows.rows]


def is_document(source: str, section: DataSection) -> bool:
    """Whether a source is one long text, to be cut into windows."""
    path = Path(source)
    return path.is_file() and suffix(path) == ".txt" and section.format in (None, "text")


def _refuse_idle(section: DataSection, kind: str) -> None:
    """Refuses settings that rows of this format have no use for."""
    uses = {"text": ("text",), "separator": ("prompt-completion", "e2e")}
    for key, kinds in uses.items():
        if getattr(section, key) is not None and kind not in kinds:
            raise ValueError(f"`data.{key}` means nothing to rows of format {kind}: remove it.")


def _recognise(rows: Rows) -> str:
    for kind, keys in FORMATS.items():
        if set(keys) <= set(rows.columns):
            return kind
    raise ValueError(
        f"{rows.source} has the columns {list(rows.columns)}. {_nearest_format(rows.columns)} "
        "Rename them, or name the column of a plain text in the config: data.text."
    )


def _nearest_format(columns: Iterable[str]) -> str:
    """Says which known format these keys are most like."""
    names = [str(column).lower() for column in columns] or [""]

    def likeness(kind: str) -> float:
        keys = FORMATS[kind]
        best = (
            max(difflib.SequenceMatcher(None, key, name).ratio() for name in names) for key in keys
        )
        return sum(best) / len(keys)

    return f"The nearest format is {', '.join(FORMATS[max(FORMATS, key=likeness)])}."


def _refuse(source: str, rows: Rows, problems: Sequence[str | None]) -> None:
    bad = [(number, problem) for number, problem in enumerate(problems) if problem]
    if not bad:
        return
    lines = []
    for number, problem in bad[:SHOWN]:
        keys = [key for key, cell in rows.rows[number].items() if cell not in (None, "")]
        lines.append(f"row {number + 1}: {problem}; its keys are {keys}. {_nearest_format(keys)}")
    if len(bad) > SHOWN:
        lines.append(f"and {len(bad) - SHOWN} more")
    title = f"{source} has {len(bad)} bad row{'s' * (len(bad) > 1)}:"
    raise ValueError("\n  ".join([title, *lines]))


def _problem(row: Row, kind: str, keys: Sequence[str]) -> str | None:
    """What is wrong with a row, if anything."""
    if kind == "messages":
        return _chat_problem(row["messages"])
    for key in keys:
        if row[key] in (None, ""):
            return f"{key!r} is empty"
        if not isinstance(row[key], str):
            return f"{key!r} is {type(row[key]).__name__} {str(row[key])[:40]!r}, not text"
        if not _is_unicode(row[key]):
            return f"{key!r} holds half of a surrogate pair, which is no character"
        if not row[key].strip():
            return f"{key!r} is blank"
    if kind == "instruction" and not isinstance(row.get("input") or "", str):
        return f"'input' is {type(row['input']).__name__}, not text"
    return None


def _is_unicode(text: str) -> bool:
    """Whether a tokenizer can read it: JSON can spell what is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _chat_problem(messages: Any) -> str | None:
    if not isinstance(messages, list | tuple) or not messages:
        return f"'messages' is {type(messages).__name__}, not a list of messages"
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            return f"message {number} is no object with 'role' and 'content'"
        for key in ("role", "content"):
            if not isinstance(message[key], str):
                return f"the {key} of message {number} is {type(message[key]).__name__}, not text"
            if not _is_unicode(message[key]):
                return f"the {key} of message {number} holds half of a surrogate pair"
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        return f"no message is the assistant's, the roles are {roles}"
    return "the assistant speaks first" if roles[0] == "assistant" else None


def _instruction(row: Row, has_template: bool) -> Record:
    asked = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    if not has_template:
        return Pair(f"{asked}\n\n", row["output"])
    answer = {"role": "assistant", "content": row["output"]}
    return Chat(({"role": "user", "content": asked}, answer))


def _read_e2e(source: str, section: DataSection) -> list[Record]:
    """The E2E data set as microsoft/LoRA keeps it: a meaning, two bars, a sentence."""
    if not Path(source).is_file():
        raise ValueError(f"Format e2e is read from a file, and there is no file {source!r}.")
    separator = E2E_SEPARATOR if section.separator is None else section.separator
    records: list[Record] = []
    for number, line in enumerate(read_text(Path(source)).split("\n"), start=1):
        meaning, bars, text = (part.strip() for part in line.partition(E2E_SEPARATOR))
        if not line.strip():
            continue
        if not (meaning and bars and text):
            raise ValueError(
                f"{source}, line {number}: {line[:60]!r} is not `name : X | area : Y||text`, as "
                "format e2e has it."
            )
        records.append(Pair(meaning + separator, f" {text}"))
    if not records:
        raise ValueError(f"{source} holds no rows.")
    return records
