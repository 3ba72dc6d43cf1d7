"""Adapters written: our factors under PEFT's names, or an error that names what has none."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from lora_jax._config import LoraConfig
from lora_jax._weights import LoraFactors
from lora_jax.io import _adapter_config
from lora_jax.io._adapter_config import PREFIX, WEIGHTS
from lora_jax.io._directory import new_directory
from lora_jax.io.hugging_face import published_tensors
from lora_jax.io.names import NameTable, Published

if TYPE_CHECKING:
    from lora_jax.models import Pretrained


def save_adapter(
    directory: str | os.PathLike,
    trainable: Mapping[str, Any],
    config: LoraConfig,
    model: "Pretrained",
    *,
    base_model: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes what was trained as an adapter that PEFT loads, whole or not at all.

    Args:
        directory: Where; made, with its parents.
        trainable: The trainable half of `lora_jax.split`.
        config: The config that it was split with.
        model: The model that was split.
        base_model: Hub id of the base, for ``base_model_name_or_path``; the id that ``model``
            was loaded by if None, and null if that was a directory.
        overwrite: Whether a directory that holds files may be replaced.

    Raises:
        ValueError: Weights that the format cannot express here, all of them listed: targets
            that are not matrices of Linear modules, a module of which only a part is trained,
            a newly drawn head that is not trained; or ``directory`` holds files.
    """
    low_rank = {path: f for path, f in trainable.items() if isinstance(f, LoraFactors)}
    full = {path: weight for path, weight in trainable.items() if path not in low_rank}
    problems = [
        *_unnamed(trainable, model.names),
        *(p for path, f in low_rank.items() for p in _inexpressible(path, f, model)),
        *_partly_trained(full, model),
        *_untrained(full, model),
    ]
    if problems or not low_rank:
        listed = "".join(f"\n  {p}" for p in problems or ["no weight is adapted: save the model"])
        raise ValueError(f"This cannot be written as an adapter:{listed}")
    modules = [m for path, f in low_rank.items() for m in _modules(model.names.entries[path], f)]
    tensors = {PREFIX + m.name + ".lora_A.weight": m.a.T for m in modules}
    tensors |= {PREFIX + m.name + ".lora_B.weight": m.b.T for m in modules}
    for path, weight in full.items():
        published = published_tensors(model.names.entries[path], weight)
        tensors |= {PREFIX + name: tensor for name, tensor in published.items()}
    fields = _fields(modules, full, config, model, base_model or model.hub_id)
    with new_directory(directory, overwrite=overwrite) as beside:
        contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        save_file(contiguous, beside / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(fields, indent=2, sort_keys=True)
        (beside / _adapter_config.FILE).write_text(text + "\n", encoding="utf-8")
    return Path(directory)


class _Module(NamedTuple):
    """The adapter of one published module: ``a (in, rank)`` and ``b (rank, out)``."""

    name: str
    a: np.ndarray
    b: np.ndarray
    scale: float


def _modules(entry: Published, factors: LoraFactors) -> list[_Module]:
    a, b = np.asarray(factors.a), np.asarray(factors.b)
    layers = zip(a, b, strict=True) if entry.stacked else [(a, b)]
    return [
        _Module(name, one_a, one_b, factors.scale)
        for name, (one_a, one_b) in zip(entry.modules, layers, strict=True)
    ]


def _unnamed(trainable: Iterable[str], names: NameTable) -> list[str]:
    return [
        f"{path} is not a weight of the model" for path in trainable if path not in names.entries
    ]


def _inexpressible(path: str, factors: LoraFactors, model: "Pretrained") -> Iterable[str]:
    entry = model.names.entries.get(path)
    if entry is None:
        return
    layout = ("stack", "in", "out") if entry.stacked else ("in", "out")
    if not entry.transposed or factors.layout != layout:
        yield f"{path}: only kernels of Linear modules, laid out {layout}, can be adapted"
    elif model.names.in_head(path):
        yield f"{path}: PEFT trains a head in full and would ignore the factors"


def _partly_trained(full: Iterable[str], model: "Pretrained") -> Iterable[str]:
    """PEFT saves whole modules; of a head, the whole head."""
    full = set(full)
    groups: dict[str, list[str]] = {}
    for path in model.names.entries:
        groups.setdefault(_saved_as(path, model.names)[0], []).append(path)
    for module, paths in groups.items():
        trained = full.intersection(paths)
        if trained and (missing := sorted(set(paths) - trained)):
            yield f"{', '.join(sorted(trained))}: PEFT saves whole modules; also train {missing}"
        if trained and model.names.tied and _is_tied(module, model.names):
            yield f"{', '.join(sorted(trained))}: tied to the decoder, which PEFT would copy"


def _is_tied(module: str, names: NameTable) -> bool:
    ends = {names.key(name) for pair in names.tied.items() for name in pair}
    return any(name.startswith(f"{names.key(module)}.") for name in ends)


def _untrained(full: Iterable[str], model: "Pretrained") -> list[str]:
    left = [path for path in model.new if path not in set(full)]
    return [f"{path} was newly drawn and is not trained: `train` it in full" for path in left]


def _saved_as(path: str, names: NameTable) -> list[str]:
    """What ``modules_to_save`` calls the owner of a weight: a head's top module, else its own."""
    entry = names.entries[path]
    if names.in_head(path):
        return [entry.tensors[0].partition(".")[0]]
    return list(entry.modules)


def _fields(
    modules: list[_Module],
    full: Iterable[str],
    config: LoraConfig,
    model: "Pretrained",
    base_model: str | None,
) -> dict[str, Any]:
    """``adapter_config.json``, every field explicit."""
    ranks = {m.name: m.a.shape[-1] for m in modules}
    alphas = {m.name: _alpha(m, config.use_rslora) for m in modules}
    saved = sorted({m for path in full for m in _saved_as(path, model.names)})
    linear = [m for e in model.names.entries.values() if e.transposed for m in e.modules]
    unused = [name.removesuffix(".weight") for name in model.names.unused]
    return {
        "peft_type": "LORA",
        "task_type": _task_type(saved, model),
        "base_model_name_or_path": base_model,
        "r": config.rank,
        "lora_alpha": _number(config.alpha),
        "rank_pattern": {m: rank for m, rank in ranks.items() if rank != config.rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != _number(config.alpha)},
        "use_rslora": config.use_rslora,
        "lora_dropout": config.dropout,
        "target_modules": _adapter_config.covering_names(ranks, {*linear, *unused}),
        "modules_to_save": saved or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _task_type(saved: list[str], model: "Pretrained") -> str | None:
    """PEFT's name of the task; null where the file has no head, which PEFT would look for."""
    has_head = any(map(model.names.in_head, model.names.entries))
    head_is_saved = any("." not in module for module in saved)
    return _adapter_config.TASK_TYPES[model.task] if head_is_saved or not has_head else None


def _alpha(module: _Module, use_rslora: bool) -> float:
    rank = module.a.shape[-1]
    return _number(module.scale * (math.sqrt(rank) if use_rslora else rank))


def _number(value: float) -> float:
    """Without the rounding of ``alpha / rank * rank``, and whole numbers as such."""
    value = float(f"{value:.12g}")
    return int(value) if value.is_integer() else value
