"""Runs the application: ``python -m train CONFIG.yaml [section.key=value ...]``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
