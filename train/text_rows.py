"""Texts as rows of tokens: read, split into learned and held out, tokenised, cut and packed.

source -> pool of records -> Tokens, cut to max_length -> rows of one or several examples
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .batches import Batch, pad, padded_lengths
from .config import DataSection
from .files import read_text
from .packing import pack
from .records import is_document, read_records
from .tokens import Tokens, tokenise, windows

Pool = Sequence[Any]
"""What a source holds: records still to be tokenised, or windows of a long text, `Tokens`."""


class Encoded(NamedTuple):
    """Texts as tokens, in rows.

    Attributes:
        examples: The texts as tokens, cut to the maximum length.
        rows: The examples of each row: one, or several where they are packed.
        pad: The id that fills a row up. Where the tokenizer has none it is eos: the mask
            decides what is attended to and learned, and never the id.
        lengths: The lengths that batches may be padded to, rising.
        packed: Whether rows hold several examples.
        truncated: How many texts were cut to the maximum length.
        dropped: How many were left out, cut or not, since nothing of them is learned.
    """

    examples: list[Tokens]
    rows: list[list[int]]
    pad: int
    lengths: tuple[int, ...]
    packed: bool
    truncated: int
    dropped: int

    @property
    def ids(self) -> list[np.ndarray]:
        """The tokens of each example."""
        return [one.ids for one in self.examples]

    @property
    def sizes(self) -> list[int]:
        """Tokens of each row, padding not counted."""
        return [self.size(row) for row in range(len(self.rows))]

    def size(self, row: int) -> int:
        """Tokens of one row, padding not counted."""
        return sum(len(self.examples[one].ids) for one in self.rows[row])

    @property
    def learned(self) -> int:
        """Tokens that are learned, in all."""
        return sum(int(one.learned.sum()) for one in self.examples)

    def collate(self, rows: Sequence[int] | np.ndarray, length: int) -> Batch:
        """`input_ids`, `attention_mask`, `loss_mask`; packed, `segment_ids` and `positions`."""
        held = [[self.examples[one] for one in self.rows[row]] for row in rows]
        sizes = [[len(one.ids) for one in row] for row in held]
        batch = {
            "input_ids": pad(
                [np.concatenate([one.ids for one in row]) for row in held], length, self.pad
            ),
            "attention_mask": pad([np.ones(sum(row)) for row in sizes], length, 0),
            "loss_mask": pad(
                [np.concatenate([one.learned for one in row]) for row in held], length, 0
            ),
        }
        if self.packed:
            segments = [np.repeat(np.arange(1, len(row) + 1), row) for row in sizes]
            positions = [np.concatenate([np.arange(size) for size in row]) for row in sizes]
            batch["segment_ids"] = pad(segments, length, 0)
            batch["positions"] = pad(positions, length, 0)
        return batch


def read_pools(section: DataSection, tokenizer: Any) -> tuple[Pool, Pool]:
    """What to learn from, and what to be evaluated on.

    Raises:
        ValueError: A source cannot be read, or nothing is left to learn from.
    """
    pool = read_pool(section.train, section, tokenizer)
    order = list(range(len(pool)))
    random.Random(section.seed).shuffle(order)
    rest = [pool[row] for row in order[section.holdout :][: section.limit]]
    if not rest:
        raise ValueError(
            f"{section.train} has {len(order)} rows; `data.holdout` of {section.holdout} leaves "
            "none to train on."
        )
    if section.validation:
        return rest, read_pool(section.validation, section, tokenizer)[: section.validation_limit]
    return rest, [pool[row] for row in order[: section.holdout]]


def read_pool(source: str, section: DataSection, tokenizer: Any) -> Pool:
    """All of one source.

    Raises:
        ValueError: It cannot be read.
    """
    if is_document(source, section):
        return windows(tokenizer, read_text(Path(source)), section.max_length)
    return read_records(source, section, has_template=bool(tokenizer.chat_template))


def encode(
    tokenizer: Any, pool: Pool, section: DataSection, *, packing_seed: int | None = None
) -> Encoded:
    """Tokenises examples, cuts them to ``max_length`` tokens, and perhaps packs them.

    Args:
        tokenizer: The model's tokenizer.
        pool: The examples.
        section: How long they may be, and what is learned.
        packing_seed: Packs rows, with this seed; None gives each example a row.

    Raises:
        ValueError: Nothing that could be learned is left.
    """
    length = section.max_length
    whole = pool if isinstance(pool[0], Tokens) else tokenise(tokenizer, pool, section)
    kept = [one for one in (one.cut(length) for one in whole) if one.learned.any()]
    if not kept:
        raise ValueError(
            f"Of {len(whole)} texts, cut to {length} tokens, nothing is left to learn: the "
            "prompts alone are longer. Raise data.max_length, or set data.loss_on=all."
        )
    sizes = [len(one.ids) for one in kept]
    packed = packing_seed is not None
    rows = pack(sizes, length, packing_seed) if packed else [[one] for one in range(len(kept))]
    longest = max(sum(sizes[one] for one in row) for row in rows)
    return Encoded(
        examples=kept,
        rows=rows,
        pad=tokenizer.pad_token_id,
        lengths=padded_lengths(longest, length),
        packed=packed,
        truncated=sum(len(one.ids) > length for one in whole),
        dropped=len(whole) - len(kept),
    )
