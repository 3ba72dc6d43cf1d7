"""Tiny models of each family, and what PEFT and we must agree on: logits and merged weights."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import LoraConfig, merge, split
from lora_jax._paths import flatten
from lora_jax.io.hugging_face import published_tensors
from lora_jax.models import from_pretrained

torch = pytest.importorskip("torch", reason="PyTorch is not installed (make test-oracle)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")
peft = pytest.importorskip("peft", reason="PEFT is not installed (make test-oracle)")

SIZES = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
DECODER = SIZES | HEADS | TOKENS | {"max_position_embeddings": 32}


def _llama(tied=False):
    config = transformers.LlamaConfig(**DECODER, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config)


def _qwen2():
    config = transformers.Qwen2Config(**DECODER, tie_word_embeddings=False)
    return transformers.Qwen2ForCausalLM(config)


def _gemma3():
    config = transformers.Gemma3TextConfig(**DECODER, head_dim=4, sliding_window=4)
    return transformers.Gemma3ForCausalLM(config)


def _gpt2():
    sizes = {"vocab_size": 48, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **tokens))


MAKERS = {
    "llama": _llama,
    "llama-tied": functools.partial(_llama, tied=True),
    "qwen2": _qwen2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
}


def make_checkpoint(directory, family):
    """Writes a random model of a family, with biases and norms that are not at their start."""
    torch.manual_seed(0)
    model = MAKERS[family]()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape))
    model.save_pretrained(directory)
    return directory


def read_torch(directory):
    return transformers.AutoModelForCausalLM.from_pretrained(directory).eval()


IDS = np.array([[5, 9, 33, 40, 47, 1, 2], [0, 0, 7, 8, 9, 10, 11]])
MASK = np.array([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])


POSITIONS = np.maximum(MASK.cumsum(1) - 1, 0)  # GPT-2's classes count padding unless told


def torch_logits(model):
    ids, mask, positions = map(torch.from_numpy, (IDS, MASK, POSITIONS))
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions).logits.numpy()


@functools.cache
def our_model(directory, scan_layers=False):
    """A family's model, and its function compiled, once for all cases."""
    model = from_pretrained(directory, "causal-lm", scan_layers=scan_layers)
    return model, jax.jit(model.apply)


def our_logits(apply, params):
    return np.asarray(apply(params, IDS, MASK))


def assert_same_logits(ours, theirs):
    """To rounding: sums of about a hundred terms, over a few layers, next to the largest logit."""
    kept = MASK.astype(bool)
    difference = np.abs(ours - theirs)[kept].max() / max(1.0, np.abs(theirs[kept]).max())
    print(f"largest difference {difference:.1e}, next to the largest logit")
    assert difference < 1e-5


def moved(theirs, width=0.3):
    """Moves everything of a PEFT model that trains; factors of a tied weight stay tied."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in theirs.parameters():
            if weight.requires_grad:
                weight.add_(width * torch.randn(weight.shape))
    return theirs


def trained(model, config):
    """A split with every array moved, as if trained."""
    frozen, trainable = split(model.params, config, jax.random.key(0))
    draw = np.random.default_rng(1).standard_normal
    move = lambda x: jnp.asarray(np.asarray(x) + 0.3 * draw(x.shape, np.float32))  # noqa: E731
    return frozen, jax.tree.map(move, trainable)


def lora(**changes) -> LoraConfig:
    return LoraConfig(**({"rank": 4, "alpha": 10.0, "dropout": 0.1} | changes))


def load_peft(base, adapter):
    """PEFT's model of an adapter; keys that it does not find are an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        return peft.PeftModel.from_pretrained(read_torch(base), adapter).eval()


def assert_same_merge(model, frozen, trainable, theirs):
    """`merge_and_unload` and our merge, tensor by tensor.

    Both round a sum of ``rank`` products and a weight to float32, in another order: that moves a
    value by about as many units of rounding as there are terms, next to the largest.
    """
    weights, _ = flatten(merge(frozen, trainable))
    state = theirs.merge_and_unload().state_dict()
    rank = max(getattr(f, "rank", 1) for f in trainable.values())
    for path, entry in model.names.entries.items():
        for name, ours in published_tensors(entry, weights[path]).items():
            atol = 4 * (rank + 1) * np.finfo(np.float32).eps * max(1.0, np.abs(ours).max())
            np.testing.assert_allclose(ours, state[name].numpy(), rtol=0, atol=atol, err_msg=name)


def assert_peft_would_write_the_same(theirs, adapter, again):
    """What PEFT holds after loading is what the file has: no tensor dropped, none made up.

    PEFT adds the base's weights under an adapted embedding and, where biases train, its own two
    copies of a bias in a module that is saved.
    """
    theirs.save_pretrained(again)
    one, two = (load_file(each / "adapter_model.safetensors") for each in (adapter, again))
    more = re.compile(r"base_layer\.weight|original_module|modules_to_save")
    assert one.keys() == {name for name in two if not more.search(name)}
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
