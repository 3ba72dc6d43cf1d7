"""Options: what is refused, and what a checkpoint's generation_config.json becomes."""

import json

import pytest

from lora_jax.generation import GenerationOptions, read_options


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        pytest.param({"max_new_tokens": 0}, "`max_new_tokens` .* least 1, got 0", id="no-tokens"),
        pytest.param({"max_new_tokens": 2.0}, "`max_new_tokens` must be an integer", id="float"),
        pytest.param({"num_beams": True}, "`num_beams` must be an integer", id="bool"),
        pytest.param({"top_k": -1}, "`top_k` .* at least 0", id="negative-top-k"),
        pytest.param({"temperature": -0.1}, "`temperature` must be at least 0", id="below-zero"),
        pytest.param({"temperature": float("nan")}, "`temperature`", id="nan"),
        pytest.param({"top_p": 0.0, "temperature": 1.0}, "`top_p` must be above 0", id="top-p-0"),
        pytest.param({"top_p": 1.5, "temperature": 1.0}, "`top_p` .* at most 1", id="top-p-2"),
        pytest.param({"repetition_penalty": 0}, "`repetition_penalty`", id="penalty-of-zero"),
        pytest.param({"length_penalty": "1"}, "`length_penalty`", id="text"),
        pytest.param({"eos_token_id": -1}, "`eos_token_id` must be token ids", id="negative-eos"),
        pytest.param({"eos_token_id": (2, 2)}, "each once", id="an-eos-twice"),
        pytest.param({"pad_token_id": 1.5}, "`pad_token_id` must be a token id", id="pad"),
        pytest.param(
            {"min_new_tokens": 9, "max_new_tokens": 8}, "9, more than `max_new_tokens`", id="min"
        ),
        pytest.param({"top_k": 5}, "`top_k` is for sampling", id="top-k-greedy"),
        pytest.param({"top_p": 0.9}, "`top_p` is for sampling", id="top-p-greedy"),
        pytest.param({"num_beams": 2, "temperature": 1.0}, "does not sample", id="sampled-beams"),
        pytest.param({"length_penalty": 2.0}, "is for beam search", id="penalty-without-beams"),
    ],
)
def test_what_is_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        GenerationOptions(**choices)


def test_all_problems_are_listed():
    with pytest.raises(ValueError, match=r"(?s)`num_beams`.*`temperature`.*`pad_token_id`"):
        GenerationOptions(num_beams=0, temperature=-1, pad_token_id=-1)


@pytest.mark.parametrize(
    ("eos", "pad", "eos_ids", "pad_id"),
    [
        pytest.param(None, None, (), 0, id="none"),
        pytest.param(2, None, (2,), 2, id="one"),
        pytest.param([5, 2], None, (5, 2), 5, id="several"),
        pytest.param((), None, (), 0, id="stated-none"),
        pytest.param(2, 0, (2,), 0, id="own-pad"),
    ],
)
def test_tokens(eos, pad, eos_ids, pad_id):
    options = GenerationOptions(eos_token_id=eos, pad_token_id=pad)
    assert (options.eos_ids, options.pad_id) == (eos_ids, pad_id)
    assert hash(options) == hash(GenerationOptions(eos_token_id=eos, pad_token_id=pad))


def written(directory, fields):
    (directory / "generation_config.json").write_text(json.dumps(fields))
    return directory


LLAMA = {
    "bos_token_id": 128000,
    "do_sample": True,
    "eos_token_id": [128001, 128009],
    "max_length": 4096,
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.40.0.dev0",
}


@pytest.mark.parametrize(
    ("fields", "changes", "expected"),
    [
        pytest.param(
            LLAMA,
            {"max_new_tokens": 9},
            {
                "max_new_tokens": 9,
                "temperature": 0.6,
                "top_p": 0.9,
                "top_k": 50,
                "eos_token_id": (128001, 128009),
            },
            id="llama-3-instruct",
        ),
        pytest.param(
            {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2},
            {},
            {"eos_token_id": 2, "pad_token_id": 2},
            id="tokens-alone",
        ),
        pytest.param({"do_sample": False, "temperature": 1.0}, {}, {}, id="greedy"),
        pytest.param({"do_sample": True}, {}, {"temperature": 1.0, "top_k": 50}, id="sampled"),
        pytest.param({"do_sample": True, "top_k": 0}, {}, {"temperature": 1.0}, id="all-tokens"),
        pytest.param(
            {"num_beams": 4, "length_penalty": 0.8, "early_stopping": False, "top_k": None},
            {"num_beams": 10},
            {"num_beams": 10, "length_penalty": 0.8},
            id="beams-changed",
        ),
    ],
)
def test_a_checkpoints_settings(tmp_path, fields, changes, expected):
    assert read_options(written(tmp_path, fields), **changes) == GenerationOptions(**expected)


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        pytest.param(LLAMA, {}, "`max_length` is 4096 .*give `max_new_tokens`", id="max-length"),
        pytest.param({"early_stopping": True}, {}, "`early_stopping` is True; only", id="early"),
        pytest.param({"penalty_alpha": 0.6}, {}, "`penalty_alpha` is unknown", id="contrastive"),
        pytest.param({"min_p": 0.1, "typical_p": 0.2}, {}, "(?s)`min_p`.*`typical_p`", id="both"),
        pytest.param({"temperature": 0.6}, {}, "`do_sample` is not", id="temperature-unused"),
        pytest.param({"top_k": 5}, {}, "is for sampling", id="top-k-unused"),
        pytest.param({}, {"beams": 2}, "`beams` is no option of ours", id="unknown-change"),
        pytest.param([], {}, "JSON object, got list", id="not-an-object"),
    ],
)
def test_settings_that_are_not_honoured(tmp_path, fields, changes, message):
    with pytest.raises(ValueError, match=message):
        read_options(written(tmp_path, fields), **changes)


def test_no_settings(tmp_path):
    with pytest.raises(ValueError, match=r"generation_config.json cannot be read"):
        read_options(tmp_path)
