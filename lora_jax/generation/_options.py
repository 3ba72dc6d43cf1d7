"""How to decode: ``GenerationOptions``, checked when made.

Names and meanings are those of ``generation_config.json``, with one exception: there is no
``do_sample``. A temperature of 0 is greedy.
"""

import dataclasses
import math
import numbers
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How tokens are chosen, and when to stop.

    Decoding is greedy by default, sampled with a ``temperature`` above 0, and a beam search with
    ``num_beams`` above 1. The number of new tokens, of beams and of eos ids, and whether an
    option is on, are compiled in; other numbers may change without a new compilation.

    Attributes:
        max_new_tokens: New tokens of a row, at most.
        min_new_tokens: No eos before that many new tokens.
        temperature: Divides the logits before they are sampled; 0 takes the most probable token.
        top_k: Samples among that many most probable tokens (and those tied with the last); 0 is
            off. Comes after the temperature and before ``top_p``.
        top_p: Samples among the fewest most probable tokens whose probabilities sum to at least
            this (arXiv 1904.09751, 3.1); 1 is off.
        num_beams: Hypotheses kept for each row.
        length_penalty: A finished hypothesis scores ``log p / length ** length_penalty``, where
            the length counts its new tokens; above 0 favours long ones.
        no_repeat_ngram_size: No run of that many tokens comes twice in prompt and new tokens
            together; 0 is off.
        no_repeat_ngram_in_prompt: Whether the prompt's runs count. True is transformers' way;
            False, for a text that says what its prompt says, is that of the reference
            implementation's E2E experiments (microsoft/LoRA, ``gpt2_beam.py``).
        repetition_penalty: Divides the positive scores of tokens that the row already has, and
            multiplies the negative ones (arXiv 1909.05858, 4.1); 1 is off.
        eos_token_id: Token or tokens that end a row. None: not stated, which is none for
            `generate`, and `end_tokens` for `generate_text`; ``()``: none.
        pad_token_id: Fills a row up after its end. None is the first eos, or 0 without one.

    Raises:
        ValueError: Values out of range, or that have no effect beside the others (all listed).
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    num_beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    no_repeat_ngram_in_prompt: bool = True
    repetition_penalty: float = 1.0
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        if isinstance(self.eos_token_id, list):
            object.__setattr__(self, "eos_token_id", tuple(self.eos_token_id))
        problems = [*_out_of_range(self), *_bad_tokens(self)]
        if problems := problems or list(_without_effect(self)):
            raise ValueError(listed("These generation options cannot be used", problems))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a row, as a tuple."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def pad_id(self) -> int:
        """The token that fills a row up."""
        return (*self.eos_ids, 0)[0] if self.pad_token_id is None else self.pad_token_id


_LEAST = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "top_k": 0,
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
}
_RANGES = {
    "temperature": ("at least 0", lambda value: value >= 0),
    "top_p": ("above 0 and at most 1", lambda value: 0 < value <= 1),
    "length_penalty": ("a finite number", lambda value: True),
    "repetition_penalty": ("above 0", lambda value: value > 0),
}


def _out_of_range(options: GenerationOptions) -> Iterable[str]:
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if not _is_integer(value) or value < least:
            yield f"`{name}` must be an integer of at least {least}, got {value!r}."
    for name, (wanted, fits) in _RANGES.items():
        value = getattr(options, name)
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (real and math.isfinite(value) and fits(value)):
            yield f"`{name}` must be {wanted}, got {value!r}."


def _bad_tokens(options: GenerationOptions) -> Iterable[str]:
    ids = options.eos_ids
    if not all(_is_integer(token) and token >= 0 for token in ids) or len(set(ids)) < len(ids):
        yield f"`eos_token_id` must be token ids, each once, got {options.eos_token_id!r}."
    pad = options.pad_token_id
    if pad is not None and not (_is_integer(pad) and pad >= 0):
        yield f"`pad_token_id` must be a token id, got {pad!r}."


def _without_effect(options: GenerationOptions) -> Iterable[str]:
    if options.min_new_tokens > options.max_new_tokens:
        yield (
            f"`min_new_tokens` is {options.min_new_tokens}, "
            f"more than `max_new_tokens`, {options.max_new_tokens}."
        )
    if not options.temperature:
        for name, off in (("top_k", 0), ("top_p", 1.0)):
            if getattr(options, name) != off:
                yield f"`{name}` is for sampling: give a `temperature` above 0."
    elif options.num_beams > 1:
        yield f"Beam search does not sample: `num_beams` is {options.num_beams} and " + (
            f"`temperature` {options.temperature}. Set one of them to its default."
        )
    if not options.no_repeat_ngram_in_prompt and not options.no_repeat_ngram_size:
        yield "`no_repeat_ngram_in_prompt` is for `no_repeat_ngram_size` above 0."
    if options.length_penalty != 1.0 and options.num_beams == 1:
        yield "`length_penalty` is for beam search: give `num_beams` above 1."


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def listed(head: str, problems: Iterable[str]) -> str:
    """An error's message: what is wrong, and each problem on a line of its own."""
    return f"{head}:" + "".join(f"\n  {problem}" for problem in problems)
