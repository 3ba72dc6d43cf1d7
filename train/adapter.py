"""What a run leaves to be used: the adapter, saved, loaded again and checked.

A run without adapters (a head alone, full fine-tuning) leaves `weights.safetensors` in its place,
its trained weights under our own paths.
"""

import math
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

import lora_jax
from lora_jax import models
from lora_jax.io import peft

from .batches import collate
from .config import Config, lora_config
from .model import adapt
from .tasks import Sets, task_of

WEIGHTS = "weights.safetensors"
EXAMPLES = 8  # as many as the check runs the model on


class Check(NamedTuple):
    """What saving and loading again has shown.

    Attributes:
        bytes: Size of the saved weights.
        moved: Largest difference between the base model's logits and the adapted model's.
        merge_error: Largest difference between the adapted model's logits and the merged one's.
        tolerance: What `merge_error` may be at most; see `tolerance`.
    """

    bytes: int
    moved: float
    merge_error: float
    tolerance: float


def export(
    directory: Path,
    model: models.Pretrained,
    trainable: Any,
    config: Config,
    sets: Sets,
    evaluation: dict[str, float],
) -> Check:
    """Saves what was trained, loads it again, and checks that it is whole.

    Args:
        directory: Where.
        model: The base model.
        trainable: What was trained.
        config: The run's config.
        sets: The run's data; its hash goes onto the adapter's card.
        evaluation: The run's metrics, for the card as well.

    Raises:
        ValueError: What was loaded differs from what was saved, changes nothing, or differs
            once merged.
    """
    trainable = jax.device_get(trainable)
    data_hash = task_of(config).fingerprint(sets.train)
    save(directory, model, trainable, config, evaluation=evaluation, data_hash=data_hash)
    frozen, loaded = load(directory, model)
    for path, weight in trainable.items():
        for saved, found in zip(
            jax.tree.leaves(weight), jax.tree.leaves(loaded[path]), strict=True
        ):
            if not np.array_equal(saved, found):
                raise ValueError(f"{directory}: {path} was not saved as it was trained.")
    files = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return check(directory, model, frozen, loaded, config, sets, files)


def check_savable(model: models.Pretrained, trainable: Any, config: Config) -> None:
    """Tries, before a run, what will be saved after it.

    Raises:
        ValueError: A head would stay as it was drawn, or the format cannot express what trains.
    """
    if untrained := [path for path in model.new if path not in trainable]:
        patterns = sorted({f"{path.partition('/')[0]}/.*" for path in untrained})
        raise ValueError(
            f"The checkpoint has no {', '.join(untrained)}: they are drawn at random and would "
            f"not train. Add {', '.join(patterns)} to lora.train."
        )
    with tempfile.TemporaryDirectory() as directory:
        save(Path(directory) / "adapter", model, jax.device_get(trainable), config)


def save(
    directory: Path,
    model: models.Pretrained,
    trainable: Any,
    config: Config,
    *,
    evaluation: dict[str, float] | None = None,
    data_hash: str | None = None,
) -> None:
    """Saves the adapter in PEFT's format, or the trained weights where there is no adapter."""
    if any(isinstance(weight, lora_jax.Factors) for weight in trainable.values()):
        peft.save_adapter(
            directory,
            trainable,
            lora_config(config),
            model,
            evaluation=evaluation,
            data_hash=data_hash,
            overwrite=True,
        )
        return
    directory.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(
        {path: np.ascontiguousarray(weight) for path, weight in trainable.items()},
        directory / WEIGHTS,
    )


def load(directory: Path, model: models.Pretrained) -> tuple[Any, Any]:
    """What `save` saved, as ``(frozen, trainable)``."""
    if not (directory / WEIGHTS).is_file():
        return peft.load_adapter(directory, model)[:2]
    loaded = safetensors.numpy.load_file(directory / WEIGHTS)
    config = lora_jax.LoraConfig(rank=1, alpha=1.0, targets=(), train=tuple(loaded))
    frozen, _ = lora_jax.split(model.params, config, jax.random.key(0))
    return frozen, {path: jnp.asarray(weight) for path, weight in loaded.items()}


