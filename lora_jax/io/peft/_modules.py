"""The adapters of single modules, as a file has them: ours taken apart by layer, or made vLLM's.

vLLM reads one rank and one scale for the whole adapter, from ``r`` and ``lora_alpha``. So there
the scales go into ``b``, and smaller ranks are filled up with zeros.

    scale_i * a_i @ b_i   =   scale * [a_i 0] @ [[scale_i / scale * b_i], [0]]
"""

from typing import NamedTuple

import numpy as np

from lora_jax._weights import Factors
from lora_jax.io.names import Kind, Published
from lora_jax.io.peft import _keys as keys
from lora_jax.io.peft._config import tidy

VLLM_MAX_RANK = 512
"""The largest ``max_lora_rank`` that vLLM accepts, of 1, 8, 16, 32, 64, 128, 256, 320 and 512:
https://docs.vllm.ai/en/v0.14.0/api/vllm/config/lora/ (``MaxLoRARanks``)."""


class Module(NamedTuple):
    """The adapter of one published module: ``a (in, rank)``, ``b (rank, out)`` and their scale."""

    name: str
    kind: Kind
    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        """Inner dimension."""
        return self.a.shape[-1]

    def tensors(self) -> dict[str, np.ndarray]:
        """What the file has of it, in the layout of PyTorch: ``(rank, in)`` and ``(out, rank)``."""
        a, b = keys.factor_keys(self.name, self.kind)
        return {a: np.ascontiguousarray(self.a.T), b: np.ascontiguousarray(self.b.T)}

    def transposed(self, name: str) -> "Module":
        """The same update of the transposed matrix: an embedding's, of an output layer tied to it.

        Args:
            name: The output layer.
        """
        return Module(name, "linear", self.b.T, self.a.T, self.scale)


def modules_of(entry: Published, factors: Factors) -> list[Module]:
    """The adapters of the modules that a weight of ours stands for."""
    whole = factors.whole()
    a, b = np.asarray(whole.a), np.asarray(whole.b)
    layers = zip(a, b, strict=True) if entry.stacked else [(a, b)]
    return [
        Module(name, entry.kind, one_a, one_b, factors.scale)
        for name, (one_a, one_b) in zip(entry.modules, layers, strict=True)
    ]


def bake(modules: list[Module]) -> list[Module]:
    """The same updates at one rank and one scale, as vLLM reads them.

    The scale is the modules' own if they have one in common and it makes ``lora_alpha`` an
    integer, which is vLLM's type for it; then no value changes. Else it is 1.
    """
    rank = max(module.rank for module in modules)
    scale = modules[0].scale
    is_common = all(module.scale == scale for module in modules)
    if not (is_common and float(tidy(scale * rank, 12)).is_integer()):
        scale = 1.0
    return [_at(module, rank, scale) for module in modules]


def _at(module: Module, rank: int, scale: float) -> Module:
    more = rank - module.rank
    factor = np.asarray(module.scale / scale, module.b.dtype)
    a = np.pad(module.a, ((0, 0), (0, more)))
    b = np.pad(factor * module.b, ((0, more), (0, 0)))
    return Module(module.name, module.kind, a, b, scale)
