"""Rotary embeddings turn by position, and their frequencies are scaled as published."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.llama._rotary import Rope, angles, frequencies, read_rope, rope_fields, rotate

LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_scores_depend_on_distance_only():
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(at, other):
        turned = [
            rotate(x, angles(Rope(rope_theta=100.0), 8, jnp.asarray([[position]])))
            for x, position in ((query, at), (key, other))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    np.testing.assert_allclose(score(9, 5), score(4, 0), rtol=1e-5)
    assert abs(score(9, 5) - score(9, 4)) > 1e-2


def test_a_quarter_turn_by_hand():
    quarter = angles(Rope(rope_theta=1.0), 4, jnp.asarray([[1]]))
    quarter = type(quarter)(jnp.zeros_like(quarter.cos), jnp.ones_like(quarter.sin))
    turned = rotate(jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4), quarter)
    np.testing.assert_array_equal(turned[0, 0, 0], [-3.0, -4.0, 1.0, 2.0])


def test_rotation_is_float32_inside():
    x = jnp.ones((1, 1, 1, 8), jnp.bfloat16)
    turned = rotate(x, angles(Rope(rope_theta=1e4), 8, jnp.asarray([[1000]])))
    wide = rotate(x.astype(jnp.float32), angles(Rope(rope_theta=1e4), 8, jnp.asarray([[1000]])))
    np.testing.assert_array_equal(turned, wide.astype(jnp.bfloat16))


def test_frequencies_of_llama_3_by_wavelength():
    rope = read_rope(LLAMA_3, theta=1.0, max_positions=1)
    plain = frequencies(dataclasses.replace(rope, rope_type="default"), 128)
    scaled = frequencies(rope, 128)
    turns = 8192 * plain / (2 * np.pi)
    slow, fast = turns < 1.0, turns > 4.0
    np.testing.assert_array_equal(scaled[fast], plain[fast])
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8, rtol=1e-6)
    between = ~slow & ~fast
    assert between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()


def test_linear_scaling_divides():
    plain, scaled = (
        frequencies(Rope(rope_theta=1e4, rope_type=kind, factor=4.0), 8)
        for kind in ("default", "linear")
    )
    np.testing.assert_allclose(scaled, plain / 4, rtol=1e-6)


@pytest.mark.parametrize(
    "found",
    [
        pytest.param({"rope_type": "default", "rope_theta": 7.0}, id="default"),
        pytest.param({"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}, id="linear"),
        pytest.param(LLAMA_3, id="llama3"),
    ],
)
def test_what_is_read_is_written(found):
    assert rope_fields(read_rope(found, theta=1.0, max_positions=1)) == found


def test_old_files_say_type_and_leave_out_what_the_config_says():
    found = {k: v for k, v in LLAMA_3.items() if k not in ("rope_type", "rope_theta")}
    del found["original_max_position_embeddings"]
    rope = read_rope({"type": "llama3"} | found, theta=500_000.0, max_positions=8192)
    assert rope_fields(rope) == LLAMA_3


@pytest.mark.parametrize(
    ("found", "match"),
    [
        pytest.param({"rope_type": "yarn"}, "`rope_type` 'yarn' is not supported", id="type"),
        pytest.param({"rope_type": ["linear"]}, "not supported", id="no-name"),
        pytest.param({"rope_type": "linear"}, "'factor'.*missing", id="missing"),
        pytest.param({"factor": 2.0}, "'factor'.*unknown", id="unknown"),
        pytest.param(
            {"rope_type": "linear", "factor": "2"}, "`factor` must be a number", id="text"
        ),
        pytest.param({"rope_type": "linear", "factor": 0}, "`factor` must be positive", id="zero"),
        pytest.param({"partial_rotary_factor": 0.5}, "`partial_rotary_factor`", id="partial"),
        pytest.param(
            LLAMA_3 | {"high_freq_factor": 1.0}, "`high_freq_factor` 1.0 must be more", id="order"
        ),
    ],
)
def test_read_rope_refuses(found, match):
    with pytest.raises(ValueError, match=match):
        read_rope(found, theta=1e4, max_positions=64)
