"""The cases: a model, how it is adapted, and what its step must compute.

    flops a token = 4 * parameters of frozen matrices + attention

A frozen matrix costs 2 flops a parameter forwards and 2 backwards, for ``dx``; its own gradient,
2 more, is what LoRA does without.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks.claims.shapes import SHAPES, Shape

ALPHA = 16.0
STD = 0.02  # of random weights
LEARNING_RATE, WEIGHT_DECAY = 1e-4, 1e-2  # of AdamW

NO_DROPOUT: Mapping[str, Mapping[str, float]] = {
    "llama": {},
    "gpt2": dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    "roberta": dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One row of work.

    Attributes:
        shape: The model, its targets and rank, and the size of a batch.
        remat: Whether every layer is recomputed in the backward pass, by every contender.
        policy: What ours recomputes where it is not every layer; see `lora_jax.models._remat`.
        scheme: What the base is quantised in; None is bfloat16.
        chunk: Of ours: tokens whose logits exist at a time; 0 is all.
    """

    shape: Shape
    remat: bool = False
    policy: str = "none"
    scheme: str | None = None
    chunk: int = 1024

    @property
    def fields(self) -> dict[str, Any]:
        """The model's ``config.json``, without dropout: so all contenders do the same."""
        fields = self.shape.fields
        return dict(fields) | dict(NO_DROPOUT[fields["model_type"]])


def _case(size: str, **options: Any) -> Case:
    return Case(shape=SHAPES[size], **options)


CASES: Mapping[str, Case] = {
    "llama-1b": _case("llama-1b", policy="named"),
    "llama-1b-remat": _case("llama-1b", remat=True, chunk=512),
    "llama-8b": _case("llama-8b", policy="named"),
    "llama-8b-nf4": _case("llama-8b", policy="named", scheme="nf4", chunk=512),
    "llama-8b-nf4-remat": _case("llama-8b", scheme="nf4", remat=True, chunk=512),
    "gpt2-medium": _case("gpt2-medium"),
    "roberta-base": _case("roberta-base", policy="dots"),
    "tiny": _case("tiny"),
    "tiny-remat": _case("tiny", remat=True),
    "tiny-nf4": _case("tiny", scheme="nf4"),
    "tiny-gpt2": _case("tiny-gpt2"),
    "tiny-roberta": _case("tiny-roberta"),
}


def describe(case: Case) -> str:
    """The work in a line."""
    shape = case.shape
    parts = [
        f"{shape.fields['model_type']}, batch {shape.batch} x {shape.length}",
        f"rank {shape.rank} on {', '.join(shape.lora['targets'])}",
        "base in bfloat16" if case.scheme is None else f"base in {case.scheme}",
        "every layer recomputed" if case.remat else "",
    ]
    return "; ".join(part for part in parts if part)


def flops_a_token(case: Case) -> int:
    """What one token of a step costs, without what is computed again and without the factors.

    >>> flops_a_token(CASES["llama-8b"]) / 1e9  # 4 * 7.50 + 6 * 2048 * 4096 * 32 / 1e9
    31.62...
    """
    layers, width, _ = _sizes(case.shape.fields)
    causal = case.shape.task == "causal-lm"
    # Scores and their product with the values, 2 flops each, thrice: forwards, and two backwards.
    # A causal row sees half of the others.
    attention = (6 if causal else 12) * case.shape.length * width * layers
    return 4 * matrix_parameters(case.shape.fields, head=causal) + attention


def matrix_parameters(fields: Mapping[str, Any], *, head: bool) -> int:
    """Parameters of the matrices that every token is multiplied by.

    Args:
        fields: The model's ``config.json``.
        head: Whether every token is multiplied by the table of words in the end.
    """
    layers, width, inner = _sizes(fields)
    if fields["model_type"] == "llama":
        shared = fields["num_key_value_heads"] / fields["num_attention_heads"]
        layer = int(2 * width * width * (1 + shared)) + 3 * width * inner
    else:
        layer = 4 * width * width + 2 * width * inner
    return layers * layer + (width * fields["vocab_size"] if head else 0)


def _sizes(fields: Mapping[str, Any]) -> tuple[int, int, int]:
    """Layers, width, and width inside the MLP."""
    if fields["model_type"] == "gpt2":
        return fields["n_layer"], fields["n_embd"], 4 * fields["n_embd"]
    return fields["num_hidden_layers"], fields["hidden_size"], fields["intermediate_size"]
