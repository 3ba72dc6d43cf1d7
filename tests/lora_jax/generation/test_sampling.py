"""Sampling: which tokens can come, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from lora_jax.generation import GenerationOptions, generate
from lora_jax.generation._sampling import keep_top
from tests.lora_jax.generation import toys

CHANCES = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
DRAWS = 4000


def draws(chances=CHANCES, seed=0, **choices):
    """How often each token was drawn, after token 0, in so many rows."""
    model, params = toys.decoder(np.tile(np.log(chances), (len(chances), 1)))
    options = GenerationOptions(max_new_tokens=1, **choices)
    rows = np.zeros((DRAWS, 1), int)
    result = generate(model, params, rows, None, options, key=jax.random.key(seed))
    return np.bincount(np.asarray(result.tokens)[:, 0], minlength=len(chances))


@pytest.mark.parametrize(
    ("choices", "weights"),
    [
        pytest.param({"temperature": 1.0}, CHANCES, id="as-they-are"),
        pytest.param({"temperature": 0.5}, CHANCES**2, id="cold"),
        pytest.param({"temperature": 2.0}, CHANCES**0.5, id="warm"),
        pytest.param({"temperature": 1.0, "top_k": 1}, [0, 1, 0, 0, 0], id="top-1"),
        pytest.param({"temperature": 1.0, "top_k": 3}, [0, 0.4, 0, 0.25, 0.2], id="top-3"),
        pytest.param({"temperature": 1.0, "top_k": 50}, CHANCES, id="top-k-beyond-vocabulary"),
        pytest.param({"temperature": 1.0, "top_p": 0.39}, [0, 1, 0, 0, 0], id="top-p-one-stays"),
        pytest.param({"temperature": 1.0, "top_p": 1e-9}, [0, 1, 0, 0, 0], id="top-p-of-nothing"),
        pytest.param({"temperature": 1.0, "top_p": 0.6}, [0, 0.4, 0, 0.25, 0], id="top-p-two"),
        pytest.param({"temperature": 1.0, "top_p": 0.7}, [0, 0.4, 0, 0.25, 0.2], id="top-p-three"),
        # Squared and normalised: .57 .22 .14 .04 .01; so two of them make .75.
        pytest.param(
            {"temperature": 0.5, "top_p": 0.75}, [0, 0.16, 0, 0.0625, 0], id="temperature-first"
        ),
        # Among the best three, .4 is .47 and .65 is .76.
        pytest.param(
            {"temperature": 1.0, "top_k": 3, "top_p": 0.7}, [0, 0.4, 0, 0.25, 0], id="top-k-first"
        ),
    ],
)
def test_what_is_drawn_and_how_often(choices, weights):
    expected = DRAWS * np.asarray(weights) / np.sum(weights)
    counts = draws(**choices)
    possible = expected > 0
    np.testing.assert_array_equal(counts > 0, possible)
    statistic = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    freedom = possible.sum() - 1
    # A right sampler fails for one seed in a million, and the seed is fixed.
    assert freedom == 0 or statistic < scipy.stats.chi2.isf(1e-6, freedom)


def test_the_key_decides():
    chances = np.full(50, 0.02)
    first, again, other = (draws(chances, seed, temperature=1.0) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_every_row_and_step_draws_anew():
    model, params = toys.decoder(np.zeros((100, 100)))
    options = GenerationOptions(max_new_tokens=20, temperature=1.0)
    result = generate(model, params, np.zeros((20, 1), int), None, options, key=jax.random.key(0))
    tokens = np.asarray(result.tokens)
    # 20 draws of 100 tokens give about 18 different ones; one repeated draw would give 1.
    assert min(len(set(line)) for line in (*tokens, *tokens.T)) > 10


@pytest.mark.parametrize(
    ("chances", "top_k", "top_p", "kept"),
    [
        pytest.param([0.4, 0.2, 0.2, 0.2], 2, 1.0, 4, id="ties-with-the-last-stay"),
        pytest.param([0.25, 0.25, 0.25, 0.25], 4, 0.5, 2, id="top-p-parts-a-tie"),
        pytest.param([0.5, 0.25, 0.25], 3, 0.5, 1, id="reached-exactly"),
        pytest.param([0.5, 0.25, 0.25], 3, 0.51, 2, id="just-not-reached"),
        pytest.param([0.5, 0.3, 0.2, 0.0], 4, 1.0, 4, id="off-keeps-all"),
    ],
)
def test_which_ranks_stay(chances, top_k, top_p, kept):
    with np.errstate(divide="ignore"):
        ranked = jnp.log(jnp.array([chances]))
    result = keep_top(ranked, jnp.int32(top_k), jnp.float32(top_p))
    np.testing.assert_array_equal(result[0, :kept], ranked[0, :kept])
    assert (result[0, kept:] == -jnp.inf).all()


def test_scores_are_the_models_log_probabilities():
    model, params = toys.decoder(np.tile(np.log(CHANCES), (5, 1)))
    options = GenerationOptions(max_new_tokens=3, temperature=0.3, top_k=2)
    result = generate(model, params, np.zeros((4, 1), int), None, options, key=jax.random.key(3))
    expected = np.log(CHANCES)[np.asarray(result.tokens)].sum(1)
    np.testing.assert_allclose(result.scores, expected, rtol=1e-5)
