"""The published names of GPT-2's weights.

layers/{layer}/attention/qkv/kernel
transformer.h.{layer}.attn.c_attn.weight
"""

from lora_jax.io.names import NameTable, Row, expand
from lora_jax.models._rows import kernel_rows, norm_rows
from lora_jax.models.gpt2._config import Gpt2Config

TASKS = ("causal-lm",)


def name_table(config: Gpt2Config, task: str, *, scan_layers: bool) -> NameTable:
    """The published names of a model's weights; files may leave the ``transformer.`` out."""
    tied = {"lm_head.weight": "wte.weight"} if config.tie_word_embeddings else {}
    head = () if tied else (Row("lm_head/kernel", "lm_head.weight", "linear"),)
    return NameTable(
        expand((*_ROWS, *head), config.n_layer, stacked=scan_layers),
        prefix="transformer",
        unused=frozenset({*_OTHER_HEADS, *_masks(config.n_layer)}),
        tied=tied,
        heads=("lm_head",),
        drawn=("lm_head",),
    )


def architecture(config: Gpt2Config, task: str) -> str:
    """The name of the published class."""
    return "GPT2LMHeadModel"


def _conv1d_rows(path: str, module: str) -> tuple[Row, ...]:
    return kernel_rows(path, module, "conv1d")


_ROWS = (
    Row("wte/embedding", "transformer.wte.weight", "embedding"),
    Row("wpe/embedding", "transformer.wpe.weight", "embedding"),
    *norm_rows("layers/{layer}/attention_norm", "transformer.h.{layer}.ln_1"),
    *_conv1d_rows("layers/{layer}/attention/qkv", "transformer.h.{layer}.attn.c_attn"),
    *_conv1d_rows("layers/{layer}/attention/out", "transformer.h.{layer}.attn.c_proj"),
    *norm_rows("layers/{layer}/mlp_norm", "transformer.h.{layer}.ln_2"),
    *_conv1d_rows("layers/{layer}/mlp/up", "transformer.h.{layer}.mlp.c_fc"),
    *_conv1d_rows("layers/{layer}/mlp/down", "transformer.h.{layer}.mlp.c_proj"),
    *norm_rows("norm", "transformer.ln_f"),
)

_OTHER_HEADS = (
    "multiple_choice_head.summary.weight",
    "multiple_choice_head.summary.bias",
    "score.weight",
)


def _masks(layers: int) -> list[str]:
    """The causal masks that old files hold beside the weights."""
    return [f"h.{index}.attn.{name}" for index in range(layers) for name in ("bias", "masked_bias")]
