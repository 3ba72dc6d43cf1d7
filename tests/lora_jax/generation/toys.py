"""Decoders whose answers can be worked out by hand, with the interface of the real ones.

The next token's logits are a row of a table, chosen by the last token, or by the last two: then
the one before comes out of the cache.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models._cache import reserve, store

NEVER = -30.0  # a logit of a token that does not come


@dataclasses.dataclass(frozen=True)
class Config:
    """What generation reads of a decoder's config."""

    vocab_size: int
    max_length: int = 64
    num_hidden_layers: int = 1
    num_key_value_heads: int = 1
    head_dim: int = 1


@dataclasses.dataclass(frozen=True)
class Table:
    """Logits of what follows: ``kernel[last]``, or with ``pairs`` ``kernel[before * V + last]``.

    Looked up as a product with one-hot rows, so that the kernel can be adapted.
    """

    config: Config
    pairs: bool = False
    dtype: type = jnp.float32

    def apply(self, variables, input_ids, attention_mask=None, *, positions=None, cache=None):
        mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
        kept = mask.astype(bool)
        before = self._before(input_ids, kept, cache)
        if cache is not None:
            cache = reserve(cache, kept, jnp.zeros_like(input_ids))
            stored = input_ids.astype(jnp.float32)[:, :, None, None]
            cache, _, _ = store(cache, 0, stored, stored)
        vocab = self.config.vocab_size
        index = before * vocab + input_ids if self.pairs else input_ids
        kernel = variables["params"]["kernel"]
        logits = jax.nn.one_hot(index, vocab**2 if self.pairs else vocab) @ kernel
        return logits if cache is None else (logits, cache)

    def _before(self, ids, kept, cache):
        """The kept token before each, 0 where there is none."""
        if cache is not None:
            ids = jnp.concatenate([cache.key[0, :, :, 0, 0].astype(ids.dtype), ids], axis=1)
            kept = jnp.concatenate([cache.valid, kept], axis=1)
        columns = jnp.where(kept, jnp.arange(ids.shape[1])[None, :], -1)
        last = jnp.pad(jax.lax.cummax(columns, axis=1), ((0, 0), (1, 0)), constant_values=-1)
        found = last[:, :-1]
        before = jnp.take_along_axis(ids, jnp.maximum(found, 0), axis=1)
        before = jnp.where(found >= 0, before, 0)
        return before if cache is None else before[:, cache.valid.shape[1] :]


def decoder(table, *, pairs=False, **changes):
    """A model and its weights, of logits ``(V or V * V, V)``."""
    table = jnp.asarray(table, jnp.float32)
    module = Table(Config(vocab_size=table.shape[1], **changes), pairs)
    return SimpleNamespace(module=module, config=module.config), {"kernel": table}


def chances(rows):
    """Logits of a table of probabilities; what is not named never comes.

    >>> chances({0: {1: 0.6, 2: 0.4}}).shape
    (3, 3)
    """
    size = 1 + max(max(rows), *(token for row in rows.values() for token in row))
    table = np.full((size, size), NEVER)
    for last, row in rows.items():
        for token, chance in row.items():
            table[last, token] = np.log(chance)
    return table


def random_decoder(vocab=13, seed=0, scale=2.0, **changes):
    """A decoder of pairs with drawn logits, so that what comes depends on order and padding."""
    table = np.random.default_rng(seed).normal(0, scale, (vocab**2, vocab))
    return decoder(table, pairs=True, **changes)


def tokenizer(*words, eos="<end>", **special):
    """A tokenizer whose tokens are words; the last is the eos."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate((*words, eos))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, **special)
