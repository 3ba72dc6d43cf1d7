"""The command line: ``python -m train CONFIG.yaml [section.key=value ...]``.

Exit codes: 0, done; 2, the config, the data or the command line is wrong; 3, the loss or the
gradient is not finite; 130, interrupted.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

EPILOG = """\
Every setting is section.key, as in the YAML file, and can be given after it:
  python -m train configs/quickstart.yaml lora.rank=4 training.learning_rate=1e-3
Several runs at once, one for each combination, in one program:
  python -m train configs/quickstart.yaml sweep.learning_rate=[1e-4,1e-3] sweep.seed=[0,1]

exit codes: 0 done; 2 wrong input; 3 loss or gradient not finite; 130 interrupted
"""
BAD_INPUT, NOT_FINITE, INTERRUPTED = 2, 3, 130


def main(arguments: Sequence[str]) -> int:
    """Runs a command line.

    Args:
        arguments: What follows the command's name.

    Returns:
        The exit code.
    """
    options = parser().parse_intermixed_args(list(arguments))
    if options.schema:
        from .config import Config

        print(json.dumps(Config.model_json_schema(), indent=2))
        return 0
    try:
        return _run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("Interrupted. Add --resume to go on from the last checkpoint.", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = argparse.ArgumentParser(
        prog="python -m train",
        description="Fine-tunes a published model with LoRA, from one YAML file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("config", nargs="?", help="the YAML file; its paths are relative to it")
    top.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that win over the file"
    )
    existing = top.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="go on with the run in the output directory, if any"
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="replace the run in the output directory"
    )
    top.add_argument(
        "--dry-run",
        action="store_true",
        help="check all of it and show what would run: settings, weights, an example, memory",
    )
    top.add_argument("--json", action="store_true", help="print the result as JSON, and only it")
    top.add_argument("--schema", action="store_true", help="print the config's JSON schema")
    return top


def _run(options: argparse.Namespace) -> int:
    from .config_file import load

    if options.config is None:
        raise ValueError("give a config file: python -m train CONFIG.yaml (or --help)")
    choice = [name for name in ("resume", "overwrite") if getattr(options, name)]
    existing = [f"output.on_existing={name}" for name in choice]
    config = load(options.config, [*options.overrides, *existing])
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file it writes

    from . import finetune, sweep
    from .console import Console
    from .members import members, swept

    console = Console(stderr=options.json)
    run = sweep.run if swept(config) else finetune.run
    if options.dry_run:
        from .dry_run import dry_run

        if swept(config):
            own = members(config)
            console.say(f"a sweep of {len(own)} runs: what follows is of the first alone")
            config = next(iter(own.values()))
        result: dict[str, Any] = dry_run(config, console)
    else:
        try:
            result = run(config, console)
        except finetune.NotFiniteError as error:
            print(f"error: {error}", file=sys.stderr)
            return NOT_FINITE
    if options.json:
        print(json.dumps(result))
    return 0
