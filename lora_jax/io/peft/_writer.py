"""Adapters written: our factors under PEFT's names, or an error that names what has none."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from lora_jax._config import LoraConfig
from lora_jax._parts import PartFactors
from lora_jax._weights import Factors
from lora_jax.io._directory import new_directory
from lora_jax.io._safetensors import write_tensors
from lora_jax.io.hub import looks_like_path
from lora_jax.io.names import NameTable
from lora_jax.io.peft import _card, _config, _keys, _modules, _tied, _trained
from lora_jax.io.peft._config import HEAD_TYPES, TASK_TYPES, WEIGHTS, commonest, tidy
from lora_jax.io.peft._matching import covering_names
from lora_jax.io.peft._modules import Module
from lora_jax.io.peft._parts import write_note
from lora_jax.io.peft._trained import Trained

if TYPE_CHECKING:
    from lora_jax.models import Pretrained

Profile = Literal["peft", "vllm"]


def save_adapter(
    directory: str | os.PathLike,
    trainable: Mapping[str, Any],
    config: LoraConfig,
    model: "Pretrained",
    *,
    profile: Profile = "peft",
    base_model: str | None = None,
    revision: str | None = None,
    evaluation: Mapping[str, float] | None = None,
    data_hash: str | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes what was trained as an adapter that PEFT loads, whole or not at all.

    A kernel adapted in part becomes one block adapter of the whole kernel, and a tied embedding
    the adapters of both of its modules. Biases train in PEFT as those of all adapted modules or
    as all there are.

    Args:
        directory: Where; made, with its parents. It gets ``adapter_config.json``,
            ``adapter_model.safetensors`` and the card, ``README.md``.
        trainable: The trainable half of `lora_jax.split`.
        config: The config that it was split with.
        model: The model that was split.
        profile: ``"vllm"`` writes what vLLM reads: one rank and one scale, others put into
            ``b``; no rsLoRA, nothing trained in full.
        base_model: Hub id of the base, for ``base_model_name_or_path`` and the card; the id that
            ``model`` was loaded by if None, and left out if that was a directory.
        revision: Branch, tag or commit of ``base_model``, for ``revision`` and the card; the one
            that ``model`` was loaded at if None and ``model`` is that base.
        evaluation: What the card says of the adapter: metric to value.
        data_hash: What the card says of the data that it was trained on.
        quantize: What the card says of the base's precision meanwhile: the scheme that it was
            quantised to; that of ``model`` if None.
        overwrite: Whether a directory that holds files may be replaced.

    Raises:
        ValueError: Weights that the format cannot express, all of them listed: targets that are
            neither matrices nor embeddings, a module of which only a part is trained, a newly
            drawn head that is not trained, and what the profile has not; or values are not
            finite, ``base_model`` is a path, ``revision`` is given without it, or ``directory``
            holds files.
        OSError: A file could not be written; nothing is left behind.
    """
    if profile not in get_args(Profile):
        raise ValueError(f"`profile` must be one of {get_args(Profile)}, got {profile!r}.")
    if base_model is not None and looks_like_path(base_model):
        raise ValueError(f"`base_model` must be a hub id, got the path {base_model!r}.")
    if revision is not None and base_model is None:
        raise ValueError(f"`revision` {revision!r} is of no base: give `base_model` too.")
    base_model = base_model or model.hub_id
    if revision is None and base_model == model.hub_id:
        revision = model.revision
    written = _written(trainable, model, profile)
    base = {"base_model_name_or_path": base_model, "revision": revision}
    fields = base | _fields(written, config, model, profile)
    notes = _notes(written, model.names)
    facts = _card.Facts(evaluation or {}, data_hash, quantize or model.quantize)
    card = _card.card(config, model, fields, facts, notes)
    with new_directory(directory, overwrite=overwrite) as beside:
        write_tensors(beside / WEIGHTS, written.tensors, written.note)
        text = json.dumps(fields, indent=2, sort_keys=True)
        (beside / _config.FILE).write_text(text + "\n", encoding="utf-8")
        (beside / _card.FILE).write_text(card, encoding="utf-8")
    return Path(directory)


class _Written(NamedTuple):
    """What the file will hold: adapters of modules, tensors in full, and a note on parts."""

    modules: list[Module]
    trained: Trained
    tensors: dict[str, Any]
    note: dict[str, str]


def _written(trainable: Mapping[str, Any], model: "Pretrained", profile: Profile) -> _Written:
    names = model.names
    low_rank = {path: f for path, f in trainable.items() if isinstance(f, Factors)}
    full = [path for path in trainable if path not in low_rank]
    unfit = list(_unfit(trainable, model))
    modules = [] if unfit else _adapters(low_rank, names)
    adapted = {m for path in low_rank.keys() & names.entries for m in names.entries[path].modules}
    trained = _trained.describe(full, adapted, names)
    problems = [
        *unfit,
        *trained.problems,
        *_trained.tied_problems(trained, low_rank, names),
        *(_unfit_for_vllm(modules, full, names) if profile == "vllm" else ()),
    ]
    if problems or not modules:
        listed = "".join(f"\n  {p}" for p in problems or ["no weight is adapted: save the model"])
        raise ValueError(f"This cannot be written as an adapter:{listed}")
    modules = _modules.bake(modules) if profile == "vllm" else modules
    tensors = {key: tensor for module in modules for key, tensor in module.tensors().items()}
    by_name = {module.name for module in modules}
    tensors |= _trained.tensors(trained, trainable, by_name, model)
    if diverged := [key for key, tensor in tensors.items() if not np.isfinite(tensor).all()]:
        raise ValueError(f"This adapter has diverged; not finite: {', '.join(sorted(diverged))}.")
    note = {} if profile == "vllm" else write_note(_parts(low_rank, names))
    return _Written(modules, trained, tensors, note)


