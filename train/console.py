"""What a person sees: one progress bar in a terminal, plain lines elsewhere.

Time left is measured on steps alone: compiling, evaluating and saving are named when they happen
and counted apart.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import rich.console
import rich.progress
import rich.table

LIVE = "[bold]{task.description}[/]"
FIGURES = "loss {task.fields[loss]}  lr {task.fields[rate]}  {task.fields[speed]} tokens/s"


class Console:
    """Prints a run: to standard output, or with ``stderr`` to the other.

    With ``quiet`` it prints nothing, as is right for all processes of a run but one.

    Attributes:
        out: The rich console.
        compile_seconds: Time spent compiling so far.
    """

    def __init__(self, *, stderr: bool = False, quiet: bool = False):
        self.out = rich.console.Console(stderr=stderr, highlight=False, soft_wrap=True, quiet=quiet)
        self.compile_seconds = 0.0
        self._bar: rich.progress.Progress | None = None
        self._task: Any = None

    def say(self, message: str) -> None:
        """Prints a line; above the bar, where there is one."""
        self.out.print(message, markup=False)

    def warn(self, message: str) -> None:
        """Prints a line that should be noticed."""
        self.out.print(message, markup=False, style="yellow")

    def table(self, title: str, rows: dict[str, Any]) -> None:
        """Prints names and values side by side."""
        table = rich.table.Table(title=title, title_justify="left", show_header=False, box=None)
        for name, value in rows.items():
            table.add_row(name, str(value))
        self.out.print(table)

    @contextlib.contextmanager
    def compiling(self, what: str) -> Iterator[None]:
        """Says that something compiles, and counts the time apart."""
        start = time.perf_counter()
        if self._bar:
            self._bar.update(self._task, description=f"compiling {what}", refresh=True)
        else:
            self.say(f"compiling {what} ...")
        yield
        seconds = time.perf_counter() - start
        self.compile_seconds += seconds
        if self._bar:
            self._bar.update(self._task, description="training")
        else:
            self.say(f"compiled {what} in {seconds:.1f} s")

    @contextlib.contextmanager
    def progress(self, start: int, steps: int) -> Iterator[None]:
        """Shows the bar of a run that is at step ``start`` of ``steps``."""
        if not self.out.is_terminal:
            yield
            return
        columns = (
            rich.progress.TextColumn(LIVE),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn(FIGURES),
            rich.progress.TextColumn("{task.fields[left]} left"),
        )
        with rich.progress.Progress(*columns, console=self.out) as self._bar:
            empty: dict[str, Any] = {"loss": "-", "rate": "-", "speed": "-", "left": "-:--"}
            self._task = self._bar.add_task("training", total=steps, completed=start, **empty)
            yield
        self._bar = None

    def step(
        self,
        step: int,
        steps: int,
        *,
        loss: float,
        learning_rate: float,
        tokens_per_second: float,
        seconds_left: float,
    ) -> None:
        """Shows where the run is."""
        figures: dict[str, Any] = {
            "loss": f"{loss:.4f}",
            "rate": f"{learning_rate:.2e}",
            "speed": f"{tokens_per_second:,.0f}",
            "left": duration(seconds_left),
        }
        if self._bar:
            self._bar.update(self._task, completed=step, **figures)
            return
        self.say(
            f"step {step}/{steps}  loss {figures['loss']}  lr {figures['rate']}  "
            f"{figures['speed']} tokens/s  {figures['left']} left"
        )

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the metrics of an evaluation."""
        self.say(
            f"step {step} evaluation  "
            + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        )


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any.

    >>> duration(75.4), duration(3601)
    ('1:15', '1:00:01')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def size(count: float) -> str:
    """Bytes as a person reads them.

    >>> size(999), size(300_400), size(90e6), size(2.5e9)
    ('999 B', '300 kB', '90 MB', '2.5 GB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return (
                f"{count / factor:.1f} {unit}" if unit == "GB" else f"{count / factor:.0f} {unit}"
            )
    return f"{count:.0f} B"
