"""The one figure: a panel for each claim. Matplotlib comes with the ``train`` extra."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
GIB = 2**30
LORA, FULL, OTHER = "#0072b2", "#d55e00", "#999999"  # told apart by colour-blind eyes too


def draw(file: Path, results: Mapping[str, Any]) -> str | None:
    """Draws what there is; a panel without results says so.

    Returns:
        None, or a line that says why there is no figure.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "No figure: matplotlib is not installed (pip install 'lora_jax[train]')."
    from matplotlib.figure import Figure

    figure = Figure(figsize=(19, 9), layout="constrained")
    for axes, (title, panel) in zip(figure.subplots(2, 4).flat, PANELS, strict=True):
        axes.set_title(title, fontsize=10)
        if not panel(axes, results):
            axes.text(0.5, 0.5, "not run", ha="center", va="center", transform=axes.transAxes)
            axes.set_axis_off()
    figure.savefig(file, dpi=110)
    return None


def _rows(results: Mapping[str, Any], part: str) -> list[Row]:
    found = results.get(part, {"rows": []})["rows"]
    return [row for row in found if row.get("status", "measured") == "measured"]


def _parameters(axes: Any, results: Mapping[str, Any]) -> bool:
    rows = _rows(results, "a")
    pairs = [(row["trained"], row["parameters"]) for row in rows]
    _bars(axes, [row["size"] for row in rows], pairs, "parameters")
    return bool(rows)


def _checkpoints(axes: Any, results: Mapping[str, Any]) -> bool:
    rows = _rows(results, "a")
    pairs = [(row["adapter_file_bytes"] / 1e6, row["full_file_bytes"] / 1e6) for row in rows]
    _bars(axes, [row["size"] for row in rows], pairs, "MB")
    return bool(rows)


def _step_seconds(axes: Any, results: Mapping[str, Any]) -> bool:
    pairs = _pairs(results, lambda row: 1e3 * row["step_seconds"]["median"])
    _bars(axes, list(pairs), list(pairs.values()), "ms")
    return bool(pairs)


def _step_memory(axes: Any, results: Mapping[str, Any]) -> bool:
    pairs = _pairs(results, lambda row: row["memory_bytes"] / GIB)
    _bars(axes, list(pairs), list(pairs.values()), "GiB")
    return bool(pairs)


def _pairs(
    results: Mapping[str, Any], value: Callable[[Row], float]
) -> dict[str, tuple[float, float]]:
    """Size -> value of LoRA and of full fine-tuning, where both were measured."""
    found = {(row["size"], row["method"]): value(row) for row in _rows(results, "b")}
    sizes = dict.fromkeys(size for size, _ in found)
    return {
        size: (found[size, "lora"], found[size, "full"])
        for size in sizes
        if {(size, "lora"), (size, "full")} <= found.keys()
    }


def _bars(axes: Any, names: Sequence[str], pairs: Sequence[tuple[float, float]], unit: str) -> None:
    """LoRA and full fine-tuning side by side, and how many times the one goes into the other."""
    places = range(len(names))
    for shift, side, label, colour in ((-0.2, 0, "LoRA", LORA), (0.2, 1, "full", FULL)):
        heights = [pair[side] for pair in pairs]
        axes.bar([p + shift for p in places], heights, 0.4, label=label, color=colour)
    for place, (low, full) in enumerate(pairs):
        times = f"{full / low:,.0f}x" if full > 20 * low else f"{full / low:.2f}x"
        axes.text(place, max(low, full), times, ha="center", va="bottom", fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel(unit)
    axes.set_xticks(list(places), names, rotation=40, ha="right", fontsize=8)
    axes.margins(y=0.15)
    axes.legend(fontsize=8)


def _latency(axes: Any, results: Mapping[str, Any]) -> bool:
    rows = _rows(results, "c")
    ways = (
        ("again", "base again", OTHER),
        ("merged", "merged", LORA),
        ("factors", "factors", FULL),
    )
    for number, (name, label, colour) in enumerate(ways):
        found = [row[f"{name}_ratio"] for row in rows]
        medians = [ratio["median"] for ratio in found]
        below = [ratio["median"] - ratio["low"] for ratio in found]
        above = [ratio["high"] - ratio["median"] for ratio in found]
        places = [place + 0.2 * (number - 1) for place in range(len(rows))]
        style = {"fmt": "o", "capsize": 3, "color": colour, "label": label}
        axes.errorbar(places, medians, yerr=[below, above], **style)
    names = [f"{row['size']}\n{row['batch']} x {row['length']}" for row in rows]
    axes.axhline(1.0, color="black", linewidth=0.7)
    axes.set_ylabel("time / base's")
    axes.set_xticks(range(len(rows)), names, fontsize=8)
    axes.legend(fontsize=8)
    return bool(rows)


def _growth(series: str) -> Callable[[Any, Mapping[str, Any]], bool]:
    """The panel of one series: time to the left, memory to the right."""

    def panel(axes: Any, results: Mapping[str, Any]) -> bool:
        rows = [row for row in _rows(results, "d") if row["series"] == series]
        rows.sort(key=lambda row: row[series])
        at = [row[series] for row in rows]
        right = axes.twinx()
        for side, label, colour, values in (
            (axes, "ms a step", LORA, [1e3 * row["step_seconds"]["median"] for row in rows]),
            (right, "GiB", FULL, [row["memory_bytes"] / GIB for row in rows]),
        ):
            side.plot(at, values, "o-", color=colour)
            side.set_ylabel(label, color=colour)
            side.set_ylim(bottom=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, [f"{value:,}" for value in at], fontsize=8)
        axes.set_xlabel(series)
        if not rows:
            right.set_axis_off()
        return bool(rows)

    return panel


PANELS: tuple[tuple[str, Callable[[Any, Mapping[str, Any]], bool]], ...] = (
    ("Trained parameters", _parameters),
    ("Checkpoint of one task", _checkpoints),
    ("One training step", _step_seconds),
    ("Memory of the step", _step_memory),
    ("Inference, against the base model", _latency),
    ("Growth with rank", _growth("rank")),
    ("Growth with length (one row)", _growth("length")),
    ("Growth with batch", _growth("batch")),
)
