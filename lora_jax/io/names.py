"""Names: one table says what each of our weights is called in the published checkpoint.

A family of models (``lora_jax/models/``) writes rows of path, tensor name and kind of module.
Everything that crosses the border goes through that one table: reading
a checkpoint, writing one, writing an adapter that PEFT reads.

    encoder/layers/{layer}/attention/query/kernel  (in, out)
    bert.encoder.layer.{layer}.attention.self.query.weight  (out, in)
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

LAYER = "{layer}"

Kind = Literal["linear", "conv1d", "embedding", "other"]
"""What module owns a published tensor: the matrix ``(out, in)`` of PyTorch's ``Linear``; the
matrix ``(in, out)`` of GPT-2's ``Conv1D``; a table ``(rows, features)``; or a bias, a norm."""


class Row(NamedTuple):
    """One line of a family's table; ``{layer}`` stands for the index of a repeated layer."""

    path: str
    tensor: str
    kind: Kind = "other"


class Published(NamedTuple):
    """The published tensor or tensors that one of our weights is made of.

    Attributes:
        path: Our path, such as ``"encoder/layers/0/attention/query/kernel"``.
        tensors: The published names: one, or one a layer where our weight stacks its layers
            along axis 0 (``scan_layers=True``).
        kind: What module owns them.
        stacked: Whether our weight stacks one tensor a layer along axis 0.
    """

    path: str
    tensors: tuple[str, ...]
    kind: Kind
    stacked: bool

    @property
    def transposed(self) -> bool:
        """Whether the published matrix is ``(out, in)`` where ours is ``(in, out)``."""
        return self.kind == "linear"

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that own ``tensors``: the names without their last segment."""
        return tuple(tensor.rpartition(".")[0] for tensor in self.tensors)


@dataclasses.dataclass(frozen=True)
class NameTable:
    """Our paths and the published names of one model, checked to be one-to-one.

    Attributes:
        entries: Path to `Published`.
        prefix: Name of the encoder inside a model with a head (``"bert"``). Files of the bare
            encoder leave it out, so names are compared without it.
        unused: Names without the prefix that are known and not needed: buffers, and the heads
            of other tasks.
        renamed: Old spellings: ``(end of the name, today's end)``.
        tied: Tensors that only repeat another one: ``{copy: original}``, without the prefix.
        heads: First segments of our paths that belong to the head of a task.
        drawn: Those of the weights that are drawn where a checkpoint has none of them.
    """

    entries: Mapping[str, Published]
    prefix: str
    unused: frozenset[str] = frozenset()
    renamed: tuple[tuple[str, str], ...] = ()
    tied: Mapping[str, str] = dataclasses.field(default_factory=dict)
    heads: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()

    def __post_init__(self):
        _check_once([self.key(name) for e in self.entries.values() for name in e.tensors])

    def in_head(self, path: str) -> bool:
        """Whether a weight of ours belongs to the head of a task."""
        return path.partition("/")[0] in self.heads

    def key(self, tensor: str) -> str:
        """The spelling under which names are compared: today's, without the prefix."""
        tensor = re.sub(rf"^{re.escape(self.prefix)}\.", "", tensor)
        for old, new in self.renamed:
            if tensor.endswith(old):
                return tensor.removesuffix(old) + new
        return tensor


def expand(rows: Iterable[Row], layers: int, *, stacked: bool) -> dict[str, Published]:
    """Writes a family's rows out for a number of layers.

    Args:
        rows: The table; each path and each tensor name once.
        layers: How many layers ``{layer}`` counts.
        stacked: Whether the weights of the layers are stacked along axis 0 under a path
            without the index, as ``nn.scan`` leaves them.

    Raises:
        ValueError: Two rows give the same path.

    Example:
        >>> row = Row("layers/{layer}/kernel", "layer.{layer}.weight", "linear")
        >>> list(expand([row], 2, stacked=False))
        ['layers/0/kernel', 'layers/1/kernel']
        >>> expand([row], 2, stacked=True)["layers/kernel"].tensors
        ('layer.0.weight', 'layer.1.weight')
    """
    entries = [entry for row in rows for entry in _expand_row(row, layers, stacked)]
    _check_once([entry.path for entry in entries])
    return {entry.path: entry for entry in entries}


def _expand_row(row: Row, layers: int, stacked: bool) -> list[Published]:
    if LAYER not in row.path:
        return [Published(row.path, (row.tensor,), row.kind, False)]
    tensors = tuple(row.tensor.replace(LAYER, str(index)) for index in range(layers))
    if stacked:
        return [Published(row.path.replace(f"{LAYER}/", ""), tensors, row.kind, True)]
    return [
        Published(row.path.replace(LAYER, str(index)), (tensor,), row.kind, False)
        for index, tensor in enumerate(tensors)
    ]


def _check_once(names: Iterable[str]) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise ValueError(f"The table of names is not one-to-one: {twice} occur twice.")
