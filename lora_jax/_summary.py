"""The table people expect before they train: weight, shape, rank, trained parameters, percent."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ._config import Layout, LoraConfig
from ._parts import target_shapes
from ._paths import flatten
from ._targets import select

_HEADER = ("weight", "shape", "rank", "trained", "percent")


class Row(NamedTuple):
    """One weight that trains; ``rank`` is None where it trains in full."""

    path: str
    shape: tuple[int, ...]
    rank: int | None
    trained: int
    percent: float


class Summary(NamedTuple):
    """What would train: print it, or read its fields.

    Attributes:
        rows: One `Row` for each weight that trains, in the tree's order.
        trained: Trained parameters in all.
        total: Parameters of the model, the factors not counted.
    """

    rows: tuple[Row, ...]
    trained: int
    total: int

    def __str__(self) -> str:
        body = [_cells(row) for row in self.rows]
        percent = f"{100 * self.trained / max(self.total, 1):.2f} %"
        count = f"{len(self.rows)} weights of {self.total:,} parameters"
        foot = (count, "", "", f"{self.trained:,}", percent)
        table = [_HEADER, *body, foot]
        widths = [max(len(row[column]) for row in table) for column in range(len(_HEADER))]
        return "\n".join(_line(row, widths) for row in table)


def summary(
    params: Any, config: LoraConfig, *, layouts: Mapping[str, Layout] | None = None
) -> Summary:
    """Says what `split` would train, without making anything.

    Args:
        params: The parameters, or their shapes (``jax.ShapeDtypeStruct``).
        config: Which weights to adapt.
        layouts: As for `split`.

    Returns:
        A `Summary`; ``print`` shows it as a table.

    Raises:
        ValueError: As for `split`.
    """
    leaves, _ = flatten(params)
    weights = {path: leaf for path, leaf in leaves.items() if hasattr(leaf, "dtype")}
    adapted, trained = select(weights, config, layouts)
    rows = []
    for path, weight in weights.items():
        size = math.prod(weight.shape)
        if path in adapted:
            shapes = target_shapes(weight.shape, adapted[path])
            rows.append(_row(path, weight.shape, adapted[path].rank, sum(map(math.prod, shapes))))
        elif path in trained:
            rows.append(_row(path, weight.shape, None, size))
    total = sum(math.prod(weight.shape) for weight in weights.values())
    return Summary(tuple(rows), sum(row.trained for row in rows), total)


def _row(path: str, shape: tuple[int, ...], rank: int | None, trained: int) -> Row:
    return Row(path, tuple(shape), rank, trained, 100 * trained / max(math.prod(shape), 1))


def _cells(row: Row) -> tuple[str, ...]:
    shape = " x ".join(map(str, row.shape))
    return row.path, shape, str(row.rank or "full"), f"{row.trained:,}", f"{row.percent:.2f} %"


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:2], widths[:2], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join(left + right).rstrip()
