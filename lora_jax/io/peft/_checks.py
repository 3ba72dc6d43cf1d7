"""Whether an adapter's tensors, its config and the model say the same; what does not is listed."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax._config import Parts
from lora_jax._quantized import is_quantized
from lora_jax.io.hugging_face import published_shape, published_tensors
from lora_jax.io.names import Kind, NameTable, Published
from lora_jax.io.peft import _keys as keys, _parts as parts_of, _tied as tied
from lora_jax.io.peft._config import PREFIX, AdapterConfig
from lora_jax.io.peft._found import Found, Pair

_UNROLL = "load the model with scan_layers=False"


class Adapter(NamedTuple):
    """What is compared: an adapter's file and config, and the model that it is for.

    Attributes:
        found: The file's tensors.
        config: ``adapter_config.json``.
        parts: Module to the parts of it that have factors, where the file says so.
        names: The model's table.
        weights: Path to the model's weight.
    """

    found: Found
    config: AdapterConfig
    parts: Mapping[str, Parts]
    names: NameTable
    weights: Mapping[str, Any]

    def rate(self, pair: Pair) -> tuple[int, float, Parts]:
        """What the layers of a stack must have in common: rank, alpha and parts."""
        module = pair.module
        return self.config.rank(module), self.config.alpha(module), self.parts.get(module, ())


def problems(adapter: Adapter) -> list[str]:
    """Everything that keeps an adapter from being read."""
    found, names = adapter.found, adapter.names
    every = [
        *found.problems,
        *_halves(adapter),
        *_missing(adapter),
        *(p for path in found.low_rank for p in _misfit_factors(adapter, path)),
        *(p for path in found.full for p in _misfit_weights(adapter, path)),
        *_changed_base(adapter),
        *_changed_repeats(found),
        *_parts(adapter),
        *_fan_in(adapter),
        *_untargeted(adapter),
        *_untied_factors(adapter),
    ]
    if not every:  # values are read only where shapes and names are right
        every += tied.differing_weights(found.tied_full, found.full, adapter.weights, names)
    if not found.low_rank and not every:
        every.append("it has no lora_A and lora_B")
    return every


def _halves(adapter: Adapter) -> Iterable[str]:
    """Factors without their other half, and layers without factors in a stack that has some."""
    found, entries = adapter.found, adapter.names.entries
    kinds: dict[Pair, Kind] = dict.fromkeys(found.tied_low_rank.values(), "linear")
    for path, layers in found.low_rank.items():
        kinds |= dict.fromkeys(layers.values(), entries[path].kind)
    for pair, kind in kinds.items():
        for tensor, key in zip(pair[1:], keys.factor_keys(pair.module, kind), strict=True):
            if tensor is None:
                yield f"missing: {key}"
    for path, layers in found.low_rank.items():
        if len(layers) < len(entries[path].tensors):
            yield (
                f"missing: {path} is stacked; only layers {sorted(layers)} are adapted: {_UNROLL}"
            )


def _missing(adapter: Adapter) -> Iterable[str]:
    """What the config promises, or a part of a weight implies, and the file does not have."""
    found, names, config = adapter.found, adapter.names, adapter.config
    adapted = {names.key(f"{p.module}.bias") for ps in found.low_rank.values() for p in ps.values()}
    for path, entry in names.entries.items():
        has = found.full.get(path, {})
        for index, tensor in enumerate(entry.tensors):
            is_own = names.key(tensor) in adapted
            trains = tensor.endswith(".bias") and (config.bias == "all" or is_own)
            promised = config.saves(tied.module_of(tensor)) or (trains and config.bias != "none")
            if index not in has and (has or promised):
                yield f"missing: {keys.base_key(tensor) if is_own else PREFIX + tensor}"
        is_matrix = keys.is_adaptable(entry.kind) and not _is_special(adapter, entry)
        if is_matrix and path not in found.low_rank and path not in found.full:
            targeted = [m for m in entry.modules if config.targets(m)]
            yield from (f"missing: {keys.factor_keys(m, entry.kind)[0]}" for m in targeted)


def _is_special(adapter: Adapter, entry: Published) -> bool:
    """Whether ``"all-linear"`` leaves out a matrix: an embedding or the output head."""
    if adapter.config.target_modules != "all-linear":
        return False
    is_head = adapter.names.in_head(entry.path) or "lm_head" in entry.modules
    return is_head or entry.kind == "embedding"


def _misfit_factors(adapter: Adapter, path: str) -> Iterable[str]:
    pairs = [pair for pair in adapter.found.low_rank[path].values() if pair.a and pair.b]
    size_in, size_out = adapter.weights[path].shape[-2:]
    for pair in pairs:
        rank, _, parts = adapter.rate(pair)
        for tensor, shape in ((pair.a, (rank, size_in)), (pair.b, (size_out, rank))):
            if tensor and tensor.shape != shape:
                yield f"shape: {tensor.name} is {tensor.shape}, the model and config say {shape}"
        if rank // sum(parts or (1,)) > min(size_in, size_out):
            yield f"rank: {pair.module} is {size_in} by {size_out}, and has factors of rank {rank}"
    if len({adapter.rate(pair) for pair in pairs}) > 1:
        yield f"layers: {path} is stacked, and its layers differ in rank or alpha: {_UNROLL}"


def _misfit_weights(adapter: Adapter, path: str) -> Iterable[str]:
    shape = published_shape(adapter.names.entries[path], adapter.weights[path].shape)
    for tensor in adapter.found.full[path].values():
        if tensor.shape != shape:
            yield f"shape: {tensor.name} is {tensor.shape}, the model has {shape}"
    if path in adapter.found.low_rank:
        yield f"twice: {path} has factors and is trained in full"


def _changed_base(adapter: Adapter) -> Iterable[str]:
    """Weights under the factors that are not the model's: it is another base, or a resized one."""
    for (path, _), (index, tensor) in adapter.found.base.items():
        entry, weight = adapter.names.entries[path], adapter.weights[path]
        if is_quantized(weight):  # whether it is the same is no longer known
            continue
        wanted = published_tensors(entry, weight)[entry.tensors[index]]
        if not np.array_equal(tensor.read().astype(weight.dtype), wanted):
            yield f"base: {tensor.name} {tensor.shape} is not the model's {path} {weight.shape}"


