"""Law 6 for the decoders of the library: the gradient's arithmetic is the low-rank path's."""

import pytest

from benchmarks import flops
from benchmarks.functions import OUR_OWN


@pytest.mark.parametrize(
    "name",
    [
        "lora_jax.models.Llama",
        "lora_jax.models.Llama, scanned, remat",
        "lora_jax.models.Gpt2, scanned",
    ],
)
def test_gradient_flops_are_those_of_the_low_rank_path(name):
    function = OUR_OWN[name]()
    counts = flops.count(function)
    print(f"adapted / merged: {counts.adapted / counts.merged:.3f}")
    assert counts.adapted <= function.limit * counts.merged


@pytest.mark.parametrize("name", OUR_OWN)
def test_targets_match_every_matrix(name):
    function = OUR_OWN[name]()
    _, trainable = flops.halves(function)
    assert len(trainable) == function.count
