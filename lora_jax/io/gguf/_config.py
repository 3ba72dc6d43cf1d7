"""A GGUF file's metadata as the ``config.json`` that the model was published with.

"llama.embedding_length": 576   ->   "hidden_size": 576

A key under the architecture's own prefix says how the model computes, so every one is honoured
or is an error. Keys under other prefixes (``general.name``, ``quantize.…``) describe the file.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.io.gguf._architectures import Architecture, architecture_of
from lora_jax.io.gguf._header import Header

# Keys that may have one value only: they switch on what none of these models computes.
_FIXED = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "rope.scale_linear": 1.0,
    "final_logit_softcapping": 0.0,
    "attn_logit_softcapping": 0.0,
    "use_parallel_residual": False,
}
# Keys that `_complete` and `_scale_rope` read or check.
_DERIVED = (
    *("rope.dimension_count", "attention.value_length"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned"),
)
_LLAMA3 = (1.0, 4.0, 8192)  # low and high frequency factor, positions before scaling
_GEMMA3_PERIOD = 6  # every sixth layer is global (Gemma 3 report, section 2)
_GEMMA3_27B_LAYERS = 62


def config_of(header: Header, rope_factors: np.ndarray | None) -> dict[str, Any]:
    """The fields of ``config.json``.

    Args:
        header: Of the file.
        rope_factors: ``(head_dim / 2,)``, the values of its tensor ``rope_freqs.weight``, which
            is how GGUF stores Llama 3's scaling; None where it has none.

    Raises:
        ValueError: One list of keys missing, unknown, of the wrong type, or of a value that is
            not honoured.
    """
    name, architecture = architecture_of(header)
    own = {k.removeprefix(f"{name}."): v for k, v in header.metadata.items() if _under(k, name)}
    problems = [*_unknown(own, architecture), *_fixed(own), *_missing(own, architecture)]
    problems += _of_wrong_type(own, architecture)
    if problems:
        raise _refusal(header, name, problems)
    stated = {k: _shortest(v) for k, v in {**architecture.defaults, **own}.items()}
    fields = {f: stated[key] for key, f in architecture.keys.items() if key in stated}
    fields |= {"model_type": architecture.model_type, "architectures": [architecture.class_name]}
    fields |= {**architecture.constants, **_token_ids(header), "torch_dtype": "float32"}
    fields |= _of_tensors(header, name)
    problems = _disagreements(header, fields)
    if not problems and name != "gpt2":
        problems = _complete(header, fields, stated, rope_factors)
    if problems:
        raise _refusal(header, name, problems)
    return fields


def _under(key: str, name: str) -> bool:
    return key.startswith(f"{name}.")


def _refusal(header: Header, name: str, problems: list[str]) -> ValueError:
    listed = "".join(f"\n  {problem}" for problem in problems)
    return ValueError(f"{header.file} describes a {name} model that is not known here:{listed}")


def _unknown(own: Mapping[str, Any], architecture: Architecture) -> list[str]:
    derived = _DERIVED if "rope.freq_base" in architecture.keys else ()
    known = [*architecture.keys, *_FIXED, *derived]
    problems = []
    for key in own:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" The nearest is {near[0]!r}." if near else ""
            problems.append(f"{key!r} is unknown.{hint}")
    return problems


def _fixed(own: Mapping[str, Any]) -> list[str]:
    return [
        f"{key!r} is {own[key]!r:.80}; only {only!r} is supported."
        for key, only in _FIXED.items()
        if own.get(key, only) != only
    ]


def _missing(own: Mapping[str, Any], architecture: Architecture) -> list[str]:
    needed = architecture.keys.keys() - architecture.defaults.keys() - set(architecture.optional)
    return [f"{key!r} is missing." for key in sorted(needed - own.keys())]


def _of_wrong_type(own: Mapping[str, Any], architecture: Architecture) -> list[str]:
    problems = []
    for key in architecture.keys.keys() & own.keys():
        kind = float if "epsilon" in key or "freq_base" in key else int
        value = own[key]
        if type(value) is not kind or not 0 < value < float("inf"):
            problems.append(f"{key!r} must be a positive {kind.__name__}, got {value!r:.80}.")
    return sorted(problems)


def _shortest(value: Any) -> Any:
    """A float32 as the shortest decimal that rounds to it: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _token_ids(header: Header) -> dict[str, int]:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    found = {f: header.metadata.get(f"tokenizer.ggml.{n}_token_id") for n, f in names.items()}
    return {field: value for field, value in found.items() if value is not None}


