"""Law 6 for the decoders of the library: the gradient's arithmetic is the low-rank path's."""

import jax
import pytest

from benchmarks import flops
from benchmarks.functions import OUR_OWN


def halves(name):
    """A function, and its frozen and trainable halves as shapes: counting needs no values."""
    built = []

    def build():
        built.append(OUR_OWN[name]())
        return flops.halves(built[0])

    return jax.eval_shape(build), built[0]


@pytest.mark.parametrize(
    "name",
    [
        "lora_jax.models.Llama",
        "lora_jax.models.Llama, scanned, remat",
        "lora_jax.models.Gpt2, scanned",
    ],
)
def test_gradient_flops_are_those_of_the_low_rank_path(name):
    (frozen, trainable), function = halves(name)
    adapted, merged = (
        jax.jit(jax.grad(loss)).lower(trainable, frozen).compile().cost_analysis()["flops"]
        for loss in flops.losses(function)
    )
    print(f"adapted / merged: {adapted / merged:.3f}")
    assert adapted <= function.limit * merged


@pytest.mark.parametrize("name", OUR_OWN)
def test_targets_match_every_matrix(name):
    (_, trainable), function = halves(name)
    assert len(trainable) == function.count
