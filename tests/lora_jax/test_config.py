"""`LoraConfig` and `summary`."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax import LoraConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"rank": 0}, "`rank` must be an integer of at least 1, got 0", id="rank-0"),
        pytest.param({"rank": 2.0}, "`rank` must be an integer.*got 2.0", id="float-rank"),
        pytest.param({"rank_pattern": {"a": 0}}, "`rank` must be an integer.*got 0", id="pattern"),
        pytest.param({"alpha": 0}, "`alpha` must be positive and finite, got 0", id="alpha-0"),
        pytest.param({"alpha": float("inf")}, "`alpha` must be positive", id="alpha-inf"),
        pytest.param({"dropout": 1.0}, r"`dropout` must be in \[0, 1\), got 1.0", id="dropout-1"),
        pytest.param(
            {"alpha": "8"}, "`alpha` must be positive and finite, got '8'", id="text-alpha"
        ),
        pytest.param({"targets": ("(?i)a",)}, "not a regular expression: global flags", id="flags"),
        pytest.param({"targets": ("(",)}, "`targets` holds '\\(', which is not a reg", id="regex"),
        pytest.param({"targets": ()}, "Nothing would train", id="nothing"),
        pytest.param({"targets": ("",)}, "`targets` holds ''; a pattern is a non-", id="empty"),
        pytest.param({"layouts": {"a": "in sideways"}}, "has 'sideways'; an axis is", id="layout"),
        pytest.param(
            {"layouts": {"a": "in in"}}, "needs at least one 'in' and one 'out'", id="no-out"
        ),
    ],
)
def test_a_config_is_checked_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**{"rank": 2, "alpha": 4.0, "targets": ("query",), **options})


def test_summary_counts_what_trains():
    params = {
        "query": {"kernel": jax.ShapeDtypeStruct((100, 50), jnp.float32)},
        "classifier": {"bias": jax.ShapeDtypeStruct((3,), jnp.float32)},
    }
    config = LoraConfig(rank=4, alpha=8, targets=("query",), train=("classifier/.*",))
    summary = lora_jax.summary(params, config)
    assert (summary.trained, summary.total) == (4 * 150 + 3, 5003)
    assert str(summary).splitlines() == [
        "weight                         shape     rank  trained   percent",
        "classifier/bias                3         full        3  100.00 %",
        "query/kernel                   100 x 50     4      600   12.00 %",
        "2 weights of 5,003 parameters                      603   12.05 %",
    ]
