"""Directories written whole or not at all: made beside the target, then renamed."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_directory(target: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty directory beside ``target`` that takes its name when the block ends.

    If the block raises, nothing is left behind and ``target`` is as it was.

    Args:
        target: Where the result shall stand. Its parents are made; a symlink is followed and
            stays one.
        overwrite: Whether a directory with files in it may be replaced.

    Raises:
        ValueError: ``target`` is a file, or holds files and ``overwrite`` is False.
    """
    target = Path(os.path.realpath(target))  # a directory cannot be renamed over a symlink
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: name a directory.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"{target} holds files already: pass overwrite=True or a new name.")
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    beside.mkdir()
    try:
        yield beside
        _replace(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        for parent in made:  # the nearest first; those that hold something stay
            with contextlib.suppress(OSError):
                parent.rmdir()


def _replace(beside: Path, target: Path) -> None:
    if not (target.is_dir() and any(target.iterdir())):
        os.rename(beside, target)
        return
    old = beside.with_name(f"{beside.name}.old")
    os.rename(target, old)
    os.rename(beside, target)
    shutil.rmtree(old)
