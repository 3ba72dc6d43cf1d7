"""Families of models: which package knows the architecture that a ``config.json`` describes.

"model_type": "roberta"   ->   lora_jax/models/bert/
"""

from collections.abc import Mapping
from typing import Any, Protocol

import flax.linen as nn

from lora_jax.io.names import NameTable
from lora_jax.models import bert, gpt2, llama


class Family(Protocol):
    """What the package of a family offers, as constants and functions."""

    @property
    def MODEL_TYPES(self) -> tuple[str, ...]:
        """The values of ``model_type`` that it reads."""
        ...

    @property
    def TASKS(self) -> tuple[str, ...]:
        """What its models can do."""
        ...

    def read_config(self, fields: Mapping[str, Any], num_labels: int | None = None) -> Any:
        """The family's config of a ``config.json``; a field that it does not honour is an error."""
        ...

    def name_table(self, config: Any, task: str, *, scan_layers: bool) -> NameTable:
        """The published name of every weight."""
        ...

    def make_module(
        self,
        config: Any,
        task: str,
        *,
        dtype: Any,
        param_dtype: Any,
        scan_layers: bool,
        remat: bool | str,
        layers_per_step: int = 1,
    ) -> nn.Module:
        """The Linen module: ``apply({"params": params}, input_ids, attention_mask, ...)``."""
        ...

    def architecture(self, config: Any, task: str) -> str:
        """The name that ``config.json`` lists under ``architectures``."""
        ...

    def config_fields(self, config: Any) -> dict[str, Any]:
        """What ``config.json`` says of the architecture, field by field."""
        ...


_FAMILIES: tuple[Family, ...] = (bert, gpt2, llama)


def family_of(config_json: Mapping[str, Any]) -> Family:
    """The family of a checkpoint.

    Raises:
        ValueError: No family reads this ``model_type``.
    """
    by_type = {name: family for family in _FAMILIES for name in family.MODEL_TYPES}
    model_type = config_json.get("model_type")
    if not isinstance(model_type, str) or model_type not in by_type:
        raise ValueError(f"`model_type` must be one of {tuple(by_type)}, got {model_type!r:.80}.")
    return by_type[model_type]


def check_task(family: Family, model_type: str, task: str) -> None:
    """Refuses a task that the family's models do not have.

    Raises:
        ValueError: It is unknown.
    """
    if task not in family.TASKS:
        raise ValueError(
            f"Task {task!r} is unknown to a model of type {model_type!r}; "
            f"known: {', '.join(family.TASKS)}."
        )