def check(
    directory: Path,
    model: models.Pretrained,
    frozen: Any,
    trainable: Any,
    config: Config,
    sets: Sets,
    size: int,
) -> Check:
    """Compares the base, the adapted and the merged model on a few examples.

    Of a quantised base only one weight is merged: see `smallest`.
    """
    task, evaluation = task_of(config), sets.evaluation
    rows = np.arange(min(EXAMPLES, len(evaluation.sizes)))
    batch = collate(evaluation, rows, evaluation.lengths)
    plain = jax.jit(lambda params: task.apply(model.apply, params, batch))
    adapted = jax.jit(lambda params: task.apply(adapt(model).apply, params, batch))
    with jax.default_matmul_precision("highest"):  # a GPU would round float32 to 10 bits
        base = plain(model.params)
        logits = adapted(lora_jax.combine(frozen, trainable))
        chosen = trainable if model.quantize is None else smallest(frozen, trainable)
        merged = plain(merge_some(frozen, trainable, chosen))
    done = Check(
        size,
        float(jnp.abs(logits - base).max()),
        float(jnp.abs(logits - merged).max()),
        tolerance(model, chosen, logits),
    )
    if not done.moved > 0:
        raise ValueError(f"{directory}: the adapted model gives the base model's logits.")
    if not done.merge_error <= done.tolerance:
        raise ValueError(
            f"{directory}: merged and unmerged logits differ by {done.merge_error:.2e}, more "
            f"than rounding explains ({done.tolerance:.2e})."
        )
    return done


def smallest(frozen: Any, trainable: Any) -> dict[str, Any]:
    """The smallest of the adapted weights: its path and factors.

    Of a quantised base the whole, merged, may be more than the device holds.
    """
    leaves: dict[str, Any] = dict(flatten_dict(frozen, sep="/"))
    adapted = [path for path, weight in trainable.items() if isinstance(weight, lora_jax.Factors)]
    return {path: trainable[path] for path in sorted(adapted, key=lambda p: leaves[p].size)[:1]}


def merge_some(frozen: Any, trainable: Any, chosen: Any) -> Any:
    """Combines the halves, the chosen weights merged and the others as they trained."""
    if chosen is trainable:
        return lora_jax.merge(frozen, trainable)
    leaves: dict[str, Any] = dict(flatten_dict(frozen, sep="/"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora_jax.DequantizedMergeWarning)  # as it trained
        merged = lora_jax.merge({path: leaves[path] for path in chosen}, chosen)
    rest = {path: weight for path, weight in trainable.items() if path not in chosen}
    return lora_jax.combine(unflatten_dict(leaves | merged, sep="/"), rest)


def tolerance(model: models.Pretrained, trainable: Any, logits: jax.Array) -> float:
    """How far rounding alone may move logits when these adapters are merged.

    Merging rounds every weight once, to the weight's precision, and sums in another order, in
    the arithmetic's precision. Independent roundings of the terms of a sum of n move it by about
    one unit of precision, relatively; sums in another order by about sqrt(n). A unit for each
    adapted weight, of a stack for each of its layers, since their errors add up, times the
    largest logit.
    """
    adapted = [leaf.whole() for leaf in trainable.values() if isinstance(leaf, lora_jax.Factors)]
    stacks = [math.prod(leaf.a.shape[: leaf.layout.count("stack")]) for leaf in adapted]
    widths = (
        leaf.a.size // leaf.rank // stack for leaf, stack in zip(adapted, stacks, strict=True)
    )
    widest = max(widths, default=1)
    weights = float(jnp.finfo(model.module.param_dtype).eps)
    arithmetic = float(jnp.finfo(model.module.dtype).eps)
    largest = max(1.0, float(jnp.abs(logits).max()))
    return max(1, sum(stacks)) * (weights + arithmetic * widest**0.5) * largest
