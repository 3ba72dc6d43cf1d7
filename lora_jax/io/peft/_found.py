"""An adapter's tensors, sorted: every one has a place in the model, or is a problem."""

from collections.abc import Mapping
from typing import NamedTuple

from lora_jax.io._safetensors import FLOATS, Tensor
from lora_jax.io.names import NameTable
from lora_jax.io.peft import _keys as keys
from lora_jax.io.peft._tied import module_of, tied_paths


class Pair(NamedTuple):
    """The two factors of one module, by its name in the file; None where one is absent."""

    module: str
    a: Tensor | None = None
    b: Tensor | None = None


class Found(NamedTuple):
    """An adapter's tensors, by our path and then by layer.

    Attributes:
        low_rank: Factors.
        full: Weights trained in full.
        base: Tensors of the layers under the factors, which must be the base model's.
        repeated: Weights of ``full`` once more.
        tied_low_rank: Factors of modules whose weight is another's, by its published name.
        tied_full: Such weights, trained in full.
        problems: What has no place.
    """

    low_rank: dict[str, dict[int, Pair]]
    full: dict[str, dict[int, Tensor]]
    base: dict[tuple[str, str], tuple[int, Tensor]]
    repeated: dict[str, dict[int, Tensor]]
    tied_low_rank: dict[str, Pair]
    tied_full: dict[str, Tensor]
    problems: list[str]


def sort(tensors: Mapping[str, Tensor], names: NameTable, *, biases_train: bool) -> Found:
    """Sorts an adapter's tensors.

    Args:
        tensors: Key to tensor, as in the file.
        names: The table of the model.
        biases_train: Whether the biases of adapted modules are trained (``bias`` in the config).
    """
    places = {
        names.key(tensor): (entry, index)
        for entry in names.entries.values()
        for index, tensor in enumerate(entry.tensors)
    }
    tied = tied_paths(names)
    found = Found({}, {}, {}, {}, {}, {}, [])
    for name, tensor in tensors.items():
        key = keys.parse(name)
        spelled = names.key(key.tensor) if key else ""
        if key and biases_train and key.role == "base" and key.tensor.endswith(".bias"):
            key = key._replace(role="full")
        if key and spelled in tied and key.fits("linear"):
            _put_tied(found, key, spelled, tied[spelled], tensor)
        elif key and spelled in places and key.fits(places[spelled][0].kind):
            entry, index = places[spelled]
            _put(found, key, entry.path, index, tensor)
        else:
            found.problems.append(f"unmapped: {name} {tensor.shape}")
        if tensor.dtype not in FLOATS:
            found.problems.append(f"dtype: {name} is {tensor.dtype}, not one of {FLOATS}")
    return found


def _put(found: Found, key: keys.Key, path: str, index: int, tensor: Tensor) -> None:
    match key.role:
        case "a" | "b":
            pairs = found.low_rank.setdefault(path, {})
            pairs[index] = _pair(found, pairs.get(index), key, tensor)
        case "full":
            _once(found, found.full.setdefault(path, {}), index, tensor)
        case "copy":
            _once(found, found.repeated.setdefault(path, {}), index, tensor)
        case "base":
            _once(found, found.base, (path, tensor.name), (index, tensor))
        case "unused":  # PEFT's copy of the base under a module that it trains in full
            pass


def _put_tied(found: Found, key: keys.Key, spelled: str, path: str, tensor: Tensor) -> None:
    match key.role:
        case "a" | "b":
            pair = found.tied_low_rank.get(spelled)
            found.tied_low_rank[spelled] = _pair(found, pair, key, tensor)
        case "full":
            _once(found, found.tied_full, spelled, tensor)
        case "base":
            _once(found, found.base, (path, tensor.name), (0, tensor))
        case "copy":
            found.problems.append(f"unmapped: {tensor.name} {tensor.shape}")
        case "unused":
            pass


def _pair(found: Found, pair: Pair | None, key: keys.Key, tensor: Tensor) -> Pair:
    pair = pair or Pair(module_of(key.tensor))
    if other := getattr(pair, key.role):
        found.problems.append(f"twice: {other.name} and {tensor.name} are one factor")
    return pair._replace(**{key.role: tensor})


def _once(found: Found, table: dict, place: object, tensor: object) -> None:
    other = table.setdefault(place, tensor)
    if other is not tensor:
        found.problems.append(f"twice: {other.name} and {tensor.name} are one weight")  # type: ignore[attr-defined]
