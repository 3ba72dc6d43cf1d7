"""The members of a sweep: one config for each combination of what differs.

sweep.learning_rate=[1e-4,1e-3] sweep.seed=[0,1]   ->   learning_rate=0.0001,seed=0  and three more
"""

import itertools
from pathlib import Path
from typing import Any

from .config import SWEPT, Config
from .config_file import from_plain


def swept(config: Config) -> dict[str, tuple[Any, ...]]:
    """What differs, and its values; nothing of a single run."""
    values = {name: getattr(config.sweep, name) for name in SWEPT}
    return {name: own for name, own in values.items() if own}


def members(config: Config) -> dict[str, Config]:
    """The config of each member by the member's name, which is that of its directory too.

    Each can be run alone.

    Raises:
        ValueError: The members would learn from different rows.
    """
    if config.sweep.seed and config.data.packing:
        raise ValueError(
            "`data.packing` packs rows by `training.seed`, so members would have different ones: "
            "remove `sweep.seed` or `data.packing`."
        )
    differing = swept(config)
    combinations = itertools.product(*differing.values())
    settings = [dict(zip(differing, values, strict=True)) for values in combinations]
    return {name_of(own): member(config, own) for own in settings}


def name_of(settings: dict[str, Any]) -> str:
    """A member's name.

    >>> name_of({"learning_rate": 1e-4, "seed": 0})
    'learning_rate=0.0001,seed=0'
    """
    return ",".join(f"{name}={value}" for name, value in settings.items())


def member(config: Config, settings: dict[str, Any]) -> Config:
    """The config of one run: these settings, and a directory of its own below the sweep's."""
    values = config.model_dump()
    del values["sweep"]
    for name, value in settings.items():
        values[SWEPT[name]][name] = value
    values["output"]["directory"] = str(Path(config.output.directory) / name_of(settings))
    return from_plain(values)
