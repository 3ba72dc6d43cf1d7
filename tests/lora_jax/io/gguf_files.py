"""Tiny GGUF files, written by the gguf package as a converter writes them."""

from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 64, 4, 2, 16, 96, 2
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ hello", "1 2")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte (Radford et al. 2019's code)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


TOKENS = [*SPECIAL, *byte_letters(), *(merge.replace(" ", "") for merge in MERGES)]
VOCAB = len(TOKENS)


def join_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Published q or k rows as llama.cpp's converter stores them."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def llama_weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of a tiny Llama by their published names, output head tied."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (HIDDEN,),
            f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
            f"{prefix}.mlp.gate_proj.weight": (FFN, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": (FFN, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": (HIDDEN, FFN),
        }
    return {name: 0.1 * rng.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def own_name(published: str, architecture: str = "llama") -> str:
    """``blk.0.attn_q.weight`` for ``model.layers.0.self_attn.q_proj.weight``, by the package."""
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    module, _, end = published.rpartition(".")
    name = gguf.get_tensor_name_map(kind, LAYERS).get_name(module)
    assert name is not None, published
    return f"{name}.{end}"


def llama_tensors(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same weights by GGUF's names and in its layout."""
    stored = {own_name(name): weight for name, weight in weights.items()}
    for name in stored:
        if "attn_q" in name or "attn_k" in name:
            stored[name] = join_pairs(stored[name], HEADS if "attn_q" in name else KV_HEADS)
    return stored


LLAMA_KEYS = {
    "block_count": LAYERS,
    "context_length": 128,
    "embedding_length": HIDDEN,
    "feed_forward_length": FFN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
    "rope.dimension_count": HEAD_DIM,
    "vocab_size": VOCAB,
}
TOKENIZER_KEYS = {
    "model": "gpt2",
    "pre": "smollm",
    "tokens": TOKENS,
    "token_type": [3] * len(SPECIAL) + [1] * (VOCAB - len(SPECIAL)),
    "merges": list(MERGES),
    "bos_token_id": 1,
    "eos_token_id": 2,
    "unknown_token_id": 0,
    "padding_token_id": 2,
    "add_bos_token": False,
    "add_space_prefix": False,
}


def changed(keys: dict, **changes: object) -> dict:
    """The keys with some of them other (``rope__freq_base=1.0``) or gone (None)."""
    keys = {**keys, **{name.replace("__", "."): value for name, value in changes.items()}}
    return {name: value for name, value in keys.items() if value is not None}


def write(
    file: Path,
    tensors: dict[str, np.ndarray],
    keys: dict,
    *,
    architecture: str = "llama",
    tokenizer: dict = TOKENIZER_KEYS,
    other: dict | None = None,
    encoding: str = "F32",
) -> Path:
    """Writes a file; matrices have the encoding, vectors are float32."""
    writer = gguf.GGUFWriter(file, architecture)
    for prefix, group in ((f"{architecture}.", keys), ("tokenizer.ggml.", tokenizer)):
        for name, value in group.items():
            _add(writer, prefix + name, value)
    for name, value in {"tokenizer.chat_template": CHAT, **(other or {})}.items():
        _add(writer, name, value)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[encoding if tensor.ndim > 1 else "F32"]
        writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def llama(file: Path, *, encoding: str = "F32", **changes: object) -> Path:
    """A whole tiny model with its tokenizer; ``changes`` are of the architecture's keys."""
    keys = changed(LLAMA_KEYS, **changes)
    return write(file, llama_tensors(llama_weights()), keys, encoding=encoding)


def _add(writer: "gguf.GGUFWriter", name: str, value: object) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    add[type(value)](name, value)
