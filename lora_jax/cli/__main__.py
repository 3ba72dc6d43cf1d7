"""Runs the command from a checkout: ``python -m lora_jax.cli doctor``."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
