"""Weights trained in full, as PEFT saves them: whole modules, or the biases of a set of modules.

    modules_to_save: ["classifier"]     every tensor of the module
    bias: "lora_only"                   the biases of the adapted modules
    bias: "all"                         the biases of all modules

PEFT has no word for other sets of weights, so they are refused.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from lora_jax.io.hugging_face import published_tensors
from lora_jax.io.names import NameTable
from lora_jax.io.peft import _keys as keys, _tied as tied
from lora_jax.io.peft._config import PREFIX

if TYPE_CHECKING:
    from lora_jax.models import Pretrained


class Trained(NamedTuple):
    """What trains in full, in PEFT's terms.

    Attributes:
        modules: For ``modules_to_save``.
        paths: Our paths of the weights in them.
        biases: Our paths of the biases of other modules.
        bias: The word that names those biases in the config.
        problems: What PEFT has no word for.
    """

    modules: tuple[str, ...]
    paths: frozenset[str]
    biases: frozenset[str]
    bias: Literal["none", "all", "lora_only"]
    problems: tuple[str, ...]


def describe(full: Iterable[str], adapted: Iterable[str], names: NameTable) -> Trained:
    """Puts the weights that train in full into PEFT's terms.

    Args:
        full: Their paths.
        adapted: The modules that have factors.
        names: The table of the model.
    """
    full = {path for path in full if path in names.entries}
    groups: dict[tuple[str, ...], list[str]] = {}
    for path in names.entries:
        groups.setdefault(_owners(path, names), []).append(path)
    saved = {g for g, paths in groups.items() if any(p in full and not _is_bias(p) for p in paths)}
    inside = {path for group in saved for path in groups[group]}
    biases = full - inside
    bias, problems = _bias_word(biases, inside, set(adapted), names)
    modules = {module for group in saved for module in group}
    copies = {tied.module_of(copy) for path in full for copy in tied.copies_of(path, names)}
    modules |= {c for c in copies if _is_weight_copy(c, inside, names) and not _inside(c, modules)}
    missing = sorted(inside - full)
    if missing:
        found = ", ".join(sorted(full & inside))
        problems += (f"{found}: PEFT saves whole modules; also train {missing}",)
    return Trained(tuple(sorted(modules)), frozenset(inside), frozenset(biases), bias, problems)


def _is_bias(path: str) -> bool:
    return path.endswith("/bias")


def _owners(path: str, names: NameTable) -> tuple[str, ...]:
    """What ``modules_to_save`` calls the owners of a weight: a head's top module, else its own."""
    entry = names.entries[path]
    return (entry.tensors[0].partition(".")[0],) if names.in_head(path) else entry.modules


def _inside(module: str, modules: Iterable[str]) -> bool:
    return any(module == other or module.startswith(f"{other}.") for other in modules)


def _is_weight_copy(module: str, inside: set[str], names: NameTable) -> bool:
    return any(
        path in inside and copy.endswith(".weight") and tied.module_of(copy) == module
        for copy, path in tied.tied_paths(names).items()
    )


def _bias_word(
    biases: set[str], inside: set[str], adapted: set[str], names: NameTable
) -> tuple[Literal["none", "all", "lora_only"], tuple[str, ...]]:
    """The word for a set of biases, or why there is none."""
    every = {path for path in names.entries if _is_bias(path)} - inside
    own = {path for path in every if set(names.entries[path].modules) <= adapted}
    if not biases:
        return "none", ()
    if biases == own:
        return "lora_only", ()
    if biases == every:
        return "all", ()
    ways = [f"leave out {sorted(biases - own)}"] if biases - own else []
    ways += [f"also train {sorted(own - biases)}"] if own - biases else []
    return "none", (
        f"{', '.join(sorted(biases))}: PEFT trains the biases of all adapted modules "
        f"({' and '.join(ways)}), or all biases (also train {sorted(every - biases)})",
    )


def tensors(
    trained: Trained, trainable: Mapping[str, Any], adapted: Iterable[str], model: "Pretrained"
) -> dict[str, np.ndarray]:
    """The file's tensors of what trains in full, copies of tied weights included."""
    names, adapted = model.names, set(adapted)
    made: dict[str, np.ndarray] = {}
    for path in {*trained.paths, *trained.biases}:
        for name, tensor in published_tensors(names.entries[path], trainable[path]).items():
            is_own = path in trained.biases and tied.module_of(name) in adapted
            made[keys.base_key(name) if is_own else PREFIX + name] = tensor
    for copy, path in tied.tied_paths(names).items():
        if path in trained.biases or _inside(tied.module_of(copy), trained.modules):
            weight = trainable.get(path, weight_at(model.params, path))
            is_own = path in trained.biases and tied.module_of(copy) in adapted
            key = keys.base_key(copy) if is_own else PREFIX + copy
            (made[key],) = published_tensors(names.entries[path], weight).values()
    return made


def weight_at(params: Any, path: str) -> Any:
    """The weight of a tree of nested dictionaries at a path."""
    for segment in path.split("/"):
        params = params[segment]
    return params


def tied_problems(trained: Trained, adapted: Iterable[str], names: NameTable) -> Iterable[str]:
    """Tied weights that PEFT would have twice, in a module that it saves, and with factors."""
    for copy, path in tied.tied_paths(names).items():
        if path in adapted and _inside(tied.module_of(copy), trained.modules):
            module = tied.module_of(copy)
            yield f"{path}: has factors, and {module}, which is tied to it, is saved in full"
