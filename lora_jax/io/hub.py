"""Where a checkpoint is: a local directory, or an id on the Hugging Face hub."""

import os
import re
from pathlib import Path

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model"),
    *("sentencepiece.bpe.model", "spiece.model", "chat_template.jinja"),
)
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def find_checkpoint(
    source: str | os.PathLike, *, revision: str | None = None, weights: bool = True
) -> Path:
    """The local directory of a checkpoint, downloaded if need be.

    An existing directory is taken as it is and nothing is fetched. Anything that looks like a
    path is never fetched either: a ``Path``, a string that starts with ``.``, ``/`` or ``~``,
    ends with a separator, has more than one, or whose first segment is a directory here. Of
    what is fetched, only ``config.json``, safetensors files and tokenizer files.

    Set ``HF_HUB_OFFLINE=1`` to read the hub's local cache and never the network.

    Args:
        source: The directory or hub id.
        revision: Branch, tag or commit on the hub.
        weights: Whether the safetensors files are wanted.

    Raises:
        ValueError: There is no such directory, no such id, or no hub client installed.
    """
    expanded = Path(os.path.expanduser(source))
    if expanded.is_dir():
        return expanded
    if looks_like_path(source):
        found = "is a file" if expanded.exists() else "does not exist"
        raise ValueError(
            f"{os.fspath(source)!r} {found}: name the directory that holds config.json and "
            "model.safetensors, or a hub id such as 'google-bert/bert-base-uncased'."
        )
    return _download(os.fspath(source), revision, weights)


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
    wanted = ["config.json", *TOKENIZER_FILES, *(WEIGHT_FILES if weights else ())]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError) as e:
        raise ValueError(
            f"No directory {repo!r} here, and the hub did not give it: {e} "
            "(HF_HUB_OFFLINE=1 reads only what was fetched before.)"
        ) from e
