"""Completions: prompts of token ids continued by the model, with the options of a run."""

from collections.abc import Callable, Sequence
from typing import Any

from lora_jax import generation, models

from .config import Config
from .console import Console


def generation_options(model: models.Pretrained, config: Config, tokenizer: Any) -> Any:
    """How to decode; a text ends as `lora_jax.generation.end_tokens` says.

    Raises:
        ValueError: The options do not go together.
    """
    section = config.evaluation
    options = generation.GenerationOptions(
        max_new_tokens=section.max_new_tokens,
        num_beams=section.num_beams,
        length_penalty=section.length_penalty,
        no_repeat_ngram_size=section.no_repeat_ngram_size,
        no_repeat_ngram_in_prompt=section.no_repeat_ngram_in_prompt,
    )
    return generation.with_tokens_of(model, tokenizer, options)


def make_check(
    model: models.Pretrained, config: Config, tokenizer: Any
) -> Callable[[Sequence[Sequence[int]]], list[str]]:
    """A function that writes nothing, and raises what would be wrong if it did.

    Raises:
        ValueError: At the call, where the options do not go together, or prompts are too long.
    """

    def check(prompts: Sequence[Sequence[int]]) -> list[str]:
        generation_options(model, config, tokenizer)
        longest, new = max(map(len, prompts), default=0), config.evaluation.max_new_tokens
        if longest + new > model.config.max_length:
            raise ValueError(
                f"`evaluation.max_new_tokens` is {new}, the longest prompt has {longest} tokens, "
                f"and the model has positions for {model.config.max_length}: make it smaller."
            )
        return [""] * len(prompts)

    return check


def make_complete(
    model: models.Pretrained, config: Config, tokenizer: Any, console: Console
) -> Callable[[Any, Sequence[Sequence[int]]], list[str]]:
    """A function ``(params, prompts) -> texts``; of a classifier's run it is never called."""

    def complete(params: Any, prompts: Sequence[Sequence[int]]) -> list[str]:
        console.say(f"writing {len(prompts)} completions ...")
        rows = generation.generate_tokens(
            model,
            params,
            prompts,
            generation_options(model, config, tokenizer),
            batch_size=config.evaluation.batch_size,
        )
        return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]

    return complete
