"""What a finished run says of itself: figures, curves, and one page that holds it all."""

import base64
import html
import importlib.util
import resource
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax import models, training

from .config import Config
from .config_file import to_yaml
from .console import duration, size
from .run_directory import CURVES, REPORT, write_text
from .tasks import Answers, Sets, task_of


def figures(
    model: models.Pretrained,
    state: training.TrainState,
    rows: Sequence[dict[str, Any]],
    summary: Any,
) -> dict[str, Any]:
    """The figures of a run, from its weights, its metrics file and `lora_jax.summary`."""
    steps = [row for row in rows if "loss" in row]
    seconds = [row["seconds"] for row in steps]
    return {
        "steps": int(state.step),
        "trained_parameters": sum(leaf.size for leaf in jax.tree.leaves(state.trainable)),
        "total_parameters": summary.total,
        "weight_bytes": weight_bytes(model.params),
        "optimizer_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
        "seconds_per_step": statistics.median(seconds),
        "tokens_per_second": sum(row["tokens"] for row in steps) / sum(seconds),
        "peak_memory_bytes": peak_memory(),
    }


def weight_bytes(params: Any) -> int:
    """What a model's weights take, as they are held; of shapes, what they would."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def peak_memory() -> int:
    """The most memory that this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def headline(result: dict[str, Any]) -> dict[str, str]:
    """A result's figures as a person reads them."""
    trained, total = result["trained_parameters"], result["total_parameters"]
    check = result["self_check"]
    return {
        **{name: f"{value:.4f}" for name, value in result["metrics"].items()},
        "trained parameters": f"{trained:,} of {total:,} ({100 * trained / total:.2f} %)",
        "model's weights": size(result["weight_bytes"]),
        "saved weights": size(result["checkpoint_bytes"]),
        "optimizer state": size(result["optimizer_bytes"]),
        "peak memory": size(result["peak_memory_bytes"]),
        "time": f"{duration(result['seconds'])}, {result['compile_seconds']:.0f} s of it compiling",
        "speed": f"{result['seconds_per_step']:.3f} s a step, "
        f"{result['tokens_per_second']:,.0f} tokens/s",
        "self-check": f"logits moved by {check['moved']:.2g}; merging moves them by "
        f"{check['merge_error']:.1e} (rounding allows {check['tolerance']:.1e})",
    }


def write(
    directory: Path,
    config: Config,
    result: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    summary: Any,
    sets: Sets,
    before: Answers,
    after: Answers,
) -> None:
    """Draws the curves and writes the page, which needs no other file."""
    task = task_of(config)
    weights = [
        (row.path, " x ".join(map(str, row.shape)), row.rank or "full", f"{row.trained:,}")
        for row in summary.rows
    ]
    examples = task.examples(sets, before, after)
    start = task.metrics(before.outputs, sets.evaluation)[task.HEADLINE]
    page = PAGE.format(
        title=html.escape(directory.name),
        metric=task.HEADLINE,
        score=score(result[task.HEADLINE], task.HEADLINE),
        start=score(start, task.HEADLINE),
        rows=len(before.outputs),
        curves=_curves(directory / CURVES, rows, task.CURVES),
        figures=_table((), headline(result).items()),
        examples=_table(examples.header, examples.rows, "examples"),
        weights=_table(("weight", "shape", "rank", "trained"), weights),
        config=html.escape(to_yaml(config, directory)),
    )
    write_text(directory / REPORT, page)


def score(value: float, metric: str) -> str:
    """A share in percent, anything else as a number."""
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.4g}"


def _curves(path: Path, rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> str:
    """The curves as HTML; a line that says so where nothing can draw them."""
    if importlib.util.find_spec("matplotlib") is None:
        return "There is no matplotlib to draw them: pip install 'lora_jax[train]'."
    draw_curves(path, rows, metrics)
    image = base64.b64encode(path.read_bytes()).decode()
    about = "loss, evaluation and learning rate over steps"
    return f'<img alt="{about}" src="data:image/png;base64,{image}">'


def draw_curves(path: Path, rows: Sequence[dict[str, Any]], metrics: Sequence[str]) -> None:
    """Loss, learning rate and the metrics of these names over steps, as one image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    steps = [row for row in rows if "loss" in row]
    at, losses = [row["step"] for row in steps], [row["loss"] for row in steps]
    evaluations = [row for row in rows if "evaluation" in row]
    evaluated = [row["step"] for row in evaluations]

    def measured(metric: str) -> list[float]:
        return [row["evaluation"][metric] for row in evaluations]

    left.plot(at, losses, color="#b9c4e6", linewidth=1, label="training, each step")
    left.plot(at, smooth(losses), color="#3554b5", linewidth=2, label="training, smoothed")
    left.plot(evaluated, measured("loss"), "o-", color="#d9822b", label="evaluation")
    left.set(title="loss", xlabel="step")
    left.legend(frameon=False)
    for name, color in zip(metrics, ("#2a7f62", "#8e5ea2", "#777777"), strict=False):
        middle.plot(evaluated, measured(name), "o-", color=color, label=name)
    middle.set(title="evaluation", xlabel="step")
    middle.legend(frameon=False)
    right.plot(at, [row["learning_rate"] for row in steps], color="#3554b5", linewidth=2)
    right.set(title="learning rate", xlabel="step")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def smooth(values: Sequence[float], span: int = 20) -> np.ndarray:
    """A running mean over at most ``span`` values up to each."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - span)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>\n"
        for row in rows
    )
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>'


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1d2433; background: #f6f7fa;
  margin: 0 auto; max-width: 1000px; padding: 2rem 1rem; }}
section {{ background: #fff; border-radius: 10px; padding: 1rem 1.5rem; margin: 1rem 0;
  box-shadow: 0 1px 3px #0002; overflow-x: auto; }}
h1 {{ margin: 0; }} h2 {{ font-size: 1.05rem; margin: .3rem 0 .8rem; }}
.score {{ font-size: 3rem; font-weight: 650; color: #2a7f62; line-height: 1.1; }}
.quiet {{ color: #667; }} img {{ width: 100%; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #eef;
  vertical-align: top; }}
th {{ color: #667; font-weight: 500; }}
.examples td {{ white-space: pre-wrap; }} .examples td:nth-child(n+2) {{ min-width: 7rem; }}
pre {{ font-size: 13px; overflow-x: auto; }}
</style></head><body>
<h1>{title}</h1>
<section><div class="score">{score}</div>
{metric} on {rows} evaluation examples <span class="quiet">({start} before training)</span>
</section>
<section><h2>Curves</h2>{curves}</section>
<section><h2>Figures</h2>{figures}</section>
<section><h2>The same examples, before and after</h2>{examples}</section>
<section><h2>What was trained</h2>{weights}</section>
<section><h2>Settings</h2><pre>{config}</pre></section>
</body></html>
"""
