"""The table of names is written once and is one-to-one."""

import pytest

from lora_jax.io.names import NameTable, Row, expand

ROWS = (
    Row("embeddings/embedding", "bert.embeddings.weight"),
    Row("layers/{layer}/kernel", "bert.layer.{layer}.weight", "linear"),
)


def test_unrolled_rows_carry_the_index():
    entries = expand(ROWS, 2, stacked=False)
    assert list(entries) == ["embeddings/embedding", "layers/0/kernel", "layers/1/kernel"]
    assert entries["layers/1/kernel"].tensors == ("bert.layer.1.weight",)
    assert entries["layers/1/kernel"].modules == ("bert.layer.1",)


def test_stacked_rows_list_their_layers():
    entry = expand(ROWS, 3, stacked=True)["layers/kernel"]
    assert entry.tensors == tuple(f"bert.layer.{i}.weight" for i in range(3))
    assert entry.stacked


@pytest.mark.parametrize(
    ("row", "match"),
    [
        pytest.param(Row("embeddings/embedding", "other"), "embeddings/embedding", id="path"),
        pytest.param(Row("other", "bert.layer.0.weight"), "layer.0.weight", id="tensor"),
        pytest.param(Row("other", "embeddings.weight"), "embeddings.weight", id="but-for-prefix"),
    ],
)
def test_a_name_that_occurs_twice_is_refused(row, match):
    with pytest.raises(ValueError, match=f"not one-to-one.*{match}"):
        NameTable(expand((*ROWS, row), 2, stacked=False), prefix="bert")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("bert.embeddings.weight", "embeddings.weight", id="prefixed"),
        pytest.param("embeddings.weight", "embeddings.weight", id="bare"),
        pytest.param("bert.x.LayerNorm.gamma", "x.LayerNorm.weight", id="old-scale"),
        pytest.param("bertish.weight", "bertish.weight", id="prefix-is-a-whole-segment"),
    ],
)
def test_names_are_compared_without_prefix_and_as_spelt_today(name, expected):
    renamed = ((".LayerNorm.gamma", ".LayerNorm.weight"),)
    table = NameTable(expand(ROWS, 1, stacked=False), prefix="bert", renamed=renamed)
    assert table.key(name) == expected
