"""A directory of steps: what is listed, which is the best, and what goes.

4/                          a step
4.orbax-checkpoint-tmp/     one that is being written
4.deleted/                  one that is being deleted
4.damaged/                  one that cannot be restored, kept to be looked at

A rename takes a step onto the list and off it, so a process that is killed leaves none in between.
"""

import contextlib
import dataclasses
import logging
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from . import _manifest

LOG = logging.getLogger(__name__)
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps in a directory. All is read from disk whenever it is asked for.

    Attributes:
        directory: Where they are.
        keep: How many of the latest to keep.
        best: Whether the best score is the highest or the lowest.
    """

    directory: Path
    keep: int
    best: Literal["max", "min"]

    def path(self, step: int) -> Path:
        """Where a step is."""
        return self.directory / str(step)

    def manifest(self, step: int) -> _manifest.Manifest:
        """What a step must hold.

        Raises:
            DamagedError: That cannot be known.
        """
        return _manifest.read(self.path(step) / "manifest" / MANIFEST)

    def all_steps(self) -> list[int]:
        """The steps, in order."""
        names = (path.name for path in self.directory.iterdir())
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))

    def latest_step(self) -> int | None:
        """The last step, if there is any."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step of the best score, if any has one; of equal ones the later.

        A step whose manifest is damaged cannot be restored and is not considered; a warning
        names it.
        """
        sign = 1 if self.best == "max" else -1
        scores = {step: score for step, score in self._scores().items() if not math.isnan(score)}
        return max(scores, key=lambda step: (sign * scores[step], step), default=None)

    def last_notes(self) -> dict[str, Any] | None:
        """The notes of the last step whose manifest is whole; None if there is none."""
        for step in reversed(self.all_steps()):
            with contextlib.suppress(_manifest.DamagedError):
                return self.manifest(step).notes
        return None

    def delete_old(self) -> None:
        """Deletes all but the latest and the best; one without a whole manifest is set aside."""
        kept = {*self.all_steps()[-self.keep :], self.best_step()}
        whole = self._scores()
        for step in set(self.all_steps()) - kept:
            if step in whole:
                self.path(step).rename(self._renamed(step, "deleted"))
            else:
                self.set_aside(step)
        self.sweep()

    def delete(self, step: int) -> None:
        """Deletes a step."""
        self.path(step).rename(self._renamed(step, "deleted"))
        self.sweep()

    def set_aside(self, step: int) -> None:
        """Takes a damaged step off the list, so that it is not kept in place of a good one."""
        aside = self._renamed(step, "damaged")
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):  # whoever may only read goes on
            self.path(step).rename(aside)

    def sweep(self) -> None:
        """Removes what was not written or not deleted to its end."""
        for path in self.directory.iterdir():
            if path.suffix == ".deleted" or ocp.utils.TMP_DIR_SUFFIX in path.name:
                shutil.rmtree(path, ignore_errors=True)

    def _renamed(self, step: int, what: Literal["deleted", "damaged"]) -> Path:
        return self.directory / f"{step}.{what}"

    def _scores(self) -> dict[int, float]:
        """Step -> score, NaN where it has none; of the steps that have a whole manifest."""
        scores = {}
        for step in self.all_steps():
            try:
                score = self.manifest(step).score
            except _manifest.DamagedError as error:
                LOG.warning("Checkpoint %d in %s has no score: %s.", step, self.directory, error)
            else:
                scores[step] = math.nan if score is None else score
        return scores


def on_one_process(work: Callable[..., None], *arguments: Any) -> None:
    """Does it on the first process; the others wait."""
    if jax.process_index() == 0:
        work(*arguments)
    multihost_utils.sync_global_devices("lora_jax.io.checkpoints")
