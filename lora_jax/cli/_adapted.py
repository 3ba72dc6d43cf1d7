"""A base and an adapter of it, as the command line names them, for `merge`, `export`, `generate`.

--adapter DIR     adapter_config.json, or a run of `lora-jax train`, whose adapter/ is meant
--base MODEL      else the base that the run's config or the adapter itself names (in `generate`,
                  --model)
"""

import argparse
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from .. import models
from .._weights import Factors
from ..io import gguf, hub, hugging_face, load_adapter
from ..io.peft import _config as adapter_config
from ..io.peft._card import Facts, read_facts
from ._task import labels_of, task_of

RUN_CONFIG, RUN_ADAPTER = "config.yaml", "adapter"  # as `lora-jax train` names them
MARKS = ("config.json", adapter_config.FILE)  # of a directory that may be replaced
_NAMES = ("task_type", "base_model_name_or_path", "revision")
_DTYPES = {"F16": jnp.float16, "BF16": jnp.bfloat16, "F32": jnp.float32, "F64": jnp.float32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
    """Where base and adapter are, found and checked before a weight is read.

    Attributes:
        base: A directory, GGUF file, package or hub id, for `from_pretrained`.
        adapter: The directory that has ``adapter_config.json``.
        task_type: What the adapter says that it is for, in PEFT's words.
        base_model: The hub id by which the adapter names its base, if it does.
        revision: Of ``base_model``: the branch, tag or commit that the adapter names, if it does.
        facts: What the adapter's card says of it.
    """

    base: str
    adapter: Path
    task_type: str | None
    base_model: str | None
    revision: str | None
    facts: Facts

    @property
    def base_revision(self) -> str | None:
        """What to load ``base`` at: a revision belongs to the base that it was named with."""
        return self.revision if self.base == self.base_model else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewrite(Sources):
    """Sources, and ``out``, the directory that will be written."""

    out: Path


class Adapted(NamedTuple):
    """A base model with an adapter: the model, what `load_adapter` gives, and the dtype asked for.

    Attributes:
        model: The base; a head that the adapter has in full is drawn in it.
        frozen: The frozen half.
        trainable: The trainable half.
        config: The adapter's config.
        dtype: What merged weights shall have.
    """

    model: models.Pretrained
    frozen: Any
    trainable: dict[str, Any]
    config: Any
    dtype: Any

    def counts(self) -> dict[str, int]:
        """How many weights are adapted, and how many are trained in full."""
        adapted = sum(isinstance(weight, Factors) for weight in self.trainable.values())
        return {"adapted": adapted, "trained_in_full": len(self.trainable) - adapted}


def add_arguments(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]):
    """Adds the options that the commands share, and what they run."""
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the base model: a directory, a GGUF file or a hub name "
        "(default: the one that the run or the adapter names)",
    )
    parser.add_argument(
        "--adapter",
        required=True,
        metavar="DIR",
        help="an adapter in PEFT's format, or a run directory of lora-jax train",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="where to write; a new name")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the model or adapter that --out holds"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def find(options: argparse.Namespace) -> Rewrite:
    """Finds base and adapter and checks that the result may be written.

    Raises:
        ValueError: As `find_sources` raises it, or ``--out`` is in use.
    """
    sources = find_sources(options.adapter, options.base, "--base")
    out = _home(options.out)
    read = [_home(sources.base), sources.adapter, _home(options.adapter)]
    _check_out(out, options.overwrite, read)
    return Rewrite(**vars(sources), out=out)


def find_sources(adapter: str, base: str | None, option: str) -> Sources:
    """Finds an adapter and its base.

    Args:
        adapter: The directory of an adapter, or of a run.
        base: The base, where one is given; None means the one that run or adapter names.
        option: The command's option for ``base``, for messages.

    Raises:
        ValueError: A path does not exist or is no adapter, or no base is named.
    """
    given = _home(adapter)
    directory = _adapter_directory(given)
    fields = _names(directory)
    named = fields["base_model_name_or_path"]
    is_hub_id = named is not None and not hub.looks_like_path(named)
    base = base or _base_of_run(given, option) or named
    if base is None:
        raise ValueError(f"{given} does not say what its base model is: add {option}.")
    return Sources(
        base=base,
        adapter=directory,
        task_type=fields["task_type"],
        base_model=named if is_hub_id else None,
        revision=fields["revision"] if is_hub_id else None,
        facts=read_facts(directory),
    )


