r"""Chats through the tokenizer's own template, and where in the text the assistant speaks.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n
                                                  ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^

A template that marks its generations itself says where. Of any other, the answers follow from
the template's own prefixes: an answer is what is new in the text up to and with its message, over
the text before it with the generation prompt. A template that writes an earlier turn differently
once later ones follow has no such prefixes, and is refused for those chats.
"""

import re
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
Span = tuple[int, int]
MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Llama 3's templates write today's date unless they are given one, and a run that resumes tomorrow
# must see the same tokens. It is the date that they write where there is no clock.
DATE = {"date_string": "26 Jul 2024"}


def render(
    tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False
) -> str:
    """A chat as text.

    Raises:
        ValueError: The tokenizer has no template, or the template refuses the chat.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "The data is chats (messages), and the tokenizer has no chat template: choose an "
            "instruction-tuned model, or give prompt and completion."
        )
    try:
        import jinja2
    except ImportError:
        raise ValueError("Chat templates need jinja2: pip install 'lora_jax[train]'.") from None
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, **DATE
        )
    except jinja2.exceptions.TemplateError as error:
        roles = [message["role"] for message in messages]
        raise ValueError(
            f"The chat template refuses a chat of the roles {roles}: {error}"
        ) from None


def has_markers(tokenizer: Any) -> bool:
    """Whether the template says itself what the assistant writes: ``{% generation %}``."""
    return bool(MARKER.search(tokenizer.get_chat_template()))


def marked_tokens(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """A chat's tokens, and 1 for each that the template marks as the assistant's."""
    encoded = tokenizer.apply_chat_template(
        list(messages),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **DATE,
    )
    return encoded["input_ids"], encoded["assistant_masks"]


def answer_spans(tokenizer: Any, messages: Sequence[Message], text: str) -> list[Span]:
    """Where in a rendered chat the assistant's turns stand, found by prefixes.

    Args:
        tokenizer: The tokenizer with the template.
        messages: The chat.
        text: The chat as `render` gives it.

    Raises:
        ValueError: What is rendered of a part of the chat is no prefix of the whole.
    """
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = render(tokenizer, messages[:turn], add_generation_prompt=True)
        answered = render(tokenizer, messages[: turn + 1])
        if not (answered.startswith(asked) and text.startswith(answered)):
            raise ValueError(
                f"The chat template writes turn {turn + 1} of {len(messages)} differently with "
                "its answer, or once other turns follow, so what the assistant says cannot be "
                "told apart. Give chats that end with their only answer, or learn from all of "
                "the text with data.loss_on=all."
            )
        spans.append((len(asked), len(answered)))
    return spans
