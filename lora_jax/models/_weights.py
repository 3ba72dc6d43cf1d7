"""The weights of a checkpoint, read one at a time, and quantised on the way where asked.

    read on the host  ->  on the device  ->  codes        one published tensor after another

The full precision of a tensor is dropped before the next one is read. So the device never holds
more than the codes so far, the weights that stay plain, one tensor in full precision, and what
its codes are computed with.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Container, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._config import ALL_LINEAR, Layout, _patterns
from lora_jax._layouts import layouts
from lora_jax._paths import flatten
from lora_jax._quantized import QuantizedWeight
from lora_jax._targets import choose
from lora_jax.io._tensor import Tensor
from lora_jax.io.hugging_face import read_tensor, read_weight
from lora_jax.io.names import NameTable
from lora_jax.ops.quantized import SCHEMES, quantize_weight


@functools.lru_cache(maxsize=16)
def weight_layouts(module: nn.Module) -> Mapping[str, Layout]:
    """What each axis of every weight does, read from the module; see `lora_jax.layouts`."""
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)

    def apply(params: Any, *inputs: jax.Array) -> Any:
        return module.apply({"params": params}, *inputs)

    return MappingProxyType(layouts(apply, _params_of(module), tokens, tokens))


def fresh_weight(path: str, shape: jax.ShapeDtypeStruct, key: jax.Array, std: float) -> jax.Array:
    """A new weight. Its key is folded from its path, so it does not depend on the others."""
    kind = path.rpartition("/")[2]
    if kind == "bias":
        return jnp.zeros(shape.shape, shape.dtype)
    if kind == "scale":
        return jnp.ones(shape.shape, shape.dtype)
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    return (std * jax.random.normal(key, shape.shape, jnp.float32)).astype(shape.dtype)


def make_plan(
    module: nn.Module, names: NameTable, scheme: str | None, exclude: str | Iterable[str] = ()
) -> "Plan":
    """Plans codes of a scheme for the matrices of the layers, as `lora_jax.quantize` chooses them.

    Args:
        module: The model.
        names: What its weights are called.
        scheme: Of `lora_jax.quantize`, or None for plain weights.
        exclude: Patterns of matrices that stay plain.

    Raises:
        ValueError: There is no such scheme, a pattern matches no weight, or there is none to
            exclude from.
    """
    if scheme is not None and scheme not in SCHEMES:
        known = ", ".join(SCHEMES)
        raise ValueError(f"`quantize` is None or one of {known}, got {scheme!r}.")
    if exclude and scheme is None:
        raise ValueError(
            f"`quantize_exclude` {exclude!r} is given without `quantize`, where every weight is "
            "plain. Leave it out, or name a scheme."
        )
    shapes, _ = flatten(_params_of(module))
    assert shapes.keys() == names.entries.keys(), shapes.keys() ^ names.entries.keys()
    codes: dict[str, Layout] = {}
    if scheme is not None:
        known, name = weight_layouts(module), "quantize_exclude"
        chosen = choose(shapes, (ALL_LINEAR,), _patterns(name, exclude), known, name)
        codes = {path: known[path] for path in chosen}
    in_order = {path: shapes[path] for path in names.entries}
    return Plan(names=names, shapes=in_order, codes=codes, scheme=scheme)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What each weight of a model becomes: an array, or codes.

    Attributes:
        names: What the weights are called in the checkpoint.
        shapes: Path to shape and dtype, of every weight.
        codes: Path to layout, of the weights that become codes.
        scheme: Which codes; None where none do.
    """

    names: NameTable
    shapes: Mapping[str, jax.ShapeDtypeStruct]
    codes: Mapping[str, Layout]
    scheme: str | None

    def read(
        self, found: Mapping[str, tuple[Tensor, ...]], draw: Callable[[str], jax.Array]
    ) -> dict[str, Any]:
        """Every weight by its path.

        Args:
            found: Path to its tensors in the file.
            draw: Makes those that the file has not: they have to be trained, and stay plain.
        """
        return {
            path: self._read(path, found[path]) if path in found else draw(path)
            for path in self.shapes
        }

    def abstract(self, drawn: Container[str]) -> dict[str, Any]:
        """The same as shapes; codes are codes of ``jax.ShapeDtypeStruct``.

        Args:
            drawn: Paths of the weights that would be drawn.
        """
        return {
            path: jax.eval_shape(functools.partial(self._encode, path), shape)
            if path in self.codes and path not in drawn
            else shape
            for path, shape in self.shapes.items()
        }

    def _read(self, path: str, tensors: tuple[Tensor, ...]) -> Any:
        entry, dtype = self.names.entries[path], self.shapes[path].dtype
        if path not in self.codes:
            return read_weight(entry, tensors, dtype)
        parts = (
            self._encode(path, jnp.asarray(read_tensor(entry, tensor, dtype))) for tensor in tensors
        )
        if not entry.stacked:
            return jax.block_until_ready(next(parts))
        return _stack([jax.device_get(part) for part in parts], self.codes[path])

    def _encode(self, path: str, weight: jax.Array) -> QuantizedWeight:
        """Codes of a weight, or of one of those that it stacks along its first axis."""
        assert self.scheme is not None
        return quantize_weight(weight, self.codes[path][-weight.ndim :], self.scheme)


def _stack(layers: list[QuantizedWeight], layout: Layout) -> QuantizedWeight:
    """The codes of one layer after another, which are those of their stack.

    They wait on the host until all are there: to stack them on the device would hold them twice.
    """
    stacked = jax.tree.map(lambda *codes: jnp.asarray(np.stack(codes)), *layers)
    return dataclasses.replace(stacked, layout=layout)


def _params_of(module: nn.Module) -> Any:
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(module.init, jax.random.key(0), ids)["params"]
