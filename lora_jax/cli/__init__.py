"""The ``lora-jax`` command: each subcommand is a function from its arguments to an exit code.

    lora-jax train CONFIG.yaml [section.key=value ...]
    lora-jax eval RUN_DIRECTORY
    lora-jax inspect MODEL --targets query value
    lora-jax generate --model MODEL --adapter DIR --prompt TEXT ...
    lora-jax merge --base MODEL --adapter DIR --out DIR
    lora-jax export --base MODEL --adapter DIR --out DIR --profile vllm
    lora-jax doctor

0 is success, 1 a check that failed, 2 input that cannot be used (one line says why).
"""

import argparse
import sys
from collections.abc import Sequence

from . import _application, _doctor, _export, _generate, _inspect, _merge

INTERRUPTED = 130
LISTED = 3  # of the problems of one error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``lora-jax`` with the given arguments, by default those of the command line.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in _application.MODULES:
            return _application.run(arguments[0], arguments[1:])
        options = _parser().parse_args(arguments)
        return options.run(options)
    except SystemExit as stop:  # argparse has printed the help or the error
        return stop.code if isinstance(stop.code, int) else 2
    except (ValueError, OSError) as error:
        print(f"lora-jax {arguments[0]}: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def _one_line(error: Exception) -> str:
    """What an error says, its first problems where it lists many."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    more = [f"... and {len(lines) - LISTED - 1} more"] if len(lines) > LISTED + 1 else []
    return " ".join([*lines[: LISTED + 1], *more])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-jax",
        description="Low-rank adaptation for JAX.",
        epilog="`lora-jax COMMAND --help` says more.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in _application.MODULES.items():
        commands.add_parser(name, help=text, add_help=False)
    _inspect.add_command(commands)
    _generate.add_command(commands)
    _merge.add_command(commands)
    _export.add_command(commands)
    _doctor.add_command(commands)
    return parser
