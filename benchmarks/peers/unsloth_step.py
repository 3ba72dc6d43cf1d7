"""Unsloth's step: its loader, its kernels, its fused loss, and its checkpointing where asked.

It has to be imported before transformers, which it patches, and loads from a directory alone.
"""

import unsloth  # isort: skip

from importlib.metadata import version
from typing import Any

from benchmarks.step.cases import ALPHA, Case
from benchmarks.step.job import Job

from .models import DTYPE, TARGETS, fill, zeros
from .torch_step import measure as measure_step


def measure(job: Job) -> dict[str, Any]:
    """All figures of Unsloth's step."""
    names = ("unsloth", "unsloth_zoo", "peft", "transformers")
    return measure_step(
        job,
        lambda _: make_model(job.work),
        {name: version(name) for name in names},
    )


def make_model(case: Case) -> Any:
    """The adapted model, on the device that it chooses: the accelerator."""
    fast: Any = unsloth.FastLanguageModel
    recompute = "unsloth" if case.remat else False
    with zeros(case) as directory:
        model, _ = fast.from_pretrained(
            directory,
            max_seq_length=case.shape.length,
            dtype=DTYPE,
            load_in_4bit=case.scheme == "nf4",
            use_exact_model_name=True,
            local_files_only=True,
            use_gradient_checkpointing=recompute,
        )
    fill(model)
    model = fast.get_peft_model(
        model,
        r=case.shape.rank,
        lora_alpha=ALPHA,
        use_gradient_checkpointing=recompute,
        **TARGETS["llama"],
    )
    return fast.for_training(model, use_gradient_checkpointing=recompute)
