"""What a finished sweep says of itself: one table and one plot, a line for each member.

sweep.md     the table, and the plot below it
sweep.png    loss and metric over steps
sweep.json   the same for programs
"""

import importlib.util
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .config import SWEPT, Config, best_metric
from .console import Console, duration, size
from .finetune import Run
from .members import swept
from .report import peak_memory, smooth
from .run_directory import RESULT, read_rows, write_json, write_text
from .tasks import task_of
from .traits import is_better_lower

TABLE, PLOT, SWEEP = "sweep.md", "sweep.png", "sweep.json"
Points = tuple[list[int], list[float]]
"""Steps, and the values there."""


def write(
    config: Config, runs: Mapping[str, Run], seconds: float, console: Console
) -> dict[str, Any]:
    """Writes the three files, from what the members have left, and prints the table.

    Args:
        config: Of the sweep.
        runs: The members by name.
        seconds: How long the sweep took.
        console: Where to print.

    Returns:
        The contents of `sweep.json`.
    """
    directory = Path(config.output.directory)
    rows = {name: read_rows(member.directory) for name, member in runs.items()}
    found = [of_member(name, member, rows[name], config) for name, member in runs.items()]
    result = {
        "status": "finished",
        "members": found,
        "seconds": seconds,
        "compile_seconds": console.compile_seconds,
        "peak_memory_bytes": peak_memory(),
    }
    text = table(found, config)
    time = (
        f"{len(found)} runs in {duration(seconds)}, {console.compile_seconds:.0f} s of it "
        f"compiling; peak memory {size(result['peak_memory_bytes'])}"
    )
    picture = ""
    if importlib.util.find_spec("matplotlib") is not None:
        draw(directory / PLOT, rows, task_of(config).HEADLINE)
        picture = f"\n![loss and metric of every member over steps]({PLOT})\n"
    write_text(directory / TABLE, f"{text}\n\n{time}\n{picture}")
    write_json(directory / SWEEP, result)
    console.say(f"\n{text}\n\n{time}\nFinished: {directory}")
    return result


def of_member(
    name: str, member: Run, rows: Sequence[dict[str, Any]], config: Config
) -> dict[str, Any]:
    """A member's figures: `loss` is its training's at the end, smoothed, `best` its best score."""
    result = json.loads((member.directory / RESULT).read_text(encoding="utf-8"))
    metric = best_metric(config)
    losses = losses_of(rows)[1]
    evaluated, scores = scores_of([row for row in rows if row["step"]], metric)
    choose = min if is_better_lower(metric) else max
    best = choose(zip(scores, evaluated, strict=True), default=None)
    values = member.config.model_dump()
    return {
        "name": name,
        "settings": {key: values[SWEPT[key]][key] for key in swept(config)},
        "status": result["status"],
        "steps": result["steps"] if result["status"] == "finished" else result["step"],
        "loss": float(smooth(losses)[-1]) if losses else None,
        "metrics": result.get("metrics"),
        "best": best and {metric: best[0], "step": best[1]},
    }


def losses_of(rows: Sequence[dict[str, Any]]) -> Points:
    """Training losses."""
    return points((row["step"], row.get("loss")) for row in rows)


def scores_of(rows: Sequence[dict[str, Any]], metric: str) -> Points:
    """A metric of the evaluations."""
    return points((row["step"], row.get("evaluation", {}).get(metric)) for row in rows)


def points(pairs: Iterable[tuple[int, Any]]) -> Points:
    """Those that have a finite value; others are None, or words in the file.

    >>> points([(1, 2.5), (2, "nan"), (2, None)])
    ([1], [2.5])
    """
    found = [(step, value) for step, value in pairs if isinstance(value, float)]
    return [step for step, _ in found], [value for _, value in found]


def table(found: Sequence[dict[str, Any]], config: Config) -> str:
    """The members as Markdown."""
    metric, last = best_metric(config), task_of(config).HEADLINE
    settings = list(found[0]["settings"])
    header = (*settings, "status", "steps", "training loss", last, f"best {metric}", "at step")
    lines = [
        (
            *(str(value) for value in member["settings"].values()),
            member["status"],
            str(member["steps"]),
            number(member["loss"]),
            number((member["metrics"] or {}).get(last)),
            number((member["best"] or {}).get(metric)),
            str((member["best"] or {}).get("step", "")),
        )
        for member in found
    ]
    rule = ("---",) * (len(settings) + 1) + ("---:",) * (len(header) - len(settings) - 1)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *lines))


def number(value: float | None) -> str:
    """A figure of the table; nothing where there is none."""
    return "" if value is None else f"{value:.4f}"


def draw(path: Path, rows: Mapping[str, Sequence[dict[str, Any]]], metric: str) -> None:
    """Training loss, smoothed, and a metric of the evaluations over steps, a line a member."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained")
    colors = matplotlib.colormaps["viridis"]
    for place, (name, own) in enumerate(rows.items()):
        color = colors(place / max(1, len(rows) - 1))
        at, losses = losses_of(own)
        left.plot(at, smooth(losses), color=color, label=name)
        right.plot(*scores_of(own, metric), ".-", color=color)
    left.set(title="training loss, smoothed", xlabel="step")
    right.set(title=metric, xlabel="step")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    left.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
