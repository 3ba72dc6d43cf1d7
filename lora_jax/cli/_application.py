"""``train`` and ``eval`` belong to the application; this hands them their arguments.

Installed, the application is the package ``lora_jax_train``; in a checkout it is the folder
``train`` beside the library. It is imported only here, and only when it is asked for.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

MODULES = {
    "train": "fine-tune a model: lora-jax train CONFIG.yaml [section.key=value ...]",
    "eval": "evaluate what a run left: lora-jax eval RUN_DIRECTORY",
}
_SUBMODULE = {"train": "cli", "eval": "evaluate"}

# Distribution -> module, for everything in the extra `train`.
EXTRAS = {
    "datasets": "datasets",
    "transformers": "transformers",
    "tokenizers": "tokenizers",
    "jinja2": "jinja2",
    "grain": "grain",
    "scikit-learn": "sklearn",
    "matplotlib": "matplotlib",
    "pydantic": "pydantic",
}


def run(command: str, arguments: Sequence[str]) -> int:
    """Runs a command of the application, or says how to install what it needs.

    Args:
        command: A key of `MODULES`.
        arguments: What follows it on the command line.

    Returns:
        The application's exit code; 2 if it or one of its packages is not installed.
    """
    try:
        return _load(_SUBMODULE[command]).main(list(arguments))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in {*EXTRAS.values(), "lora_jax_train"}:
            raise
        print(
            f"lora-jax {command}: {missing!r} is not installed. "
            "Install what training needs with: pip install 'lora_jax[train]'",
            file=sys.stderr,
        )
        return 2


def _load(submodule: str) -> ModuleType:
    package = "lora_jax_train"
    if importlib.util.find_spec(package) is None and _is_ours("train"):
        package = "train"
    return importlib.import_module(f"{package}.{submodule}")


def _is_ours(name: str) -> bool:
    """Whether a module is the folder beside the library, not someone else's of that name."""
    spec = importlib.util.find_spec(name)
    beside = Path(__file__).resolve().parents[2] / name
    return spec is not None and Path(spec.origin or "").resolve().parent == beside
