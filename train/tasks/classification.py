"""The task sequence-classification: which class is this text, or this pair of texts, of?

logits (batch, classes)      loss = mean over the batch of -log p(label)
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.io.tokenizers import load_tokenizer

from ..batches import Batch, pad, padded_lengths
from ..config import Config
from ..data import Examples, load_data, number_labels, read_table
from ..losses import cross_entropy
from ..metrics import classification_metrics, probabilities
from ..order import grain_order
from . import Answers, Complete, Examples as Table, Model, Sets

HEADLINE = "accuracy"
CURVES = ("accuracy", "f1", "matthews")
make_order = grain_order
SHOWN = 8


class Encoded(NamedTuple):
    """Labelled texts as tokens.

    Attributes:
        examples: The texts.
        names: The names of the classes.
        ids: Token ids of each example, int32, unpadded.
        types: Token types of each example, or None where the tokenizer has none.
        labels: ``(examples,)`` int32.
        pad: The id that fills a row up.
        lengths: The lengths that batches may be padded to, rising.
        truncated: How many texts were cut to the maximum length.
    """

    examples: Examples
    names: tuple[str, ...]
    ids: list[np.ndarray]
    types: list[np.ndarray] | None
    labels: np.ndarray
    pad: int
    lengths: tuple[int, ...]
    truncated: int

    @property
    def sizes(self) -> list[int]:
        """Tokens of each example, padding not counted."""
        return [len(row) for row in self.ids]

    def size(self, row: int) -> int:
        """Tokens of one example, padding not counted."""
        return len(self.ids[row])

    def collate(self, rows: Sequence[int] | np.ndarray, length: int) -> Batch:
        """`input_ids`, `attention_mask`, `labels`, and perhaps `token_type_ids`."""
        ids = [self.ids[row] for row in rows]
        batch = {
            "input_ids": pad(ids, length, self.pad),
            "attention_mask": pad([np.ones(len(row)) for row in ids], length, 0),
            "labels": self.labels[np.asarray(rows)],
        }
        if self.types:
            batch["token_type_ids"] = pad([self.types[row] for row in rows], length, 0)
        return batch


def load_sets(config: Config) -> Sets:
    """Reads and tokenises the data."""
    data = load_data(config.data, config.model.num_labels)
    tokenizer = load_tokenizer(config.model.path)
    train, evaluation = (
        encode(tokenizer, examples, data.names, config.data.max_length)
        for examples in (data.train, data.evaluation)
    )
    return Sets(train, evaluation, tokenizer, data.names)


def load_evaluation(config: Config, names: tuple[str, ...], data: str | None) -> Sets:
    """The evaluation rows of a finished run, or labelled rows from elsewhere."""
    if data is None:
        examples = load_data(config.data, config.model.num_labels).evaluation
    else:
        examples = number_labels(read_table(data, config.data), names)
    tokenizer = load_tokenizer(config.model.path)
    evaluation = encode(tokenizer, examples, names, config.data.max_length)
    return Sets(None, evaluation, tokenizer, names)


def encode(tokenizer: Any, examples: Examples, names: Sequence[str], max_length: int) -> Encoded:
    """Tokenises examples, cut to ``max_length`` tokens, special tokens included."""
    both = (examples.texts,) if examples.pairs is None else (examples.texts, examples.pairs)
    whole = tokenizer(*both, verbose=False)
    cut = tokenizer(*both, truncation=True, max_length=max_length, verbose=False)
    ids = [np.asarray(row, np.int32) for row in cut["input_ids"]]
    types = cut.get("token_type_ids")
    return Encoded(
        examples=examples,
        names=tuple(names),
        ids=ids,
        types=types and [np.asarray(row, np.int32) for row in types],
        labels=np.asarray(examples.labels, np.int32),
        pad=tokenizer.pad_token_id,
        lengths=padded_lengths(max(map(len, ids)), max_length),
        truncated=sum(len(row) > max_length for row in whole["input_ids"]),
    )


def describe(sets: Sets, config: Config) -> list[str]:
    """The sizes of the data, and how many texts were cut if any were."""
    train, evaluation = sets.train, sets.evaluation
    lines = [
        f"{len(train.ids)} rows to train on, {len(evaluation.ids)} to evaluate on, "
        f"{len(train.names)} classes ({', '.join(train.names[:10])})",
        f"{sum(train.sizes):,} training tokens, the longest batches padded to {train.lengths[-1]}",
    ]
    cut, total = train.truncated + evaluation.truncated, len(train.ids) + len(evaluation.ids)
    if cut:
        lines.append(f"{cut} of {total} texts were cut to {config.data.max_length} tokens")
    return lines


def fingerprint(encoded: Encoded) -> str:
    """A short hash of the tokens and labels."""
    digest = hashlib.sha256(encoded.labels.tobytes())
    for ids in encoded.ids:
        digest.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    return digest.hexdigest()[:16]


def apply(fn: Callable[..., Any], params: Any, batch: Any, **kwargs: Any) -> jax.Array:
    """Logits ``(batch, classes)``."""
    arrays = batch["input_ids"], batch["attention_mask"], batch.get("token_type_ids")
    return fn(params, *arrays, **kwargs)


def loss(
    model: Model,
    params: Any,
    batch: Any,
    smoothing: float,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The sum of the batch's cross-entropies, and the number of its rows."""
    logits = apply(model.apply, params, batch, dropout_key=dropout_key)
    losses = cross_entropy(logits, batch["labels"], smoothing)
    return losses.sum(), jnp.float32(losses.size)


