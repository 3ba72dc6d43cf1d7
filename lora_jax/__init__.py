"""LoRA for JAX as a pure parameter transformation.

    y = x @ w + scale * (x @ a) @ b        w: (in, out)   a: (in, rank)   b: (rank, out)

`split` takes a parameter tree apart into frozen weights and trainable factors, `adapt` lifts any
function of plain weights onto the low-rank path, and `merge` gives plain weights back:

    config = LoraConfig(rank=8, alpha=16.0, targets=("query", "value"))
    frozen, trainable = split(params, config, key)
    forward = adapt(model.apply)

    def loss_fn(trainable, batch):
        return loss(forward({"params": combine(frozen, trainable)}, batch["inputs"]), batch)

    params = merge(frozen, trainable)

`layouts` reads from a function which axes its weights contract, `summary` shows what would train,
and `mask` and `masked` serve scripts that keep one tree.
"""

from ._config import LoraConfig as LoraConfig
from ._interpret import MaterializeWarning as MaterializeWarning, adapt as adapt
from ._layouts import layouts as layouts
from ._merge import (
    DequantizedMergeWarning as DequantizedMergeWarning,
    merge as merge,
    unmerge as unmerge,
)
from ._partition import combine as combine, mask as mask, masked as masked, split as split
from ._parts import PartFactors as PartFactors
from ._summary import summary as summary
from ._weights import Factors as Factors, LoraFactors as LoraFactors, LoraWeight as LoraWeight
from .io import load_adapter as load_adapter, save_adapter as save_adapter
from .models import save_pretrained as save_pretrained
from .ops.quantized import dequantize as dequantize, quantize as quantize
