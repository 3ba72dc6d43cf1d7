"""The task causal-lm: what comes next in this text?

logits (batch, length, vocabulary), of which a chunk exists at a time
loss = sum over the learned tokens of the whole batch of -log p(token) / their number
"""

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import ops
from lora_jax.io.tokenizers import load_tokenizer

from ..config import Config
from ..losses import cross_entropy, next_tokens
from ..order import numpy_order
from ..questions import clip, questions, scored
from ..text_rows import Encoded, encode, read_pool, read_pools
from ..tokens import Tokens, marked_text
from . import Answers, Complete, Examples, Model, Sets

HEADLINE = "perplexity"
CURVES = ("token_accuracy",)
make_order = numpy_order
SHOWN = 3


def load_sets(config: Config) -> Sets:
    """Reads and tokenises the data."""
    tokenizer = _load_tokenizer(config)
    seed = config.training.seed if config.data.packing else None
    learn, judge = read_pools(config.data, tokenizer)
    train = encode(tokenizer, learn, config.data, packing_seed=seed)
    return Sets(train, encode(tokenizer, judge, config.data), tokenizer)


def load_evaluation(config: Config, names: tuple[str, ...], data: str | None) -> Sets:
    """The evaluation rows of a finished run, or all rows from elsewhere."""
    del names
    tokenizer = _load_tokenizer(config)
    pool = (
        read_pool(data, config.data, tokenizer) if data else read_pools(config.data, tokenizer)[1]
    )
    return Sets(None, encode(tokenizer, pool, config.data), tokenizer)


def describe(sets: Sets, config: Config) -> list[str]:
    """The sizes of the data, and how many texts were cut or left out, if any were."""
    train, evaluation = sets.train, sets.evaluation
    tokens = sum(train.sizes)
    lines = [
        f"{len(train.examples)} examples to train on, {len(evaluation.examples)} to evaluate on",
        f"{tokens:,} training tokens, {train.learned:,} of them learned, in rows of up to "
        f"{train.lengths[-1]}",
    ]
    if train.packed:
        used = tokens / (len(train.rows) * train.lengths[-1])
        lines.append(f"packed into {len(train.rows)} rows, {used:.1%} full")
    both = (train, evaluation)
    cut, dropped = sum(part.truncated for part in both), sum(part.dropped for part in both)
    total = sum(len(part.examples) for part in both) + dropped
    if cut:
        lines.append(f"{cut} of {total} texts were cut to {config.data.max_length} tokens")
    if dropped:
        lines.append(f"{dropped} of {total} texts were left out: nothing of them is learned")
    if shared := sum(one.shared > 0 for part in both for one in part.examples):
        lines.append(
            f"in {shared} of {total} texts one token holds the end of a prompt and the start of "
            "its completion, and is not learned: end prompts or start completions with a space"
        )
    return lines


def fingerprint(encoded: Encoded) -> str:
    """A short hash of the tokens, of which are learned, and of the rows."""
    digest = hashlib.sha256(repr(encoded.rows if encoded.packed else None).encode())
    for one in encoded.examples:
        digest.update(len(one.ids).to_bytes(4, "little") + one.ids.tobytes())
        digest.update(one.learned.tobytes())
    return digest.hexdigest()[:16]


def apply(fn: Callable[..., Any], params: Any, batch: Any, **kwargs: Any) -> jax.Array:
    """Logits ``(batch, length, vocabulary)``, or hidden states ``(batch, length, width)``."""
    packed = {name: batch[name] for name in ("segment_ids", "positions") if name in batch}
    return fn(params, batch["input_ids"], batch["attention_mask"], **packed, **kwargs)


