"""Packages that only the scores need, imported when a score is asked for."""

import importlib
from types import ModuleType


def load(module: str) -> ModuleType:
    """Imports a module of the extra ``scores``.

    Raises:
        ValueError: Its package is not installed; says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"Scores of generated text need the package {error.name!r}, which is not installed: "
            "pip install 'lora_jax[scores]'"
        ) from None
