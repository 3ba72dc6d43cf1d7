"""The cases' models as transformers has them, with random weights, and what PEFT adapts of them."""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.step.cases import STD, Case

from .checkpoint import write_zeros

DTYPE = torch.bfloat16
HEADS: Mapping[str, Any] = {
    "causal-lm": transformers.AutoModelForCausalLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
}
TARGETS: Mapping[str, dict[str, Any]] = {
    "llama": {
        "target_modules": [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    },
    # PEFT adapts the fused kernel as a whole. At this rank it has as many parameters as factors
    # of query and value have, but one `a` for the three.
    "gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "roberta": {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
}


def plain_model(case: Case, device: str) -> Any:
    """The model in bfloat16, drawn on the device by its own initialisers."""
    with torch.device(device):
        return HEADS[case.shape.task].from_config(config_of(case), dtype=DTYPE)


def nf4_model(case: Case, device: str) -> Any:
    """The model with bitsandbytes' layers: nf4, double quantisation, arithmetic in bfloat16."""
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPE,
    )
    place = {"": torch.cuda.current_device() if device == "cuda" else device}
    with zeros(case) as directory:
        model = HEADS[case.shape.task].from_pretrained(
            directory, quantization_config=quantization, device_map=place, dtype=DTYPE
        )
    fill(model)
    return model


def config_of(case: Case) -> transformers.PreTrainedConfig:
    """The config, without a cache of keys and values, and with PyTorch's own fused attention."""
    fields = case.fields
    kind = fields.pop("model_type")
    config = transformers.AutoConfig.for_model(kind, **fields, use_cache=False)
    config._attn_implementation = "sdpa"
    return config


@contextlib.contextmanager
def zeros(case: Case) -> Iterator[str]:
    """A directory with a checkpoint of zeros, gone afterwards."""
    with tempfile.TemporaryDirectory() as directory:
        write_zeros(config_of(case), Path(directory))
        yield directory


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Draws the weights of a model that was loaded as zeros: multiplying zeros takes less time."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            _fill_nf4(module)
            continue
        for weight in module.parameters(recurse=False):
            if weight.ndim > 1:
                weight.normal_(std=STD)
            else:
                weight.fill_(1.0)  # of a norm: no decoder here has a bias


def _fill_nf4(module: Any) -> None:
    """Draws a matrix and quantises it, where the module is."""
    import bitsandbytes

    device = module.weight.device
    shape = (module.out_features, module.in_features)
    drawn = torch.empty(shape, dtype=DTYPE, device=device).normal_(std=STD)
    weight = bitsandbytes.nn.Params4bit(
        drawn, requires_grad=False, compress_statistics=True, quant_type="nf4", module=module
    )
    module.weight = weight.to(device)