def load(sources: Sources, dtype: str | None = None) -> Adapted:
    """Loads the base for the adapter's task, and the adapter onto it.

    The base is held so that nothing is rounded before it is merged: in its stored dtype, or in
    float32 where ``dtype`` can hold more.

    Args:
        sources: Of `find`.
        dtype: What merged weights shall have; None means the base's stored dtype.

    Raises:
        ValueError: The base cannot be read, is not for the adapter's task, has no head where
            the adapter has none either, or does not fit the adapter.
    """
    place = hub.find_checkpoint(sources.base, revision=sources.base_revision)
    config_json = (gguf if place.is_file() else hugging_face).read_config_json(place)
    task = task_of(sources.task_type, config_json)
    num_labels = labels_of(sources.adapter, config_json, task)
    stored = _stored_dtype(place)
    wanted = stored if dtype is None else jnp.dtype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", models.NewHeadWarning)  # checked below
        model = models.from_pretrained(
            sources.base,
            task,
            num_labels=num_labels,
            dtype=jnp.promote_types(stored, wanted),
            new_head=None if num_labels is None else True,
            revision=sources.base_revision,
        )
    frozen, trainable, config = load_adapter(sources.adapter, model)
    if drawn := [path for path in model.new if path not in trainable]:
        raise ValueError(
            f"Neither {sources.base} nor {sources.adapter} has {', '.join(drawn)}, which "
            f"{task} needs: name the base that the adapter was trained on."
        )
    return Adapted(model, frozen, trainable, config, wanted)


def size(directory: Path) -> dict[str, int]:
    """Bytes and number of the weight files in a directory."""
    sizes = [file.stat().st_size for file in directory.glob("*.safetensors")]
    return {"bytes": sum(sizes), "files": len(sizes)}


def _home(path: str) -> Path:
    """With ``~`` written out."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: {error}") from None


def _adapter_directory(given: Path) -> Path:
    if not given.is_dir():
        found = "is a file" if given.exists() else "does not exist"
        raise ValueError(f"The adapter {given} {found}: name a directory.")
    inside = given / RUN_ADAPTER
    directory = inside if (given / RUN_CONFIG).is_file() and inside.is_dir() else given
    for name in (adapter_config.FILE, adapter_config.WEIGHTS):
        if not (directory / name).is_file():
            has = ", ".join(sorted(file.name for file in directory.iterdir())) or "nothing"
            raise ValueError(f"{directory} is not an adapter: it has no {name}, but {has}.")
    return directory


def _names(adapter: Path) -> dict[str, str | None]:
    """The fields that name task and base, once the whole config is known to be right."""
    adapter_config.read(adapter)
    fields = adapter_config.read_fields(adapter)
    names = {name: fields.get(name) or None for name in _NAMES}
    if not all(isinstance(name, str | None) for name in names.values()):
        listed = ", ".join(f"`{name}`" for name in _NAMES)
        raise ValueError(f"{adapter}: {listed} must be names.")
    return names


def _base_of_run(run: Path, option: str) -> str | None:
    """The model that a run's config names; a path in it is relative to the run."""
    file = run / RUN_CONFIG
    if not file.is_file():
        return None
    import yaml

    try:
        path = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]["path"]
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError):
        path = None
    if not isinstance(path, str) or not path:
        raise ValueError(f"{file} does not name a model (model.path): add {option}.")
    return os.fspath(run / path) if (run / path).exists() else path


def _check_out(out: Path, overwrite: bool, sources: Iterable[Path]) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a directory.")
    for source in sources:
        if source.exists() and source.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--out {out} holds what is read, {source}: give another name.")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"--out {out} holds files already: add --overwrite or give a new name.")
    if not any((out / mark).is_file() for mark in MARKS):
        raise ValueError(
            f"--out {out} holds files that are neither a model nor an adapter, and is left as it "
            "is: give a new name."
        )


def _stored_dtype(place: Path) -> Any:
    """The dtype that holds every weight of a checkpoint; of a quantised file, float32."""
    if place.is_file():
        return jnp.dtype(jnp.float32)
    found = {tensor.dtype for tensor in hugging_face.find_tensors(place).values()}
    dtypes = [_DTYPES[name] for name in sorted(found & _DTYPES.keys())]
    return jnp.dtype(jnp.result_type(*dtypes)) if dtypes else jnp.dtype(jnp.float32)
