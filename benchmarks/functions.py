"""Functions to adapt: models of transformers 4.57, Haiku and Equinox, and our own.

Each is built from scratch at a width of 128, wide enough that rank 4 costs little beside it.
They import their libraries when they are built; tests/compat/requirements.txt lists them.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

WIDTH, HEADS, LAYERS, VOCABULARY = 128, 4, 2, 64
BATCH, LENGTH = 8, 16


# The share of the flops of a gradient through `merge` that may be left (law 6 of the tests).
# A rematerialised layer computes its forward pass twice on both sides: 6 of 8 in place of 4 of 6.
LOW_RANK = 0.72
LOW_RANK_REMAT = (6 * LOW_RANK + 2) / 8


class Function(NamedTuple):
    """A function of parameters, and one way to call it.

    Attributes:
        fn: The function as its library gives it.
        params: Its parameters.
        call: Calls ``fn``, or ``adapt(fn)``, on parameters: ``call(fn, params)``.
        targets: Patterns of its matrices; together they match ``count`` weights.
        count: How many.
        limit: The share of flops that may be left.
    """

    fn: Callable[..., Any]
    params: Any
    call: Callable[[Callable[..., Any], Any], Any]
    targets: tuple[str, ...]
    count: int
    limit: float = LOW_RANK


def tokens(seed: int = 0, length: int = LENGTH) -> jax.Array:
    """Random token ids, ``(batch, length)``."""
    return jax.random.randint(jax.random.key(seed), (BATCH, length), 2, VOCABULARY)


def gpt2() -> Function:
    """GPT-2 as transformers has it; its kernels are (out, in) and transposed in the layer."""
    from transformers import FlaxGPT2LMHeadModel, GPT2Config

    config = GPT2Config(
        n_embd=WIDTH, n_head=HEADS, n_layer=LAYERS, n_positions=32, vocab_size=VOCABULARY
    )
    model = FlaxGPT2LMHeadModel(config, input_shape=(1, LENGTH))
    targets = ("attn/(c_attn|c_proj)", "mlp/(c_fc|c_proj)")
    return _transformers(model, targets, 4 * LAYERS, input_ids=tokens())


def roberta(**options: Any) -> Function:
    """RoBERTa with a classifier, as transformers has it."""
    from transformers import FlaxRobertaForSequenceClassification, RobertaConfig

    config = RobertaConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        intermediate_size=4 * WIDTH,
        vocab_size=VOCABULARY,
        max_position_embeddings=40,
        type_vocab_size=1,
    )
    model = FlaxRobertaForSequenceClassification(config, input_shape=(1, LENGTH), **options)
    targets = ("(query|key|value)", "output/dense", "intermediate/dense")
    mask = jnp.ones((BATCH, LENGTH), jnp.int32).at[:, LENGTH // 2 :].set(0)
    return _transformers(model, targets, 6 * LAYERS, input_ids=tokens(), attention_mask=mask)


def roberta_remat() -> Function:
    """The same with every layer rematerialised."""
    return roberta(gradient_checkpointing=True)._replace(limit=LOW_RANK_REMAT)


def llama() -> Function:
    """LLaMA with grouped queries, as transformers has it."""
    from transformers import FlaxLlamaForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        num_hidden_layers=LAYERS,
        intermediate_size=2 * WIDTH,
        vocab_size=VOCABULARY,
        max_position_embeddings=2 * WIDTH // HEADS,  # its rotary table is wrong below this
    )
    model = FlaxLlamaForCausalLM(config, input_shape=(1, LENGTH))
    targets = ("(q|k|v|o)_proj", "(gate|up|down)_proj")
    return _transformers(model, targets, 7 * LAYERS, input_ids=tokens())


def bart() -> Function:
    """BART, encoder and decoder, as transformers has it."""
    from transformers import BartConfig, FlaxBartForConditionalGeneration

    sides = ("encoder", "decoder")
    config = BartConfig(
        d_model=WIDTH,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        **{f"{side}_layers": LAYERS for side in sides},
        **{f"{side}_attention_heads": HEADS for side in sides},
        **{f"{side}_ffn_dim": 2 * WIDTH for side in sides},
    )
    model = FlaxBartForConditionalGeneration(config, input_shape=(1, LENGTH))
    targets = ("(q|k|v|out)_proj", "fc1", "fc2")
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(1)}
    return _transformers(model, targets, (6 + 10) * LAYERS, **inputs)


def vit() -> Function:
    """ViT, as transformers has it; the convolution that embeds patches is adapted too."""
    from transformers import FlaxViTForImageClassification, ViTConfig

    config = ViTConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_hidden_layers=LAYERS,
        intermediate_size=4 * WIDTH,
        image_size=32,
        patch_size=8,
    )
    model = FlaxViTForImageClassification(config)
    targets = (
        "(query|key|value)",
        "output/dense",
        "intermediate/dense",
        "patch_embeddings/projection",
    )
    pixels = jax.random.normal(jax.random.key(0), (BATCH, 3, 32, 32))
    return _transformers(model, targets, 6 * LAYERS + 1, pixel_values=pixels)


def haiku_transformer() -> Function:
    """A Haiku transformer: attention, MLP and norms, on embedded tokens."""
    import haiku

    def forward(ids: jax.Array) -> jax.Array:
        x = haiku.Embed(VOCABULARY, WIDTH)(ids)
        for _ in range(LAYERS):
            x = _haiku_block(x)
        return haiku.Linear(VOCABULARY, name="head")(x)

    transformed = haiku.transform(forward)
    params = transformed.init(jax.random.key(0), tokens())
    return Function(
        fn=transformed.apply,
        params=params,
        call=lambda fn, params: fn(params, jax.random.key(1), tokens()),
        targets=("(query|key|value|linear|mlp.*|multi_head_attention.*)/w",),
        count=6 * LAYERS,
    )


def haiku_layer_stack() -> Function:
    """The same block, its layers stacked and scanned by Haiku."""
    import haiku

    def forward(x: jax.Array) -> jax.Array:
        return haiku.experimental.layer_stack(LAYERS)(_haiku_block)(x)

    transformed = haiku.transform(forward)
    x = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))
    return Function(
        fn=transformed.apply,
        params=transformed.init(jax.random.key(0), x),
        call=lambda fn, params: fn(params, jax.random.key(1), x),
        targets=("w",),
        count=6,
    )


def equinox_mlp() -> Function:
    """An Equinox MLP over a batch by vmap; its weights are (out, in)."""
    import equinox

    model = equinox.nn.MLP(WIDTH, WIDTH, 2 * WIDTH, depth=2, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (BATCH * LENGTH, WIDTH))
    return _equinox(model, lambda model: jax.vmap(model)(x), ("layers/[0-2]/weight",), 3)


def equinox_attention() -> Function:
    """Equinox attention over a batch by vmap."""
    import equinox

    model = equinox.nn.MultiheadAttention(HEADS, WIDTH, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, WIDTH))
    run = lambda model: jax.vmap(lambda row: model(row, row, row))(x)  # noqa: E731
    return _equinox(model, run, ("(query|key|value|output)_proj/weight",), 4)


def bert(model_type: str = "bert", **options: Any) -> Function:
    """BERT or RoBERTa of `lora_jax.models`, with a classifier."""
    from lora_jax.models import Bert, BertConfig

    config = BertConfig(
        model_type=model_type,
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=40,
    )
    model = Bert(config, **options)
    pooler = 1 if model_type == "bert" else 0
    return Function(
        fn=model.apply,
        params=model.init(jax.random.key(0), tokens()),
        call=lambda fn, params: fn(params, tokens()),
        targets=("all-linear",),
        count=pooler + (6 if options.get("scan_layers") else 6 * LAYERS),
        limit=LOW_RANK_REMAT if options.get("remat") else LOW_RANK,
    )


def decoder(fields: dict[str, Any], each: int, **options: Any) -> Function:
    """A decoder of `lora_jax.models` by its ``config.json``, with ``each`` matrices a layer."""
    from lora_jax.models._families import family_of

    family = family_of(fields)
    chosen = {"scan_layers": False, "remat": False} | options
    model = family.make_module(
        family.read_config(fields),
        "causal-lm",
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        **chosen,
    )
    return Function(
        fn=model.apply,
        params=model.init(jax.random.key(0), tokens()),
        call=lambda fn, params: fn(params, tokens()),
        targets=("all-linear",),
        count=each if chosen["scan_layers"] else each * LAYERS,
        limit=LOW_RANK_REMAT if chosen["remat"] else LOW_RANK,
    )


LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "max_position_embeddings": 40,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 40,
}

OUR_OWN: dict[str, Callable[[], Function]] = {
    "lora_jax.models.Bert": bert,
    "lora_jax.models.Bert, RoBERTa": functools.partial(bert, "roberta"),
    "lora_jax.models.Bert, scanned": functools.partial(bert, scan_layers=True),
    "lora_jax.models.Bert, remat": functools.partial(bert, remat=True),
    "lora_jax.models.Bert, scanned, remat": functools.partial(bert, scan_layers=True, remat=True),
    "lora_jax.models.Llama": functools.partial(decoder, LLAMA, 7),
    "lora_jax.models.Llama, scanned, remat": functools.partial(
        decoder, LLAMA, 7, scan_layers=True, remat=True
    ),
    "lora_jax.models.Gpt2": functools.partial(decoder, GPT2, 4),
    "lora_jax.models.Gpt2, scanned": functools.partial(decoder, GPT2, 4, scan_layers=True),
}
THEIRS: dict[str, Callable[[], Function]] = {
    "transformers FlaxGPT2LMHeadModel": gpt2,
    "transformers FlaxRobertaForSequenceClassification": roberta,
    "transformers FlaxRobertaForSequenceClassification, remat": roberta_remat,
    "transformers FlaxLlamaForCausalLM": llama,
    "transformers FlaxBartForConditionalGeneration": bart,
    "transformers FlaxViTForImageClassification": vit,
    "haiku.transform of a transformer": haiku_transformer,
    "haiku.experimental.layer_stack of its block": haiku_layer_stack,
    "equinox.nn.MLP": equinox_mlp,
    "equinox.nn.MultiheadAttention": equinox_attention,
}


def _transformers(model: Any, targets: tuple[str, ...], count: int, **inputs: Any) -> Function:
    return Function(
        fn=model.__call__,
        params=model.params,
        call=lambda fn, params: fn(**inputs, params=params),
        targets=targets,
        count=count,
    )


def _haiku_block(x: jax.Array) -> jax.Array:
    import haiku

    normalise = lambda x: haiku.LayerNorm(-1, True, True)(x)  # noqa: E731
    init = haiku.initializers.VarianceScaling()
    attention = haiku.MultiHeadAttention(HEADS, WIDTH // HEADS, w_init=init)
    y = normalise(x)
    x = x + attention(y, y, y)
    return x + haiku.nets.MLP((4 * WIDTH, WIDTH), activation=jax.nn.gelu)(normalise(x))


def _equinox(
    model: Any, run: Callable[[Any], Any], targets: tuple[str, ...], count: int
) -> Function:
    import equinox

    params, static = equinox.partition(model, equinox.is_array)
    return Function(
        fn=lambda params: run(equinox.combine(params, static)),
        params=params,
        call=lambda fn, params: fn(params),
        targets=targets,
        count=count,
    )
