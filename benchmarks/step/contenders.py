"""Who is measured, what each needs to be installed, and which models it is made for.

What a row of this table says of a peer's settings is how that peer's users run it.
"""

import dataclasses
import importlib.util
from collections.abc import Mapping

from .cases import Case


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender:
    """One way to take a step.

    Attributes:
        module: What measures it: a module with ``measure(job) -> figures``.
        is_what: In a few words.
        needs: Packages: name to import -> name to install.
        model_types: Those it is made for; None is all.
    """

    module: str
    is_what: str
    needs: Mapping[str, str]
    model_types: tuple[str, ...] | None = None


_TORCH = {"torch": "torch", "transformers": "transformers", "peft": "peft"}
_PEFT = "benchmarks.peers.peft_step"
OURS = "ours"

CONTENDERS: Mapping[str, Contender] = {
    OURS: Contender(
        module="benchmarks.step.ours", is_what="lora_jax, float32 factors", needs={"jax": "jax"}
    ),
    "unsloth": Contender(
        module="benchmarks.peers.unsloth_step",
        is_what="Unsloth, float32 factors, its own kernels and checkpointing",
        needs=_TORCH
        | {"unsloth": "unsloth", "unsloth_zoo": "unsloth_zoo", "trl": "trl"}
        | {"datasets": "datasets"},
        model_types=("llama",),
    ),
    "peft": Contender(module=_PEFT, is_what="PEFT as it comes: float32 factors", needs=_TORCH),
    "liger": Contender(
        module=_PEFT,
        is_what="PEFT with Liger's kernels, bfloat16 factors",
        needs=_TORCH | {"liger_kernel": "liger-kernel"},
        model_types=("llama",),
    ),
    "peft-compile": Contender(
        module=_PEFT, is_what="PEFT under torch.compile, bfloat16 factors", needs=_TORCH
    ),
    "peft-autocast": Contender(
        module=_PEFT, is_what="PEFT under bfloat16 autocast, float32 factors", needs=_TORCH
    ),
    "peft-bf16": Contender(module=_PEFT, is_what="PEFT, bfloat16 factors", needs=_TORCH),
}
DEFAULT = (OURS, "unsloth", "peft", "peft-autocast", "liger", "peft-compile")


def why_not(name: str, case: Case) -> str | None:
    """Why a contender cannot take part in a case; None if it can."""
    contender, model_type = CONTENDERS[name], case.shape.fields["model_type"]
    if contender.model_types is not None and model_type not in contender.model_types:
        return f"is made for {', '.join(contender.model_types)}, not for {model_type}"
    needs = dict(contender.needs)
    if case.scheme is not None and name != OURS:
        needs["bitsandbytes"] = "bitsandbytes"
    missing = [needs[module] for module in needs if importlib.util.find_spec(module) is None]
    return f"not installed: {', '.join(missing)}" if missing else None