def _changed_repeats(found: Found) -> Iterable[str]:
    for path, layers in found.repeated.items():
        for index, tensor in layers.items():
            first = found.full.get(path, {}).get(index)
            if first is None or not np.array_equal(tensor.read(), first.read()):
                yield f"twice: {tensor.name} is not what the file has for {path}"


def _parts(adapter: Adapter) -> Iterable[str]:
    pairs = {p.module: p for layers in adapter.found.low_rank.values() for p in layers.values()}
    for module, parts in adapter.parts.items():
        if module not in pairs:
            yield f"parts: the file's note names {module}, which has no factors"
        elif why := _part_misfit(pairs[module], parts):
            yield f"parts: {module}: {why}"


def _part_misfit(pair: Pair, parts: Parts) -> str | None:
    has_shape = pair.b is not None and len(pair.b.shape) == 2
    return parts_of.misfit(pair.b.read().T, parts) if pair.b and has_shape else None


def _fan_in(adapter: Adapter) -> Iterable[str]:
    """PEFT corrects the flag for each module; one that fits none of them is another model's."""
    kinds = {adapter.names.entries[path].kind for path in adapter.found.low_rank}
    if adapter.config.fan_in_fan_out and kinds and "conv1d" not in kinds:
        yield "`fan_in_fan_out` is True, and none of the adapted modules is a Conv1D"


def _untargeted(adapter: Adapter) -> Iterable[str]:
    """Factors that PEFT would drop without a word; of a tied weight one module may be named."""
    found, config = adapter.found, adapter.config
    tied_to = {path: tied.module_of(copy) for copy, path in tied.tied_paths(adapter.names).items()}
    for path, layers in found.low_rank.items():
        for pair in layers.values():
            if not any(config.targets(m) for m in (pair.module, tied_to.get(path)) if m):
                yield f"untargeted: {pair.module} has factors, and the config names it no target"


def _untied_factors(adapter: Adapter) -> Iterable[str]:
    """Factors of a tied weight that are not the same in both of its modules."""
    found, names = adapter.found, adapter.names
    for copy, path in tied.tied_paths(names).items():
        original, other = found.low_rank.get(path, {}).get(0), found.tied_low_rank.get(copy)
        module = tied.module_of(copy)
        if original and other:
            same_rate = adapter.rate(original) == adapter.rate(other)
            if not (same_rate and _are_transposes(original, other)):
                yield f"tied: the factors of {original.module} and {other.module} differ"
        elif one := original or other:
            yield (
                f"tied: only {one.module} has factors; {path} and {copy} are one weight here, "
                "adapted in both uses. In PEFT, target both modules with ensure_weight_tying"
            )
        elif copy.endswith(".weight") and path not in found.full and adapter.config.targets(module):
            yield f"missing: {keys.factor_keys(module, 'linear')[0]}"


def _are_transposes(one: Pair, other: Pair) -> bool:
    """Whether ``lora_B`` of the output layer is ``a`` of the embedding, and ``lora_A`` is ``b``."""
    pairs = ((one.a, other.b), (one.b, other.a))
    return all(x and y and np.array_equal(x.read().T, y.read()) for x, y in pairs)