def outputs(model: Model, params: Any, batch: Any) -> jax.Array:
    """The logits themselves."""
    return apply(model.apply, params, batch).astype(jnp.float32)


def metrics(outputs: np.ndarray, encoded: Encoded) -> dict[str, float]:
    """Accuracy, F1, Matthews correlation and loss."""
    return classification_metrics(outputs, encoded.labels)


def write(sets: Sets, config: Config, complete: Complete, *, few: bool) -> tuple[str, ...]:
    """A classifier writes nothing."""
    del sets, config, complete, few
    return ()


def scores(sets: Sets, texts: Sequence[str]) -> dict[str, float]:
    """What is not written is not scored."""
    del sets, texts
    return {}


def example(sets: Sets, config: Config) -> dict[str, str]:
    """The first training example as the model gets it, beside its label.

    The loss is on the label alone: the mask says which tokens the model attends to.
    """
    del config
    encoded: Encoded = sets.train
    ids = encoded.ids[0].tolist()
    rows = {"text": encoded.examples.texts[0]}
    if encoded.examples.pairs:
        rows["pair"] = encoded.examples.pairs[0]
    rows |= {
        "tokens": " ".join(sets.tokenizer.convert_ids_to_tokens(ids)),
        "input_ids": " ".join(map(str, ids)),
        "attention_mask": "1 " * len(ids) + "then 0 up to the batch's length",
    }
    if encoded.types:
        rows["token_type_ids"] = " ".join(map(str, encoded.types[0].tolist()))
    label = encoded.examples.labels[0]
    return rows | {"label": f"{label} ({encoded.names[label]})"}


def examples(sets: Sets, before: Answers, after: Answers) -> Table:
    """The first evaluation texts, with the class that they were given."""
    texts, pairs, labels = sets.evaluation.examples
    names, rows = sets.evaluation.names, []
    for row in range(min(SHOWN, len(texts))):
        pair = f" ‖ {pairs[row]}" if pairs else ""
        guesses = (_guess(said.outputs[row], labels[row], names) for said in (before, after))
        rows.append((texts[row] + pair, names[labels[row]], *guesses))
    return Table(("text", "label", "before", "after"), rows)


def _guess(logits: np.ndarray, label: int, names: Sequence[str]) -> str:
    shares = probabilities(logits[None])[0]
    guess = int(shares.argmax())
    return f"{'✓' if guess == label else '✗'} {names[guess]} ({shares[guess]:.0%})"
