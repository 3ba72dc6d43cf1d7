"""``lora-jax generate`` on a drawn decoder with a tokenizer of words."""

import io
import json

import jax
import pytest

from lora_jax import LoraConfig, cli, split
from lora_jax.generation import GenerationOptions, generate_text
from lora_jax.io import save_adapter
from lora_jax.models import from_pretrained, save_pretrained
from tests.lora_jax.cli.adapted import run_of
from tests.lora_jax.generation import toys
from tests.references.checkpoints import hub_cache

WORDS = [f"w{index}" for index in range(18)]
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('user', 'system') %}"
    "{{ raise_exception('no ' + m.role) }}{% endif %}w1 {{ m.content }} {% endfor %}w2"
)
FIVE = ("--max-new-tokens", "5")


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 19,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def run(capsys, *arguments):
    """Runs the command; exit code, standard output, standard error."""
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def drawn(tree, seed):
    """A draw in place of every array or shape, large enough that tokens vary."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return treedef.unflatten(
        0.7 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
    )


def checkpoint(directory, **special):
    """Writes a small decoder with its tokenizer."""
    (directory / "config.json").write_text(json.dumps(LLAMA))
    model = from_pretrained(directory, "causal-lm", abstract=True)
    save_pretrained(directory / "model", model, drawn(model.params, seed=0))
    toys.tokenizer(*WORDS, **special).save_pretrained(directory / "model")
    return directory / "model"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("generate"), chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    base = from_pretrained(model, "causal-lm")
    config = LoraConfig(rank=2, alpha=3.0, targets=("attention/(query|value)",))
    _, trainable = split(base.params, config, jax.random.key(1))
    directory = tmp_path_factory.mktemp("generate") / "adapter"
    save_adapter(directory, drawn(trainable, seed=2), config, base)
    return directory


def expected(model, *prompts, **choices):
    """What the library gives."""
    loaded = from_pretrained(model, "causal-lm")
    options = GenerationOptions(max_new_tokens=5, **choices)
    return generate_text(loaded, loaded.params, toys.tokenizer(*WORDS), prompts, options)


def test_completions_are_the_librarys(capsys, model):
    prompts = ["w3 w4", "w5"]
    code, out, err = run(capsys, "generate", "--model", model, *FIVE, "--prompt", *prompts)
    assert (code, err) == (0, "")
    assert out.splitlines() == expected(model, *prompts)
    assert all(out.splitlines())


def test_beams_and_json(capsys, model):
    decoding = ("--beams", "3", "--length-penalty", "0.8", "--no-repeat-ngram", "2")
    arguments = ("generate", "--model", model, *FIVE, *decoding, "--json", "--prompt", "w3 w4")
    code, out, _ = run(capsys, *arguments)
    completion = expected(model, "w3 w4", num_beams=3, length_penalty=0.8, no_repeat_ngram_size=2)
    assert code == 0
    assert json.loads(out) == {
        "model": str(model),
        "quantize": None,
        "adapter": None,
        "completions": [{"prompt": "w3 w4", "completion": completion[0]}],
    }


def test_an_adapter_is_used(capsys, model, adapter):
    arguments = ("generate", "--model", model, *FIVE, "--prompt", "w3 w4")
    _, plain, _ = run(capsys, *arguments)
    code, out, _ = run(capsys, *arguments, "--adapter", adapter)
    assert code == 0
    assert out != plain


def test_a_run_names_its_base_and_its_adapter(capsys, tmp_path, model, adapter):
    run_of(tmp_path / "run", adapter, str(model))
    arguments = ("generate", *FIVE, "--prompt", "w3 w4", "--json")
    _, wanted, _ = run(capsys, *arguments, "--model", model, "--adapter", adapter)
    code, out, err = run(capsys, *arguments, "--adapter", tmp_path / "run")
    assert (code, err) == (0, "")
    assert json.loads(wanted) == json.loads(out) | {"adapter": str(adapter)}
    assert json.loads(out)["adapter"] == str(tmp_path / "run" / "adapter")


def test_an_adapter_alone_names_its_base(capsys, monkeypatch, tmp_path, model, adapter):
    constants = pytest.importorskip("huggingface_hub.constants")
    cache = hub_cache(tmp_path / "hub", model, "meta/tiny", "v1")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    alone = run_of(tmp_path / "run", adapter, "unused") / "adapter"
    arguments = ("generate", *FIVE, "--prompt", "w3 w4", "--adapter", alone)
    code, _, err = run(capsys, *arguments)
    assert (code, "does not say what its base model is: add --model" in err) == (2, True)
    _, wanted, _ = run(capsys, *arguments, "--model", model)
    fields = json.loads((alone / "adapter_config.json").read_text())
    fields |= {"base_model_name_or_path": "meta/tiny", "revision": "v1"}
    (alone / "adapter_config.json").write_text(json.dumps(fields))
    assert run(capsys, *arguments) == (0, wanted, "")


def test_prompts_come_from_files_and_stdin(capsys, monkeypatch, tmp_path, model):
    lines = "w3 w4\n\nw5\n"
    (tmp_path / "prompts.txt").write_text(lines)
    rows = [{"prompt": "w3 w4"}, {"prompt": "w5"}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    wanted = expected(model, "w3 w4", "w5")
    for source in (
        ("--prompts", tmp_path / "prompts.txt"),
        ("--prompts", tmp_path / "prompts.jsonl"),
        (),
    ):
        code, out, _ = run(capsys, "generate", "--model", model, *FIVE, *source)
        assert (code, out.splitlines()) == (0, wanted)


def test_chats_are_written_by_the_template(capsys, tmp_path, model):
    messages = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w5"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    arguments = ("generate", "--model", model, *FIVE)
    _, chat, _ = run(capsys, *arguments, "--chat", "--prompt", "w5")
    _, file, _ = run(capsys, *arguments, "--prompts", tmp_path / "chats.jsonl")
    assert [chat.rstrip("\n"), file.rstrip("\n")] == expected(model, "w1 w5 w2", "w1 w9 w1 w5 w2")


def test_the_seed_decides_what_is_sampled(capsys, model):
    arguments = ("generate", "--model", model, *FIVE, "--prompt", "w3")
    sampled = [
        run(capsys, *arguments, "--temperature", "3", "--top-k", "15", "--top-p", "0.99", *seed)[1]
        for seed in (("--seed", "1"), ("--seed", "1"), ())
    ]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["--model", "./nowhere"], "'./nowhere' does not exist", id="no-model"),
        pytest.param(["--adapter", "./nowhere"], "nowhere", id="no-adapter"),
        pytest.param(["--prompts", "./nowhere.txt"], "nowhere.txt", id="no-prompts"),
        pytest.param(["--prompt", "w1", "--prompts", "F"], "not allowed with", id="two-sources"),
        pytest.param(["--top-k", "5"], "`top_k` is for sampling", id="top-k-alone"),
        pytest.param(["--beams", "2", "--temperature", "1"], "does not sample", id="both"),
        pytest.param(["--beams", "0"], "`num_beams` must be an integer of at least 1", id="beams"),
        pytest.param(["--max-new-tokens", "99"], "16 positions", id="too-long"),
        pytest.param(["--prompt", ""], "hold no token: [0]", id="empty-prompt"),
        pytest.param(["--batch-size", "0"], "`batch_size`", id="batch-size"),
        pytest.param(["--dtype", "int8"], "invalid choice", id="dtype"),
        pytest.param(["--seed", "-1"], "--seed must be at least 0", id="seed-below"),
        pytest.param(["--seed", str(2**64)], "below 2^32", id="seed-above"),
    ],
)
def test_bad_input_is_code_2_and_one_line(capsys, model, arguments, message):
    given = ["generate", "--model", model, "--max-new-tokens", 2, "--prompt", "w1"]
    if "--prompts" in arguments and "--prompt" not in arguments:
        given = given[:-2]
    code, out, err = run(capsys, *given, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1 or "usage" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "has no prompt", id="empty"),
        pytest.param("{", "prompts.jsonl:1 is not JSON", id="not-json"),
        pytest.param('{"prompt": "w1"}\n\n{"text": "w1"}', "prompts.jsonl:3 must have", id="key"),
        pytest.param('{"prompt": 5}', "must have", id="a-number"),
        pytest.param('{"messages": []}', "must have", id="no-messages"),
        pytest.param('{"messages": [{"role": "user"}]}', "must have", id="no-content"),
        pytest.param(
            '{"messages": [{"role": "tool", "content": "w1"}]}', "refuses", id="template-refuses"
        ),
    ],
)
def test_bad_prompt_files(capsys, tmp_path, model, text, message):
    (tmp_path / "prompts.jsonl").write_text(text)
    given = ("generate", "--model", model, "--prompts", tmp_path / "prompts.jsonl", *FIVE)
    code, out, err = run(capsys, *given)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_line_ends_at_a_newline_alone(capsys, tmp_path, model):
    """JSON may hold U+2028 and U+0085 as they are, which Python counts as ends of lines."""
    file = tmp_path / "prompts.jsonl"
    prompts = ["w1 \u2028w2", "w3\x85"]
    rows = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    file.write_text("\r\n".join(rows), encoding="utf-8")
    code, out, _ = run(capsys, "generate", "--model", model, *FIVE, "--prompts", file, "--json")
    assert code == 0
    assert [row["prompt"] for row in json.loads(out)["completions"]] == prompts


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{% for", "{{ messages[9].x.y }}"])
def test_a_template_that_fails_is_one_line(capsys, tmp_path, template):
    where = checkpoint(tmp_path, chat_template=template)
    code, out, err = run(capsys, "generate", "--model", where, "--chat", "--prompt", "w1")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "The chat template refuses" in err


def test_a_model_without_a_template_does_not_chat(capsys, tmp_path):
    given = ("--model", checkpoint(tmp_path), "--chat", "--prompt", "w1", *FIVE)
    code, _, err = run(capsys, "generate", *given)
    assert code == 2
    assert "no chat template" in err


def test_standard_input_that_nobody_fills(capsys, monkeypatch, model):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    code, _, err = run(capsys, "generate", "--model", model)
    assert code == 2
    assert "--prompt" in err
