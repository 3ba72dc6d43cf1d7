"""Adapters read: every tensor has a place and every place a tensor, or one error lists them."""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._config import LoraConfig
from lora_jax._partition import split
from lora_jax._paths import flatten
from lora_jax._weights import LoraFactors
from lora_jax.io import _adapter_config
from lora_jax.io._adapter_config import PREFIX, WEIGHTS
from lora_jax.io._safetensors import Tensor, tensors_in
from lora_jax.io.hugging_face import published_shape, read_weight
from lora_jax.io.names import NameTable, Published

if TYPE_CHECKING:
    from lora_jax.models import Pretrained

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_UNROLL = "load the model with scan_layers=False"


def load_adapter(
    directory: str | os.PathLike, model: "Pretrained"
) -> tuple[Any, dict[str, Any], LoraConfig]:
    """Reads an adapter that PEFT or `save_adapter` wrote.

    Args:
        directory: With ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: The base model. Scanned layers take an adapter that is on every layer, at one
            rank and one alpha.

    Returns:
        ``(frozen, trainable, config)``: as `lora_jax.split` gives them, with the adapter's
        values in place of fresh ones, ready for `lora_jax.combine` and `lora_jax.merge`.

    Raises:
        ValueError: The config is not supported, or tensors are missing, unmapped or of another
            shape; all are listed.
    """
    directory = Path(directory)
    fields = _adapter_config.read(directory)
    found = _sort(_tensors(directory), model.names)
    weights, _ = flatten(model.params)
    problems = [
        *found.problems,
        *_missing(found, fields, model.names),
        *(p for path in found.low_rank for p in _misfit_factors(path, found, fields, weights)),
        *(p for path in found.full for p in _misfit_weight(path, found, weights)),
    ]
    if problems or not found.low_rank:
        listed = "".join(f"\n  {p}" for p in problems or ["it has no lora_A and lora_B"])
        raise ValueError(f"The adapter in {directory} does not fit the model:{listed}")
    config = _config(found, fields)
    frozen, trainable = split(model.params, config, jax.random.key(0))
    for path, parts in found.low_rank.items():
        trainable[path] = _read_factors(trainable[path], found.entries[path], parts)
    for path, parts in found.full.items():
        entry = found.entries[path]
        tensors = tuple(parts[index] for index in range(len(entry.tensors)))
        trainable[path] = read_weight(entry, tensors, weights[path].dtype)
    return frozen, trainable, config


class _Factors(NamedTuple):
    """The two tensors of one module, by its name in the file; None where one is absent."""

    module: str
    a: Tensor | None = None
    b: Tensor | None = None


class _Found(NamedTuple):
    """An adapter's tensors, sorted by our paths and then by layer."""

    entries: Mapping[str, Published]
    low_rank: dict[str, dict[int, _Factors]]
    full: dict[str, dict[int, Tensor]]
    problems: list[str]


def _tensors(directory: Path) -> dict[str, Tensor]:
    if (directory / WEIGHTS).is_file():
        return tensors_in(directory / WEIGHTS)
    if pickles := sorted(file.name for file in directory.glob("*.bin")):
        raise ValueError(
            f"{directory} has its weights in {', '.join(pickles)} only, a pickle file, which "
            "runs code when it is opened. Save it again with a recent PEFT, as safetensors."
        )
    raise ValueError(f"{directory} has no {WEIGHTS}.")


def _sort(tensors: Mapping[str, Tensor], names: NameTable) -> _Found:
    places = {
        names.key(tensor): (entry, index)
        for entry in names.entries.values()
        for index, tensor in enumerate(entry.tensors)
    }
    found = _Found(names.entries, {}, {}, [])
    for name, tensor in tensors.items():
        bare = name.removeprefix(PREFIX)
        factor = _FACTOR.fullmatch(bare)
        weight = f"{factor['module']}.weight" if factor else bare
        entry, index = places.get(names.key(weight), (None, 0))
        if bare == name or entry is None or (factor and not entry.transposed):
            found.problems.append(f"unmapped: {name} {tensor.shape}")
        elif factor:
            layers = found.low_rank.setdefault(entry.path, {})
            one = layers.get(index, _Factors(factor["module"]))
            layers[index] = one._replace(**{factor["factor"].lower(): tensor})
        else:
            found.full.setdefault(entry.path, {})[index] = tensor
    return found


