"""Batches: every row once an epoch, any step on its own, padded no further than needed."""

import collections

import numpy as np
import pytest

from lora_jax.io.tokenizers import load_tokenizer
from train import batches, order
from train.data import Examples
from train.tasks import classification


def encoded(lengths):
    """Examples whose first token is their own number."""
    ids = [np.r_[row, np.ones(size - 1)].astype(np.int32) for row, size in enumerate(lengths)]
    return classification.Encoded(
        examples=Examples([""] * len(ids), None, [0] * len(ids)),
        names=("no", "yes"),
        ids=ids,
        types=None,
        labels=np.arange(len(ids), dtype=np.int32),
        pad=0,
        lengths=batches.padded_lengths(max(lengths), 64),
        truncated=0,
    )


ORDERS = [
    pytest.param(order.grain_order, id="grain"),
    pytest.param(order.numpy_order, id="numpy"),
]


@pytest.mark.parametrize("make_order", ORDERS)
def test_every_row_is_seen_once_an_epoch_in_another_order(make_order):
    sequence = batches.Batches(encoded([3] * 10), 4, 1, make_order)
    seen = np.concatenate([sequence[step]["labels"] for step in range(10)]).reshape(4, 10)
    for epoch in seen:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in seen.tolist()}) == 4


@pytest.mark.parametrize("make_order", ORDERS)
def test_grouping_by_length_deals_the_same_rows_out_with_less_padding(make_order):
    examples = encoded(list(range(1, 65)) * 2)
    plain, grouped = (
        batches.Batches(examples, 4, 1, make_order, group_by_length=group)
        for group in (False, True)
    )
    steps = range(batches.GROUP * 4)  # one epoch of 128 rows
    for sequence in (plain, grouped):
        seen = np.concatenate([sequence[step]["labels"] for step in steps])
        assert sorted(seen) == list(range(128))
    padded = [sum(seq[step]["input_ids"].size for step in steps) for seq in (plain, grouped)]
    assert padded[1] < 0.75 * padded[0]
    widths = [grouped[step]["input_ids"].shape[1] for step in steps]
    assert widths[: batches.GROUP] != sorted(widths[: batches.GROUP])


@pytest.mark.parametrize("make_order", ORDERS)
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("step", [0, 7, 100_000])
def test_a_batch_follows_from_its_step_alone(step, group, make_order):
    first, second = (
        batches.Batches(encoded(range(1, 31)), 4, 5, make_order, group_by_length=group)
        for _ in range(2)
    )
    first[step + 1]
    for name, array in second[step].items():
        np.testing.assert_array_equal(first[step][name], array)


@pytest.mark.parametrize("make_order", ORDERS)
def test_seeds_differ(make_order):
    one, other = (batches.Batches(encoded([3] * 50), 8, seed, make_order)[0] for seed in (0, 1))
    assert one["labels"].tolist() != other["labels"].tolist()


def test_collate_pads_ids_and_masks_the_padding():
    examples = encoded([2, 9, 4, 31])
    batch = batches.collate(examples, [1, 2], examples.lengths)
    assert batch["input_ids"].tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [2, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert batch["attention_mask"].sum(axis=1).tolist() == [9, 4]
    assert batch["labels"].tolist() == [1, 2]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 23])
def test_evaluation_covers_every_row_once_in_full_batches(count):
    seen = collections.Counter()
    for rows, batch in batches.evaluation_batches(encoded(range(1, count + 1)), batch_size=8):
        assert batch["input_ids"].shape[0] == 8
        assert batch["labels"][: len(rows)].tolist() == rows.tolist()
        seen.update(rows.tolist())
    assert seen == dict.fromkeys(range(count), 1)


@pytest.mark.parametrize(
    ("longest", "limit", "lengths"),
    [
        pytest.param(5, 128, (8,), id="short"),
        pytest.param(62, 64, (16, 32, 48, 64), id="up-to-the-limit"),
        pytest.param(200, 512, (56, 112, 168, 200), id="below-the-limit"),
        pytest.param(30, 30, (8, 16, 24, 30), id="an-odd-limit"),
    ],
)
def test_padded_lengths_are_few_and_reach_the_longest(longest, limit, lengths):
    assert batches.padded_lengths(longest, limit) == lengths


def test_training_pads_to_two_lengths_at_most():
    sequence = batches.Batches(encoded(range(1, 65)), 2, 0, order.numpy_order)
    widths = {sequence[step]["input_ids"].shape[1] for step in range(100)}
    assert widths == {32, 64}


@pytest.mark.parametrize(
    ("pairs", "limit", "ids", "types", "cut"),
    [
        pytest.param(None, 16, "[CLS] a fine film [SEP]", [0] * 5, 0, id="one-sentence"),
        pytest.param(None, 4, "[CLS] a fine [SEP]", [0] * 4, 1, id="cut"),
        pytest.param(
            ["the plot"],
            16,
            "[CLS] a fine film [SEP] the plot [SEP]",
            [0] * 5 + [1] * 3,
            0,
            id="a-pair",
        ),
        pytest.param(
            ["the plot"],
            7,
            "[CLS] a fine [SEP] the plot [SEP]",
            [0] * 4 + [1] * 3,
            1,
            id="a-cut-pair",
        ),
    ],
)
def test_texts_become_tokens(model_directory, pairs, limit, ids, types, cut):
    tokenizer = load_tokenizer(model_directory)
    examples = Examples(["a fine film"], pairs, [1])
    found = classification.encode(tokenizer, examples, ("no", "yes"), limit)
    assert tokenizer.convert_ids_to_tokens(found.ids[0].tolist()) == ids.split()
    batch = batches.collate(found, [0], found.lengths)
    assert batch["token_type_ids"][0, : len(types)].tolist() == types
    assert found.truncated == cut


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="has no tokenizer: none of"):
        load_tokenizer(tmp_path)
