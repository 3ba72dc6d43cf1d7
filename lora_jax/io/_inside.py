"""Files of a directory that came from others: plain names, and no links that lead out of it."""

from pathlib import Path

MAX_NAME = 255  # bytes, as file systems have it


def checked_file(directory: Path, name: str) -> Path:
    """A file of a directory, by a name that another of its files gives.

    A snapshot of the hub's cache links to its blobs; such links are followed, no others.

    Raises:
        ValueError: The name is not that of a file inside the directory.
    """
    leads_on = name in ("", ".", "..") or any(letter in name for letter in "/\\:")
    if leads_on or not name.isprintable() or len(name.encode()) > MAX_NAME:
        raise ValueError("only plain file names are read.")
    file = directory / name
    if not file.is_file():
        raise ValueError(f"{directory} has no such file.")
    check_inside(file)
    return file


def check_inside(file: Path) -> None:
    """Refuses a link that leads out of its directory.

    Raises:
        ValueError: It is one.
    """
    real = file.resolve()
    if not any(real.is_relative_to(root) for root in _roots(file.parent)):
        raise ValueError(f"{file} is a link to {real}, outside its directory: copy the file there.")


def _roots(directory: Path) -> list[Path]:
    """The directory, and for a snapshot of the hub's cache the blobs that it links to."""
    here = directory.resolve()
    blobs = [here.parent.parent / "blobs"] if here.parent.name == "snapshots" else []
    return [here, *blobs]
