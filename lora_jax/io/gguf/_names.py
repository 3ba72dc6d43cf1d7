"""The published name of every tensor of a GGUF file, and what undoes GGUF's layout of it.

"blk.3.attn_q.weight"   ->   "model.layers.3.self_attn.q_proj.weight", rows to be reordered

llama.cpp's converter stores the q and k rows of its ``llama`` architecture for interleaved rotary
pairs, Gemma's norms with one added, and GPT-2's matrices as (out, in).
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax.io.gguf._header import Header

ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3's scaling of its rotations: no weight, but part of the configuration."""

Restore = Callable[[np.ndarray], np.ndarray]

_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMED_HEADS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA3_LAYER = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2_LAYER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GPT2_TOP = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_BLOCK = re.compile(r"blk\.(\d{1,6})\.([a-z_]+)\.(weight|bias)", re.ASCII)
_OUTSIDE = re.compile(r"([a-z_]+)\.(weight|bias)", re.ASCII)


class Names(NamedTuple):
    """The names of one architecture.

    Attributes:
        top: Tensors outside the layers, without ``.weight`` or ``.bias``.
        layer: Tensors of a layer, likewise.
        prefix: Of a layer, before its number.
    """

    top: Mapping[str, str]
    layer: Mapping[str, str]
    prefix: str


NAMES: Mapping[str, Names] = {
    "llama": Names(_TOP, _LAYER, "model.layers"),
    "qwen2": Names(_TOP, _LAYER, "model.layers"),
    "qwen3": Names(_TOP, {**_LAYER, **_NORMED_HEADS}, "model.layers"),
    "gemma3": Names(_TOP, {**_LAYER, **_NORMED_HEADS, **_GEMMA3_LAYER}, "model.layers"),
    "gpt2": Names(_GPT2_TOP, _GPT2_LAYER, "transformer.h"),
}
"""By the value of ``general.architecture``."""


def published_names(header: Header, architecture: str) -> dict[str, str]:
    """Published name to the file's own, of every weight.

    Raises:
        ValueError: Tensors that the architecture does not have, in one list.
    """
    found = {}
    unknown = []
    for stored in header.tensors:
        name = _published(stored, NAMES[architecture])
        if name is not None:
            found[name] = stored
        elif not (stored == ROPE_FACTORS and architecture == "llama"):
            unknown.append(stored)
    if unknown:
        raise ValueError(
            f"{header.file} has tensors that a {architecture} model lacks: "
            f"{', '.join(unknown[:20])}{', …' * (len(unknown) > 20)}."
        )
    return found


def _published(stored: str, names: Names) -> str | None:
    if match := _BLOCK.fullmatch(stored):
        layer, part, kind = match.groups()
        where = names.layer.get(part)
        return None if where is None else f"{names.prefix}.{int(layer)}.{where}.{kind}"
    match = _OUTSIDE.fullmatch(stored)
    where = names.top.get(match[1]) if match else None
    return f"{where}.{match[2]}" if match and where else None


def restoring(stored: str, architecture: str, config_json: Mapping[str, Any]) -> Restore:
    """What turns a tensor as GGUF lays it out into the published one.

    Args:
        stored: Its name in the file.
        architecture: The value of ``general.architecture``.
        config_json: As `lora_jax.io.gguf.read_config_json` gives it.
    """
    part = stored.split(".")[-2]
    if architecture == "llama" and part in ("attn_q", "attn_k"):
        heads = "num_attention_heads" if part == "attn_q" else "num_key_value_heads"
        return functools.partial(split_pairs, heads=config_json[heads])
    if architecture == "gemma3" and part.endswith("norm"):
        return _minus_one
    if architecture == "gpt2" and part in _GPT2_LAYER and not part.endswith("norm"):
        return np.transpose
    return np.asarray


def split_pairs(weight: np.ndarray, *, heads: int) -> np.ndarray:
    """Rows of interleaved rotary pairs, as the published models have them: all first halves first.

    In each head, rows 0, 1, 2, 3, … of the result are rows 0, 2, 4, …, then 1, 3, 5, ….

    Args:
        weight: ``(heads * head_dim, in)``, or a bias ``(heads * head_dim,)``.
        heads: Of the queries, or of the keys.
    """
    pairs = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _minus_one(weight: np.ndarray) -> np.ndarray:
    return weight - np.float32(1)