def _of_tensors(header: Header, name: str) -> dict[str, Any]:
    """The fields that only the list of tensors tells."""
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{header.file} has no tensor 'token_embd.weight'.")
    fields: dict[str, Any] = {
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "vocab_size": embedding.shape[0],
    }
    if name == "llama":
        fields["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        fields["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    return fields


def _disagreements(header: Header, fields: Mapping[str, Any]) -> list[str]:
    """Counts that are stated twice and differ."""
    blocks = {name.split(".")[1] for name in header.tensors if name.startswith("blk.")}
    layers = fields.get("num_hidden_layers", fields.get("n_layer"))
    problems = []
    if blocks != {str(layer) for layer in range(min(layers, len(blocks) + 1))}:
        problems.append(f"'block_count' is {layers}, and the tensors are of {len(blocks)} blocks.")
    vocab = fields["vocab_size"]
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    listed = len(tokens) if isinstance(tokens, list) else vocab
    stated = header.metadata.get(f"{header.metadata['general.architecture']}.vocab_size", vocab)
    if listed > vocab or stated != vocab:
        problems.append(
            f"the embedding has {vocab} rows, 'vocab_size' is {stated} and {listed} tokens are "
            "listed."
        )
    width = header.tensors["token_embd.weight"].shape[-1]
    if width != (size := fields.get("hidden_size", fields.get("n_embd"))):
        problems.append(f"'embedding_length' is {size}, and the embedding's rows have {width}.")
    return problems + [
        f"{field!r} is {fields[field]!r:.80}, of {vocab} tokens."
        for field in ("bos_token_id", "eos_token_id", "pad_token_id")
        if field in fields and not (type(fields[field]) is int and 0 <= fields[field] < vocab)
    ]


def _complete(
    header: Header,
    fields: dict[str, Any],
    stated: Mapping[str, Any],
    rope_factors: np.ndarray | None,
) -> list[str]:
    """Adds what follows from other fields; gives what contradicts them."""
    name, heads = header.metadata["general.architecture"], fields["num_attention_heads"]
    fields.setdefault("num_key_value_heads", heads)
    fields.setdefault("head_dim", fields["hidden_size"] // heads)
    if not fields["head_dim"] or fields["head_dim"] % 2:
        return [f"a head of {fields['head_dim']} features cannot be rotated by pairs."]
    query = header.tensors.get("blk.0.attn_q.weight")
    if query is None or query.shape[0] != heads * fields["head_dim"]:
        found = "is not there" if query is None else f"has {query.shape[0]} rows"
        return [f"{heads} heads of {fields['head_dim']} are stated; blk.0.attn_q.weight {found}."]
    problems = [
        f"{key!r} is {stated[key]!r:.80}; only the head's {fields['head_dim']} is supported."
        for key in ("rope.dimension_count", "attention.value_length")
        if stated.get(key, fields["head_dim"]) != fields["head_dim"]
    ]
    if name == "llama" and "sliding_window" in fields:
        fields |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        problems += [
            f"a {bias.partition('_')[0]} bias together with a sliding window is not supported."
            for bias in ("attention_bias", "mlp_bias")
            if fields.pop(bias)
        ]
    if name == "gemma3":
        fields |= _gemma3(fields)
    return problems + _scale_rope(fields, stated, rope_factors)


def _gemma3(fields: Mapping[str, Any]) -> dict[str, Any]:
    layers, heads = fields["num_hidden_layers"], fields["num_attention_heads"]
    kinds = ("sliding_attention", "full_attention")
    scalar = fields["hidden_size"] // heads if layers == _GEMMA3_27B_LAYERS else fields["head_dim"]
    return {
        "layer_types": [kinds[(layer + 1) % _GEMMA3_PERIOD == 0] for layer in range(layers)],
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


def _scale_rope(
    fields: dict[str, Any], stated: Mapping[str, Any], rope_factors: np.ndarray | None
) -> list[str]:
    kind = stated.get("rope.scaling.type", "linear" if "rope.scaling.factor" in stated else "none")
    if rope_factors is not None:
        if kind not in ("none", "llama3"):
            return [f"'rope.scaling.type' is {kind!r:.80} and there is a tensor rope_freqs.weight."]
        fields["rope_scaling"] = _llama3(fields, rope_factors)
        return [] if fields["rope_scaling"] else ["rope_freqs.weight is not Llama 3's scaling."]
    if kind == "linear" and isinstance(stated.get("rope.scaling.factor"), float):
        fields["rope_scaling"] = {"rope_type": "linear", "factor": stated["rope.scaling.factor"]}
        return []
    return [] if kind == "none" else [f"'rope.scaling.type' {kind!r:.80} is not supported."]


def _llama3(fields: Mapping[str, Any], factors: np.ndarray) -> dict[str, Any] | None:
    """Llama 3's ``rope_scaling``, if that is what makes these factors, else None.

    A rotation that turns fewer than ``low`` times over the ``old`` positions is slowed by the
    whole factor, one that turns more than ``high`` times not at all, and between the two the
    speeds are interpolated (Llama 3.1's reference code).
    """
    low, high, old = _LLAMA3
    factor = float(factors.max())
    if 2 * factors.size != fields["head_dim"] or not 1 <= factor < float("inf"):
        return None
    speeds = fields["rope_theta"] ** (-np.arange(factors.size) / factors.size)
    unslowed = np.clip((old * speeds / (2 * np.pi) - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - unslowed) / factor + unslowed)
    # 1e-4: a converter may compute the factors in float32, through a power of up to 500000.
    if not np.allclose(factors, expected, rtol=1e-4, atol=0.0):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": old,
    }