def loss(
    model: Model,
    params: Any,
    batch: Any,
    smoothing: float,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The sum over the learned tokens, whichever rows they are in, and their number."""

    def of_chunk(logits: jax.Array, targets: jax.Array, weights: jax.Array):
        losses = cross_entropy(logits, targets, smoothing)
        return (losses * weights).sum(), weights.sum()

    return _sums(model, params, batch, of_chunk, dropout_key)


def outputs(model: Model, params: Any, batch: Any) -> jax.Array:
    """For each row the sum of -log p, and how many tokens were the likeliest: ``(batch, 2)``."""

    def of_chunk(logits: jax.Array, targets: jax.Array, weights: jax.Array):
        losses = (cross_entropy(logits, targets) * weights).sum(axis=1)
        right = ((logits.argmax(axis=-1) == targets) * weights).sum(axis=1)
        return losses.sum(), jnp.stack([losses, right], axis=1)

    return _sums(model, params, batch, of_chunk)[1]


class _Rows(NamedTuple):
    """What is cut into chunks: ``(batch, length, ...)``, and places ``(1, length)``."""

    hidden: jax.Array
    targets: jax.Array
    weights: jax.Array
    places: jax.Array


def _sums(
    model: Model,
    params: Any,
    batch: Any,
    of_chunk: Callable[..., tuple[jax.Array, jax.Array]],
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The sums over all chunks of ``of_chunk(logits, targets, weights)``, a scalar and an array.

    Logits are float32 and their cotangents are rounded to the dtype of the arithmetic, as those
    of every other product are.
    """
    hidden = apply(model.hidden, params, batch, dropout_key=dropout_key)
    narrow = functools.partial(model.logits, dtype=hidden.dtype)
    logits = ops.with_gradient_of(model.logits, narrow)

    def fn(head: Any, rows: _Rows) -> tuple[jax.Array, jax.Array]:
        found = logits(_own_dropout(head, rows.places[0, 0]), rows.hidden)
        return of_chunk(found, rows.targets, rows.weights)

    places = jnp.arange(hidden.shape[1], dtype=jnp.int32)[None]
    rows = _Rows(hidden, *next_tokens(batch), places)
    chunk = max(1, model.chunk // len(hidden))
    return ops.sum_in_chunks(fn, model.head(params), rows, chunk=chunk)


def _own_dropout(head: Any, place: jax.Array) -> Any:
    """The weights of the head with LoRA dropout keys of the chunk that starts at ``place``."""

    def fold(leaf: jax.Array) -> jax.Array:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.fold_in(leaf, place) if is_key else leaf

    return jax.tree.map(fold, head)


def metrics(outputs: np.ndarray, encoded: Encoded) -> dict[str, float]:
    """Means over the learned tokens of all rows, however many each has.

    Returns:
        ``loss`` in nats a token, ``perplexity``, and ``token_accuracy``: the share of tokens
        that were the likeliest.
    """
    losses, right = np.asarray(outputs, np.float64).sum(axis=0) / encoded.learned
    with np.errstate(over="ignore"):
        perplexity = float(np.exp(losses))
    return {"loss": float(losses), "perplexity": perplexity, "token_accuracy": float(right)}


def write(sets: Sets, config: Config, complete: Complete, *, few: bool) -> tuple[str, ...]:
    """Completes the prompts of the evaluation rows, or a few of them for the report."""
    if not config.evaluation.generate:
        return ()
    asked = questions(sets.evaluation.examples)[: config.evaluation.limit]
    # What has no answer cannot be scored: a sample is enough.
    count = SHOWN if few or not asked[:1] or not asked[0].references else len(asked)
    return tuple(complete([question.prompt for question in asked[:count]]))


def scores(sets: Sets, texts: Sequence[str]) -> dict[str, float]:
    """BLEU and its kin against all completions of each prompt."""
    return scored(questions(sets.evaluation.examples)[: len(texts)], texts)


def example(sets: Sets, config: Config) -> dict[str, str]:
    """The first training example, with what is learned marked, and its mask."""
    del config
    one: Tokens = sets.train.examples[0]
    return {
        "text": marked_text(sets.tokenizer, one),
        "learned": "what stands between ⟦ and ⟧: "
        f"{int(one.learned.sum())} of {len(one.ids)} tokens",
        "input_ids": " ".join(map(str, one.ids.tolist())),
        "loss_mask": " ".join(map(str, one.learned.astype(int).tolist())),
    }


def examples(sets: Sets, before: Answers, after: Answers) -> Examples:
    """The first prompts with what was written; without any, the first texts with their loss."""
    if not after.texts:
        return Examples(("text", "loss before", "loss after"), _losses(sets, before, after))
    rows = []
    asked = questions(sets.evaluation.examples)
    for question, *texts in zip(asked, before.texts, after.texts, strict=False):
        prompt = sets.tokenizer.decode(list(question.prompt))
        reference = question.references[0] if question.references else ""
        rows.append((clip(prompt), clip(reference), *map(clip, texts)))
    return Examples(("prompt", "reference", "before", "after"), rows[:SHOWN])


def _losses(sets: Sets, before: Answers, after: Answers) -> list[tuple[str, ...]]:
    rows = []
    for row, one in enumerate(sets.evaluation.examples[:SHOWN]):
        each = (f"{said.outputs[row, 0] / one.learned.sum():.3f}" for said in (before, after))
        rows.append((clip(marked_text(sets.tokenizer, one)), *each))
    return rows


def _load_tokenizer(config: Config) -> Any:
    tokenizer = load_tokenizer(config.model.path)
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer of {config.model.path} cannot say where in a text a token stands, "
            "which tells prompts from completions: it has no tokenizer.json."
        )
    return tokenizer
