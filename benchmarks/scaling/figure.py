"""The plot: tokens a second and efficiency over devices. Matplotlib comes with ``train``."""

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .table import Row, efficiency, is_measured, rate

TARGETS = {"data": 0.97, "fsdp": 0.90}  # of weak scaling over 8 devices
STYLES = {"data": "o-", "fsdp": "s--"}


def draw(file: Path, rows: Sequence[Row]) -> str | None:
    """Draws what was measured: a pair of panels for each scaling.

    Returns:
        None, or a line that says why there is no figure.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "No figure: matplotlib is not installed (pip install 'lora_jax[train]')."
    found = [row for row in rows if is_measured(row)]
    if not found:
        return "No figure: nothing was measured."
    from matplotlib.figure import Figure

    scalings = list(dict.fromkeys(row["scaling"] for row in found))
    figure = Figure(figsize=(11, 4.5 * len(scalings)), layout="constrained")
    panels = figure.subplots(len(scalings), 2, squeeze=False)
    for (left, right), scaling in zip(panels, scalings, strict=True):
        _panels(left, right, scaling, [row for row in found if row["scaling"] == scaling])
    figure.savefig(file, dpi=110)
    return None


def _panels(left: Any, right: Any, scaling: str, rows: Sequence[Row]) -> None:
    """Tokens a second to the left, efficiency to the right: a colour a case and contender."""
    colours: dict[tuple[str, str], str] = {}
    for names in dict.fromkeys((row["case"], row["contender"], row["way"]) for row in rows):
        own = [row for row in rows if (row["case"], row["contender"], row["way"]) == names]
        own.sort(key=lambda row: row["devices"])
        colour = colours.setdefault(names[:2], f"C{len(colours)}")
        at = [row["devices"] for row in own]
        percent = [100 * (efficiency(row, rows) or float("nan")) for row in own]
        for axes, values in ((left, [rate(row) for row in own]), (right, percent)):
            axes.plot(at, values, STYLES[names[2]], color=colour, label=_label(names))
    if scaling == "weak":
        for way, target in TARGETS.items():
            right.axhline(100 * target, color="black", linewidth=0.7, linestyle=STYLES[way][1:])
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter("{x:,.0f}")
    left.set_ylabel("tokens/s")
    right.set_ylabel("efficiency, %")
    right.set_ylim(0, 105)
    counts = sorted({row["devices"] for row in rows})
    for axes in (left, right):
        axes.set_title(f"{scaling} scaling", fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xlim(counts[0] / 1.2, counts[-1] * 1.2)  # also where nothing is to be drawn
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.set_xlabel("devices")
    legend = right.legend(fontsize=7, loc="lower left")  # where efficiencies seldom are
    legend.set_in_layout(False)  # a long line of it leaves the panels their size


def _label(names: Sequence[str]) -> str:
    """Of a line; the options of a variant below each other."""
    return "\n    ".join(textwrap.wrap(", ".join(names).replace(",xla", ", xla"), 60))
