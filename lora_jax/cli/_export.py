"""``lora-jax export``: an adapter written again, for those who read it."""

import argparse
from typing import Any

from ..io import save_adapter
from . import _adapted, _output

_EXAMPLES = """examples:
  lora-jax export --base ./base --adapter ./adapter --out ./for-vllm --profile vllm
  lora-jax export --adapter runs/e2e --out ./for-peft --profile peft

vllm: one rank and one scale for all modules, ranks and scales of their own put into the factors;
no rsLoRA, and nothing trained in full, which vLLM refuses. peft: as save_adapter writes it."""


def add_command(commands: Any) -> None:
    """Adds ``export`` to the commands of a parser."""
    parser = commands.add_parser(
        "export",
        help="write an adapter again, for PEFT or vLLM",
        description="Reads an adapter, ours or PEFT's, checks it against its base, and writes it\n"
        "in the form that PEFT or vLLM reads. What that form cannot say is an error.\n"
        "What the card of an adapter of ours says of it is kept.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--profile", choices=("peft", "vllm"), default="peft", help="for whom (default peft)"
    )
    _adapted.add_arguments(parser, run)


def run(options: argparse.Namespace) -> int:
    """Writes the adapter that the parsed ``options`` name; see `add_command`.

    Raises:
        ValueError: A path is wrong, the base does not fit the adapter, the profile cannot express
            it, or ``--out`` is in use.
        OSError: The adapter could not be written; nothing is left behind.
    """
    sources = _adapted.find(options)
    adapted = _adapted.load(sources)
    save_adapter(
        sources.out,
        adapted.trainable,
        adapted.config,
        adapted.model,
        profile=options.profile,
        base_model=sources.base_model,
        revision=sources.revision,
        **sources.facts._asdict(),
        overwrite=options.overwrite,
    )
    done = {
        "base": sources.base,
        "adapter": str(sources.adapter),
        "out": str(sources.out),
        "task": adapted.model.task,
        "profile": options.profile,
        **adapted.counts(),
        **_adapted.size(sources.out),
    }
    if options.json:
        _output.print_json(done)
        return 0
    print(
        f"Wrote {done['adapted']} adapted weights and {done['trained_in_full']} trained in full "
        f"for {options.profile}, {done['bytes']:,} bytes, to {sources.out}"
    )
    return 0
