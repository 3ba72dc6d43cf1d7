"""The command line: ``python -m train CONFIG.yaml [section.key=value ...]``.

Exit codes: 0, done; 1, a file could not be written, or a fault; 2, the config, the data or the
command line is wrong; 3, the loss or the gradient is not finite; 4, another process of the run is
gone; 130 and 143, asked to stop by SIGINT or SIGTERM, after saving.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence

from . import supervisor
from .cluster import is_told
from .exit_codes import explained

EPILOG = """\
Every setting is section.key, as in the YAML file, and can be given after it:
  python -m train configs/quickstart.yaml lora.rank=4 training.learning_rate=1e-3
Several runs at once, one for each combination, in one program:
  python -m train configs/quickstart.yaml sweep.learning_rate=[1e-4,1e-3] sweep.seed=[0,1]

exit codes: 0 done; 1 not written, or a fault; 2 wrong input; 3 loss or gradient not finite;
4 another process is gone; 130, 143 stopped by SIGINT, SIGTERM, after saving: --resume goes on
"""


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
    several = is_told(options.config, options.overrides, os.environ)
    if (several or options.max_restarts) and supervisor.WATCHED not in os.environ:
        return supervisor.supervise(arguments, options.max_restarts, several=several)
    code, message = _outcome(options)
    if message:
        print(message, file=sys.stderr)
    return code


def restarts(text: str) -> int:
    """A number of restarts.

    Raises:
        ValueError: It is none, or below 0.
    """
    if (number := int(text)) < 0:
        raise ValueError(f"{number} is below 0")
    return number


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
    top.add_argument(
        "--max-restarts", type=restarts, default=0, metavar="N",
        help="after a crash go on from the last checkpoint, at most so often (%(default)s)",
    )  # fmt: skip
    top.add_argument("--json", action="store_true", help="print the result as JSON, and only it")
    top.add_argument("--schema", action="store_true", help="print the config's JSON schema")
    return top


def _outcome(options: argparse.Namespace) -> tuple[int, str]:
    """The exit code, and what to say beside it."""
    try:
        return _run(options), ""
    except (Exception, KeyboardInterrupt) as error:
        from . import processes

        processes.leave_at_once(error)
        if (found := explained(error)) is None:
            raise
        return found


def _run(options: argparse.Namespace) -> int:
    from .config_file import load

    if options.config is None:
        raise ValueError("give a config file: python -m train CONFIG.yaml (or --help)")
    choice = [name for name in ("resume", "overwrite") if getattr(options, name)]
    existing = [f"output.on_existing={name}" for name in choice]
    config = load(options.config, [*options.overrides, *existing])
    from . import processes
    from .console import Console
    from .dry_run import dry_run
    from .finetune import run
    from .members import members, swept
    from .sweep import run as run_sweep

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of every file it writes
    processes.start(config.distributed)
    console = Console(stderr=options.json, quiet=not processes.is_first())
    do = run_sweep if swept(config) else run
    if options.dry_run:
        if swept(config):
            own = members(config)
            console.say(f"a sweep of {len(own)} runs: what follows is of the first alone")
            config = next(iter(own.values()))
        do = dry_run
    result = do(config, console)
    if options.json and processes.is_first():
        print(json.dumps(result))
    return 0
