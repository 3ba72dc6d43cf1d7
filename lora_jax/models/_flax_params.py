"""Weights as the Flax classes of transformers 4.57 nest them, and back.

encoder/layers/0/attention/query/kernel                ours
bert.encoder.layer.0.attention.self.query.weight       published
bert/encoder/layer/0/attention/self/query/kernel       theirs: the published name, nested

Of the published name only the last word changes, with the kind of the weight. 4.57 is the last
release of transformers that has these classes.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from lora_jax.io.names import Published
from lora_jax.models._pretrained import Pretrained
from lora_jax.models._save import check_weights, leaves_of
from lora_jax.models.llama._rotary import Rope

CLASSES = (
    *("FlaxBertForSequenceClassification", "FlaxBertForTokenClassification"),
    *("FlaxBertForQuestionAnswering", "FlaxBertForMaskedLM"),
    *("FlaxRobertaForSequenceClassification", "FlaxRobertaForTokenClassification"),
    *("FlaxRobertaForQuestionAnswering", "FlaxRobertaForMaskedLM"),
    *("FlaxGPT2LMHeadModel", "FlaxLlamaForCausalLM"),
)
"""What takes the trees that are made here: each is tested against our own logits."""

_LAST_WORDS = {"linear": "kernel", "conv1d": "kernel", "embedding": "embedding", "other": "scale"}
_LLAMA = "FlaxLlamaForCausalLM"
_LLAMA_HEAD, _LLAMA_TABLE = "lm_head/kernel", "model/embed_tokens/embedding"


def to_flax_params(model: Pretrained, params: Any) -> dict[str, Any]:
    """The weights as a tree for ``Flax...(config)(input_ids, params=tree)``.

    Args:
        model: The model that the weights belong to; its class is ``"Flax"`` and the published
            name of its architecture, and must be one of `CLASSES`.
        params: Plain weights of the structure of ``model.params``: `lora_jax.merge` first.

    Returns:
        Nested dictionaries of arrays, of the dtypes given.

    Raises:
        ValueError: There is no such class, it would compute something else, or ``params`` are
            not plain weights of the model.
    """
    name = _class_of(model)
    weights = leaves_of(params)
    check_weights(weights, model)
    tree: dict[str, jax.Array] = {}
    for path, entry in model.names.entries.items():
        parts = list(weights[path]) if entry.stacked else [weights[path]]
        parts = [_turned(entry, jnp.asarray(part)) for part in parts]
        tree |= zip(_places(entry, name), parts, strict=True)
    if name == _LLAMA:  # it has a head of its own, tied or not
        tree.setdefault(_LLAMA_HEAD, tree[_LLAMA_TABLE].T)
    return unflatten_dict(tree, sep="/")


def from_flax_params(model: Pretrained, params: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of ``Flax...(config).params`` as ours, for ``model.apply``.

    Args:
        model: A model of the same architecture; its own weights are not used.
        params: Their nested dictionaries.

    Returns:
        The structure of ``model.params``, of the dtypes given.

    Raises:
        ValueError: There is no such class, it computes something else, or weights are missing,
            left over or of another shape; all are listed.
    """
    name = _class_of(model)
    given = flatten_dict(dict(params), sep="/")
    weights: dict[str, Any] = {}
    for path, entry in model.names.entries.items():
        parts = [given.get(place) for place in _places(entry, name)]
        if all(part is not None for part in parts):
            turned = [_turned(entry, jnp.asarray(part)) for part in parts]
            weights[path] = jnp.stack(turned) if entry.stacked else turned[0]
    known = {place for entry in model.names.entries.values() for place in _places(entry, name)}
    left = {place: given[place] for place in given if place not in known}
    if name == _LLAMA and model.config.tie_word_embeddings:
        _check_tied(left.pop(_LLAMA_HEAD, None), given.get(_LLAMA_TABLE))
    check_weights(weights | left, model)
    return unflatten_dict(weights, sep="/")


def _places(entry: Published, name: str) -> list[str]:
    """The path of every published tensor of a weight in their tree."""
    places = []
    for tensor in entry.tensors:
        owner, _, last = tensor.rpartition(".")
        if last == "weight":
            last = _LAST_WORDS[entry.kind]
            if last == "scale" and name == _LLAMA:  # their RMSNorm's own name
                last = "weight"
        places.append(f"{owner}.{last}".replace(".", "/"))
    return places


def _turned(entry: Published, weight: jax.Array) -> jax.Array:
    """FlaxConv1D holds ``(out, in)``; everything else is as ours."""
    return weight.T if entry.kind == "conv1d" else weight


def _check_tied(head: Any, table: Any) -> None:
    if head is not None and table is not None and not jnp.array_equal(head, table.T):
        raise ValueError(
            f"{_LLAMA_HEAD} differs from {_LLAMA_TABLE}, and the model's head is tied: load it "
            "with tie_word_embeddings false."
        )


def _class_of(model: Pretrained) -> str:
    name = f"Flax{model.family.architecture(model.config, model.task)}"
    if name not in CLASSES:
        raise ValueError(
            f"transformers 4.57 has no {name} that takes these weights; known: "
            f"{', '.join(CLASSES)}."
        )
    fields = _llama_fields(model.config) if name == _LLAMA else {}
    odd = [f"{f} is {found!r}, not {own!r}" for f, (found, own) in fields.items() if found != own]
    if odd:
        raise ValueError(f"{name} would compute something else: {'; '.join(odd)}.")
    return name


def _llama_fields(config: Any) -> dict[str, tuple[Any, Any]]:
    """What the model has and what ``FlaxLlamaForCausalLM`` does, which does not read these."""
    return {
        "rope": (config.rope, Rope(rope_theta=10000.0)),
        "head_dim": (config.head_dim, config.hidden_size // config.num_attention_heads),
        "mlp_bias": (config.mlp_bias, False),
        "the bias of o_proj": (config.out_bias, config.query_key_value_bias),
    }
