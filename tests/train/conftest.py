"""A tiny BERT and a tiny Llama with their tokenizers, and texts that they can learn."""

import json
import random

import jax
import pytest
import tokenizers
import transformers
from jax.experimental.compilation_cache import compilation_cache
from tokenizers import decoders, models, pre_tokenizers, processors

import lora_jax.models
from lora_jax.io.tokenizers import load_tokenizer

GOOD, BAD = ("fine", "great", "lovely", "warm"), ("awful", "dull", "poor", "weak")
OTHER = ("a", "the", "film", "plot", "is", "was", "with", "and", "its", "cast", "very", "quite")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
INPUTS = ("input_ids", "token_type_ids", "attention_mask")
ARCHITECTURE = {
    "model_type": "bert",
    "architectures": ["BertForSequenceClassification"],
    "vocab_size": len(SPECIAL + GOOD + BAD + OTHER),
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def _compile_once(compiled):
    """Runs here compile the same programs again and again, in this process or in their own."""
    settings = {
        "jax_compilation_cache_dir": str(compiled),
        "jax_persistent_cache_min_compile_time_secs": 0.05,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    """A published checkpoint in the small: config, weights and tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "tiny-bert"
    source = tmp_path_factory.mktemp("models") / "shapes"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(ARCHITECTURE))
    write_tokenizer(source)
    shapes = lora_jax.models.from_pretrained(source, abstract=True)
    lora_jax.models.save_pretrained(directory, shapes, draw(shapes.params))
    return directory


def draw(shapes):
    """Weights of a model that can still learn: scales at 1, biases at 0, the rest normal."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    weights = []
    for key, (path, leaf) in zip(keys, leaves, strict=True):
        spread = 0.2 if leaf.ndim > 1 else 0.0
        start = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        weights.append(start + spread * jax.random.normal(key, leaf.shape))
    return treedef.unflatten(weights)


def write_tokenizer(directory):
    words = [*SPECIAL, *GOOD, *BAD, *OTHER]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    names = ("pad", "unk", "cls", "sep", "mask")
    special = {f"{name}_token": word for name, word in zip(names, SPECIAL, strict=True)}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": INPUTS}
    (directory / "tokenizer_config.json").write_text(json.dumps({**kind, **special}))


def sentence(source, words):
    length = source.randint(1, 3)
    sides = [source.choice(OTHER) for _ in range(length)]
    sides.insert(source.randint(0, length), source.choice(words))
    return " ".join(sides)


def sentences(count, seed=0):
    """Rows ``(text, label)``: label 1 where a good word is in the text, 0 where a bad one is."""
    source = random.Random(seed)
    labels = [source.randint(0, 1) for _ in range(count)]
    return [(sentence(source, (BAD, GOOD)[label]), label) for label in labels]


CONFIG = """\
model:
  path: {model}
  new_head: true
lora:
  rank: 2
  alpha: 4
  dropout: 0.1
data:
  train: rows.csv
  holdout: 60
  labels: [bad, good]
  max_length: 8
training:
  steps: 20
  batch_size: 16
  learning_rate: 1e-2
  evaluate_every: 10
  save_every: 5
  log_every: 4
output:
  directory: out
"""


@pytest.fixture(scope="session")
def write_run(model_directory):
    """Puts 300 rows of data and a config for them, ``run.yaml``, into a folder."""

    def write(folder):
        rows = "".join(f"{text},{label}\n" for text, label in sentences(300))
        (folder / "rows.csv").write_text("text,label\n" + rows)
        (folder / "run.yaml").write_text(CONFIG.format(model=model_directory))
        return folder

    return write


@pytest.fixture
def folder(tmp_path, write_run):
    """A folder with a config and its data."""
    return write_run(tmp_path)


NAMES, AREAS = ("Aroma", "Browns", "Cotto", "Zizzi"), ("north", "south", "riverside")
WORDS = (
    *("system", "user", "assistant", "Hi", "Hello", " there", "Bye", " now", "Be", " kind"),
    *("name", " :", " |", " area", "||", " is", " in", " the", ".", "\n", " "),
    *(f" {word}" for word in (*NAMES, *AREAS)),
)
MARKS = ("<unk>", "<bos>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DECODER = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": len(MARKS + WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 3,
}


def build_tokenizer():
    """Tokens are words with the space before them, as GPT-2's are; eos is the end of a turn."""
    vocabulary = {word: number for number, word in enumerate((*MARKS, *WORDS))}
    words = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(
        tokenizers.Regex(r" ?\w+| ?[^\w\s]+|\s"), behavior="isolated"
    )
    words.decoder = decoders.Fuse()
    words.add_special_tokens(list(MARKS))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<|im_end|>", chat_template=CHATML
    )


@pytest.fixture(scope="session")
def decoder_directory(tmp_path_factory):
    """A published decoder in the small: config, weights, and a tokenizer without a pad token."""
    directory = tmp_path_factory.mktemp("decoders") / "tiny-llama"
    source = tmp_path_factory.mktemp("decoders") / "shapes"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(DECODER))
    shapes = lora_jax.models.from_pretrained(source, task="causal-lm", abstract=True)
    lora_jax.models.save_pretrained(directory, shapes, draw(shapes.params))
    build_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(decoder_directory):
    return load_tokenizer(decoder_directory)


def meanings(count, seed=0):
    """Lines of the E2E format: a restaurant and where it is, and a sentence that says so."""
    source = random.Random(seed)
    pairs = [(source.choice(NAMES), source.choice(AREAS)) for _ in range(count)]
    return [f"name : {name} | area : {area}||{name} is in the {area}." for name, area in pairs]
