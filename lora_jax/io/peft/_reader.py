"""Adapters read: every tensor has a place and every place a tensor, or one error lists them."""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._config import LoraConfig
from lora_jax._partition import split
from lora_jax._paths import flatten
from lora_jax._weights import Factors
from lora_jax.io._safetensors import Tensor, tensors_in
from lora_jax.io.hugging_face import pickles_in, read_weight
from lora_jax.io.peft import _config, _found, _parts
from lora_jax.io.peft._checks import Adapter, problems
from lora_jax.io.peft._config import WEIGHTS, commonest, tidy
from lora_jax.io.peft._found import Pair

if TYPE_CHECKING:
    from lora_jax.models import Pretrained


def load_adapter(
    directory: str | os.PathLike, model: "Pretrained"
) -> tuple[Any, dict[str, Any], LoraConfig]:
    """Reads an adapter that PEFT or `save_adapter` wrote.

    Factors keep float32, weights trained in full take the dtype of the model's, and the place of
    its codes if it is quantised. Where PEFT
    keeps a weight twice (tied embeddings; a module's own copy of the base) both must agree.

    Args:
        directory: With ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: The base model. Scanned layers take an adapter that is on every layer, at one
            rank and one alpha.

    Returns:
        ``(frozen, trainable, config)``: as `lora_jax.split` gives them, with the adapter's
        values in place of fresh ones, ready for `lora_jax.combine` and `lora_jax.merge`.

    Raises:
        ValueError: The config is not supported, or tensors are missing, unmapped or of another
            shape, not among the config's targets, or mean something that one tied weight
            cannot; all are listed.
    """
    directory = Path(directory)
    fields = _config.read(directory)
    tensors = _tensors(directory)
    parts = _parts.read_note(directory / WEIGHTS)
    found = _found.sort(tensors, model.names, biases_train=fields.bias != "none")
    weights, treedef = flatten(model.params)
    adapter = Adapter(found, fields, parts, model.names, weights)
    if listed := "".join(f"\n  {problem}" for problem in problems(adapter)):
        raise ValueError(f"The adapter in {directory} does not fit the model:{listed}")
    config = _lora_config(adapter)
    # What comes in full takes the place of the model's, which may be codes.
    whole = {
        path: jax.ShapeDtypeStruct(weights[path].shape, weights[path].dtype) for path in found.full
    }
    params = treedef.unflatten((weights | whole).values())
    frozen, trainable = split(params, config, jax.random.key(0))
    for path in found.low_rank:
        trainable[path] = _read_factors(adapter, path, trainable[path])
    for path, layers in found.full.items():
        in_order = tuple(layers[index] for index in sorted(layers))
        trainable[path] = read_weight(model.names.entries[path], in_order, weights[path].dtype)
    return frozen, trainable, config


def _tensors(directory: Path) -> dict[str, Tensor]:
    if (directory / WEIGHTS).is_file():
        return tensors_in(directory / WEIGHTS)
    if pickles := pickles_in(directory):
        raise ValueError(
            f"{directory} has its weights in {', '.join(pickles)} only, a pickle file, which "
            "runs code when it is opened, so it is not read. Convert it where PEFT is installed: "
            'PeftModel.from_pretrained(base, "old").save_pretrained("new") writes safetensors.'
        )
    raise ValueError(f"{directory} has no {WEIGHTS}.")


def _lora_config(adapter: Adapter) -> LoraConfig:
    """Our config of a file: the commonest rank and alpha, patterns for the others."""
    found, fields, entries = adapter.found, adapter.config, adapter.names.entries
    first = {path: next(iter(pairs.values())) for path, pairs in found.low_rank.items()}
    parts = {path: adapter.parts.get(pair.module) for path, pair in first.items()}
    ranks = {path: fields.rank(m.module) // sum(parts[path] or (1,)) for path, m in first.items()}
    alphas = {path: _alpha(adapter, pair) for path, pair in first.items()}
    rank, alpha = commonest(ranks.values()), commonest(alphas.values())
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        targets=tuple(map(re.escape, sorted(first))),
        rank_pattern={re.escape(p): r for p, r in ranks.items() if r != rank},
        alpha_pattern={re.escape(p): a for p, a in alphas.items() if a != alpha},
        use_rslora=fields.use_rslora,
        dropout=fields.lora_dropout,
        train=tuple(map(re.escape, sorted(found.full))),
        layouts={re.escape(path): "stack in out" for path in first if entries[path].stacked},
        parts={re.escape(path): flags for path, flags in parts.items() if flags},
    )


def _alpha(adapter: Adapter, pair: Pair) -> float:
    """The alpha that gives the rank of one part the scale of the file's whole rank."""
    alpha, n = adapter.config.alpha(pair.module), sum(adapter.parts.get(pair.module, (1,)))
    if n == 1:
        return alpha
    return tidy(alpha / (math.sqrt(n) if adapter.config.use_rslora else n), 12)


def _read_factors(adapter: Adapter, path: str, fresh: Factors) -> Factors:
    """The factors of a weight, in place of fresh ones of the same shapes."""
    pairs = [pair for _, pair in sorted(adapter.found.low_rank[path].items())]
    layers = [_read_pair(pair, adapter.parts) for pair in pairs]
    is_stacked = adapter.names.entries[path].stacked
    a, b = (np.stack(each) if is_stacked else each[0] for each in zip(*layers, strict=True))
    dtype = fresh.a.dtype
    return dataclasses.replace(fresh, a=jnp.asarray(a, dtype), b=jnp.asarray(b, dtype))


def _read_pair(pair: Pair, parts: Mapping[str, tuple[bool, ...]]) -> tuple[np.ndarray, np.ndarray]:
    assert pair.a is not None
    assert pair.b is not None
    a, b = pair.a.read().T, pair.b.read().T
    return _parts.take_apart(a, b, parts[pair.module]) if pair.module in parts else (a, b)
