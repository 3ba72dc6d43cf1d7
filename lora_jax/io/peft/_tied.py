"""Tied weights: our one weight, PEFT's two modules, and files that mean the same in both.

    embed_tokens    E + scale * a @ b          a: (rows, rank)   b: (rank, features)
    lm_head         E + scale * a @ b          lora_B = a        lora_A = b

Our adapted weight is adapted in both uses. PEFT gives each module factors of its own, and by
default adapts only the module that was named; with ``ensure_weight_tying`` it adapts both alike.
A file means the same to both libraries if it has both modules and they agree.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax.io._safetensors import Tensor
from lora_jax.io.hugging_face import published_tensors
from lora_jax.io.names import NameTable


def tied_paths(names: NameTable) -> dict[str, str]:
    """Published tensors that only repeat a weight of ours: ``{"lm_head.weight": path}``."""
    originals = {names.key(t): e.path for e in names.entries.values() for t in e.tensors}
    return {copy: originals[original] for copy, original in names.tied.items()}


def module_of(tensor: str) -> str:
    """The module that owns a tensor."""
    return tensor.rpartition(".")[0]


def copies_of(path: str, names: NameTable) -> list[str]:
    """The published tensors that repeat a weight."""
    return [copy for copy, original in tied_paths(names).items() if original == path]


def differing_weights(
    copies: Mapping[str, Tensor],
    full: Mapping[str, Mapping[int, Tensor]],
    weights: Mapping[str, Any],
    names: NameTable,
) -> Iterable[str]:
    """Copies in a file that differ from the weight that they should repeat, or lack.

    Args:
        copies: Published tensor to the file's.
        full: Path to the file's tensors, of the weights that it has in full.
        weights: Path to the base's weight.
        names: The table.
    """
    for copy, path in tied_paths(names).items():
        if copy in copies:
            found = copies[copy].read()
            dtype = weights[path].dtype
            if path in full:
                wanted = full[path][0].read()
            else:
                (wanted,) = published_tensors(names.entries[path], weights[path]).values()
            if not np.array_equal(found.astype(dtype), wanted.astype(dtype)):
                yield f"tied: {copies[copy].name} differs from {path}, and is one weight with it"
        elif path in full:
            yield (
                f"tied: {full[path][0].name} is trained and {copy}, one weight with it here, is "
                "not: in PEFT, save both modules with ensure_weight_tying"
            )
