"""PEFT's step: as it comes, with bfloat16 factors, under autocast, compiled, with Liger's kernels.

PEFT casts the input of float32 factors up and multiplies in float32, unless autocast is on.
"""

import dataclasses
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import peft
import torch

from benchmarks.step.cases import ALPHA, Case
from benchmarks.step.job import Job

from .models import TARGETS, nf4_model, plain_model
from .torch_step import measure as measure_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One way to run PEFT.

    Attributes:
        wide: Whether factors are float32, PEFT's default, and not of the base's dtype.
        autocast: Whether the forward pass runs under bfloat16 autocast, as trainers have it.
        compiled: Whether the model is compiled by ``torch.compile``.
        liger: Whether Liger's kernels are put in place of transformers' layers and loss.
    """

    wide: bool = False
    autocast: bool = False
    compiled: bool = False
    liger: bool = False


SETTINGS: Mapping[str, Settings] = {
    "peft": Settings(wide=True),
    "peft-autocast": Settings(wide=True, autocast=True),
    "peft-bf16": Settings(),
    "peft-compile": Settings(compiled=True),
    "liger": Settings(liger=True),
}


def measure(job: Job) -> dict[str, Any]:
    """All figures of the contender that the job names."""
    settings = SETTINGS[job.contender]
    return measure_step(
        job,
        lambda device: make_model(job.work, settings, device),
        versions_of(job.work, settings),
        autocast=settings.autocast,
    )


def versions_of(case: Case, settings: Settings) -> dict[str, str]:
    """The versions of what a model is made with."""
    names = ["peft", "transformers"] + (["liger-kernel"] if settings.liger else [])
    names += ["bitsandbytes"] if case.scheme else []
    return {name: version(name) for name in names}


def make_model(case: Case, settings: Settings, device: str) -> Any:
    """The adapted model on a device."""
    if settings.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    model = (nf4_model if case.scheme else plain_model)(case, device)
    config = peft.LoraConfig(
        r=case.shape.rank,
        lora_alpha=ALPHA,  # pyright: ignore
        **TARGETS[case.shape.fields["model_type"]],
    )
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=settings.wide)
    if case.remat:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return torch.compile(model) if settings.compiled else model