def _unfit(trainable: Mapping[str, Any], model: "Pretrained") -> Iterable[str]:
    """Weights that no adapter of this model has, and a head that no base has."""
    for path, factors in trainable.items():
        if path not in model.names.entries:
            yield f"{path} is not a weight of the model"
        elif isinstance(factors, Factors):
            yield from _inexpressible(path, factors, model)
    for path in model.new:
        if path not in trainable or isinstance(trainable[path], Factors):
            yield f"{path} was newly drawn and is not trained: `train` it in full"


def _adapters(low_rank: Mapping[str, Factors], names: NameTable) -> list[Module]:
    """The adapters of all modules, both modules of a tied weight included."""
    modules = [
        module
        for path, factors in low_rank.items()
        for module in _modules.modules_of(names.entries[path], factors)
    ]
    by_name = {module.name: module for module in modules}
    for copy, path in _tied.tied_paths(names).items():
        if path in low_rank:
            (original,) = names.entries[path].modules
            modules.append(by_name[original].transposed(_tied.module_of(copy)))
    return modules


def _parts(low_rank: Mapping[str, Factors], names: NameTable) -> dict[str, tuple[bool, ...]]:
    in_parts = {path: f for path, f in low_rank.items() if isinstance(f, PartFactors)}
    return {m: f.parts for path, f in in_parts.items() for m in names.entries[path].modules}


def _inexpressible(path: str, factors: Factors, model: "Pretrained") -> Iterable[str]:
    entry = model.names.entries[path]
    layout = ("stack", "in", "out") if entry.stacked else ("in", "out")
    if not _keys.is_adaptable(entry.kind) or factors.layout != layout:
        yield f"{path}: only kernels and embeddings, laid out {layout}, can be adapted"
    elif model.names.in_head(path) and TASK_TYPES[model.task] in HEAD_TYPES:
        yield f"{path}: PEFT trains a head in full and would ignore the factors"


def _unfit_for_vllm(modules: list[Module], full: list[str], names: NameTable) -> Iterable[str]:
    """What vLLM refuses, or reads as something else."""
    if full:
        yield f"{', '.join(sorted(full))}: vLLM reads no weights that are trained in full"
    tied = {_tied.module_of(copy) for copy in names.tied}
    for module in modules:
        if module.rank > _modules.VLLM_MAX_RANK:
            most = _modules.VLLM_MAX_RANK
            yield f"{module.name}: vLLM takes ranks up to {most}, and this has {module.rank}"
        if module.name in tied:
            yield f"{module.name}: tied to an embedding that is adapted; vLLM adapts one of the two"


def _fields(
    written: _Written,
    config: LoraConfig,
    model: "Pretrained",
    profile: Profile,
) -> dict[str, Any]:
    """``adapter_config.json`` without its base, every field explicit."""
    use_rslora = config.use_rslora and profile == "peft"
    ranks = {m.name: m.rank for m in written.modules}
    alphas = {
        m.name: tidy(m.scale * (math.sqrt(m.rank) if use_rslora else m.rank), 14)
        for m in written.modules
    }
    r, alpha = commonest(ranks.values()), commonest(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": _task_type(written.trained, model),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {m: rank for m, rank in ranks.items() if rank != r},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
        "use_rslora": use_rslora,
        "lora_dropout": config.dropout,
        "target_modules": covering_names(ranks, _all_modules(model.names)),
        "modules_to_save": list(written.trained.modules) or None,
        "bias": written.trained.bias,
        "fan_in_fan_out": any(module.kind == "conv1d" for module in written.modules),
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    } | _tying(written, model.names)


def _all_modules(names: NameTable) -> set[str]:
    """Every module that owns a tensor, those that only repeat another's and unused ones too."""
    tensors = [tensor for entry in names.entries.values() for tensor in entry.tensors]
    return {_tied.module_of(tensor) for tensor in (*tensors, *names.tied, *names.unused)}


def _tying(written: _Written, names: NameTable) -> dict[str, bool]:
    """PEFT's word for tied weights, which it has for embeddings of this name alone.

    The file adapts or saves both modules alike, and loads the same without the word.
    """
    tied = set(_tied.tied_paths(names).values())
    embeddings = {module for path in tied for module in names.entries[path].modules}
    touched = {module.name for module in written.modules} | {*written.trained.modules}
    ends = {module.rpartition(".")[2] for module in embeddings & touched}
    return {"ensure_weight_tying": True} if "embed_tokens" in ends else {}


def _notes(written: _Written, names: NameTable) -> Iterable[str]:
    """What the card says of a file that others might misread."""
    tied = {_tied.module_of(copy) for copy in names.tied}
    if twice := sorted(tied & {module.name for module in written.modules}):
        yield (
            f"The embedding and `{twice[0]}` are one weight, adapted in both uses. PEFT's "
            "`merge_and_unload` adds the update of such a weight twice (it warns of it): merge "
            "with `lora_jax.merge`."
        )
    if written.note:
        yield (
            "Fused kernels are adapted in part: in the file each is one adapter of a higher "
            "rank, zero outside its parts. Training on in PEFT would fill these zeros."
        )


def _task_type(trained: Trained, model: "Pretrained") -> str | None:
    """PEFT's name of the task; null where the file lacks the head that PEFT would look for."""
    task_type = TASK_TYPES[model.task]
    heads = {model.names.entries[path].tensors[0].partition(".")[0]
             for path in model.names.entries if model.names.in_head(path)}  # fmt: skip
    is_saved = not heads.isdisjoint(trained.modules)
    return task_type if is_saved or task_type not in HEAD_TYPES else None