def _missing(found: _Found, fields: Mapping[str, Any], names: NameTable) -> Iterable[str]:
    """What the config promises, or a half implies, and the file does not have."""
    for path, layers in found.low_rank.items():
        for layer in layers.values():
            for factor in "ab":
                if getattr(layer, factor) is None:
                    yield f"missing: {PREFIX}{layer.module}.lora_{factor.upper()}.weight"
        if len(layers) < len(names.entries[path].tensors):
            yield f"missing: {path} is stacked; only layers {sorted(layers)} are adapted: {_UNROLL}"
    for path, entry in names.entries.items():
        absent = set(range(len(entry.tensors))) - found.full.get(path, {}).keys()
        for index in sorted(absent):
            tensor = entry.tensors[index]
            if path in found.full or _is_saved(tensor, fields["modules_to_save"]):
                yield f"missing: {PREFIX}{tensor}"
            elif entry.transposed and path not in found.low_rank and _is_target(tensor, fields):
                yield f"missing: {PREFIX}{tensor.removesuffix('.weight')}.lora_A.weight"


def _is_saved(tensor: str, modules: list[str] | None) -> bool:
    parts = tensor.split(".")
    owners = (".".join(parts[:end]) for end in range(1, len(parts)))
    return any(_adapter_config.names_module(modules, owner) for owner in owners)


def _is_target(tensor: str, fields: Mapping[str, Any]) -> bool:
    module = tensor.removesuffix(".weight")
    return (
        fields["layers_to_transform"] is None
        and fields["target_modules"] != "all-linear"
        and _adapter_config.names_module(fields["target_modules"], module)
        and not _adapter_config.names_module(fields["exclude_modules"], module)
    )


def _misfit_factors(
    path: str, found: _Found, fields: Mapping[str, Any], weights: Mapping[str, Any]
) -> Iterable[str]:
    layers = [layer for layer in found.low_rank[path].values() if layer.a and layer.b]
    size_out, size_in = published_shape(found.entries[path], weights[path].shape)
    for layer in layers:
        rank = _rank(layer, fields)
        for tensor, shape in ((layer.a, (rank, size_in)), (layer.b, (size_out, rank))):
            if tensor and tensor.shape != shape:
                yield f"shape: {tensor.name} is {tensor.shape}, the model and config say {shape}"
    if len({(_rank(layer, fields), _alpha_of(layer, fields)) for layer in layers}) > 1:
        yield f"layers: {path} is stacked, and its layers differ in rank or alpha: {_UNROLL}"


def _misfit_weight(path: str, found: _Found, weights: Mapping[str, Any]) -> Iterable[str]:
    shape = published_shape(found.entries[path], weights[path].shape)
    for tensor in found.full[path].values():
        if tensor.shape != shape:
            yield f"shape: {tensor.name} is {tensor.shape}, the model has {shape}"


def _rank(layer: _Factors, fields: Mapping[str, Any]) -> int:
    return _adapter_config.resolve(fields["rank_pattern"], layer.module, fields["r"])


def _alpha_of(layer: _Factors, fields: Mapping[str, Any]) -> float:
    return _adapter_config.resolve(fields["alpha_pattern"], layer.module, fields["lora_alpha"])


def _config(found: _Found, fields: Mapping[str, Any]) -> LoraConfig:
    first = {path: next(iter(layers.values())) for path, layers in found.low_rank.items()}
    ranks = {path: _rank(layer, fields) for path, layer in first.items()}
    alphas = {path: _alpha_of(layer, fields) for path, layer in first.items()}
    stacked = (path for path in first if found.entries[path].stacked)
    return LoraConfig(
        rank=fields["r"],
        alpha=fields["lora_alpha"],
        targets=tuple(map(re.escape, sorted(first))),
        rank_pattern={re.escape(p): r for p, r in ranks.items() if r != fields["r"]},
        alpha_pattern={re.escape(p): a for p, a in alphas.items() if a != fields["lora_alpha"]},
        use_rslora=fields["use_rslora"],
        dropout=fields["lora_dropout"],
        train=tuple(map(re.escape, sorted(found.full))),
        layouts={re.escape(path): "stack in out" for path in stacked},
    )


def _read_factors(
    fresh: LoraFactors, entry: Published, layers: Mapping[int, _Factors]
) -> LoraFactors:
    def whole(factor: str) -> jax.Array:
        tensors = (getattr(layers[index], factor) for index in range(len(entry.tensors)))
        parts = [tensor.read().T.astype(fresh.a.dtype) for tensor in tensors]
        return jnp.asarray(np.stack(parts) if entry.stacked else parts[0])

    return dataclasses.replace(fresh, a=whole("a"), b=whole("b"))
