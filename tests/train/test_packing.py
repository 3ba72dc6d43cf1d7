"""Packing: every example once, rows full, and packed examples blind to each other."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from lora_jax import models
from train import losses, packing, text_rows
from train.batches import collate
from train.config import DataSection
from train.model import adapt
from train.records import Pair
from train.tasks import causal_lm

SECTION = DataSection(train="rows.jsonl", holdout=1, max_length=24)
PAIRS = [
    Pair("name : Aroma||", " Aroma is in the north."),
    Pair("area : south | name : Cotto||", " Cotto."),
    Pair("Hi", " there"),
    Pair("Bye now||", " Zizzi is in the riverside."),
    Pair("name : Browns||", " Browns is in the south."),
]


@hypothesis.given(st.lists(st.integers(1, 16), min_size=1, max_size=60), st.integers(0, 3))
def test_every_example_has_a_place_and_no_two_rows_would_fit_in_one(lengths, seed):
    rows = packing.pack(lengths, 16, seed)
    assert sorted(one for row in rows for one in row) == list(range(len(lengths)))
    full = sorted(sum(lengths[one] for one in row) for row in rows)
    assert full[-1] <= 16
    assert len(full) < 2 or full[0] + full[1] > 16
    assert rows == packing.pack(lengths, 16, seed)


def test_the_seed_mixes_examples_of_equal_length():
    assert packing.pack([4] * 20, 8, 0) != packing.pack([4] * 20, 8, 1)


def test_rows_say_where_each_example_starts(tokenizer):
    encoded = text_rows.encode(tokenizer, PAIRS[2:3] * 3, SECTION, packing_seed=0)
    batch = collate(encoded, [0], [12])
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0, 0]]
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 0]]
    assert batch["loss_mask"].tolist() == [[0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 9 + [0] * 3]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_packed_loss_and_gradient_are_those_of_the_examples_alone(
    tokenizer, decoder_directory, smoothing
):
    model = models.from_pretrained(decoder_directory, task="causal-lm")
    alone = text_rows.encode(tokenizer, PAIRS, SECTION)
    packed = text_rows.encode(tokenizer, PAIRS, SECTION, packing_seed=0)
    assert len(packed.rows) < len(alone.rows)

    def loss(params, encoded):
        batch = collate(encoded, range(len(encoded.rows)), encoded.lengths[-1:])
        return losses.mean(*causal_lm.loss(adapt(model), params, batch, smoothing))

    one, other = (
        jax.jit(jax.value_and_grad(lambda params, encoded=encoded: loss(params, encoded)))(
            model.params
        )
        for encoded in (alone, packed)
    )
    # Float32 rounds at 6e-8 of the largest term; sums of some tens of terms, forwards and
    # backwards, take another order. A token of a neighbour would move them by tens of percent.
    np.testing.assert_allclose(one[0], other[0], rtol=1e-6)
    for left, right in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-5 * float(np.abs(left).max()))
