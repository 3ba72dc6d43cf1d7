"""from_pretrained(quantize=...): the codes of the plain weights, without ever holding those."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import DequantizedMergeWarning, LoraConfig, combine, merge, split
from lora_jax._paths import flatten
from lora_jax._quantized import is_quantized
from lora_jax.models import _weights, from_pretrained, save_merged, save_pretrained
from lora_jax.ops.quantized import SCHEMES, dequantize, quantize
from lora_jax.testing import assert_trees_close, assert_trees_equal
from tests.references import checkpoints, decoders
from tests.references.checkpoints import checkpoint

LM, CLASSES = "causal-lm", "sequence-classification"
SCAN = pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
EACH = pytest.mark.parametrize("scheme", list(SCHEMES))


def assert_same_codes(one, two):
    """Same structure, layouts included, and the same bits."""
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def codes_in(params):
    return {path: leaf for path, leaf in flatten(params)[0].items() if is_quantized(leaf)}


def source(directory, family):
    """A tiny decoder on disk: a directory, or a GGUF file."""
    if family == "gguf":
        pytest.importorskip("gguf", reason="The gguf package is not installed")
        from tests.lora_jax.io import gguf_files

        return gguf_files.llama(directory / "tiny.gguf", encoding="Q8_0")
    untied = {"tie_word_embeddings": False} if family == "gpt2" else {}  # as its reference is
    return decoders.checkpoint(directory / family, family, **untied)


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", jnp.float32),
        ("llama", jnp.bfloat16),
        ("gemma3", jnp.bfloat16),
        ("gpt2", jnp.float32),
        ("gguf", jnp.bfloat16),
    ],
)
@SCAN
@EACH
def test_the_codes_are_those_of_the_plain_weights(tmp_path, family, dtype, scan_layers, scheme):
    where = source(tmp_path, family)
    options = {"task": LM, "dtype": dtype, "scan_layers": scan_layers}
    plain = from_pretrained(where, **options)
    model = from_pretrained(where, **options, quantize=scheme)
    assert_same_codes(model.params, quantize(plain.params, scheme, layouts=plain.layouts))
    assert (model.quantize, plain.quantize) == (scheme, None)
    kinds = {path.split("/")[-2] for path in codes_in(model.params)}
    llama = {"query", "key", "value", "out", "gate", "up", "down"}
    assert kinds == ({"qkv", "out", "up", "down"} if family == "gpt2" else llama)


@EACH
def test_scanned_codes_are_the_unrolled_ones_stacked(tmp_path, scheme):
    where = decoders.checkpoint(tmp_path, "qwen3")
    unrolled, scanned = (
        codes_in(from_pretrained(where, LM, scan_layers=scan, quantize=scheme).params)
        for scan in (False, True)
    )
    assert len(unrolled) == 2 * len(scanned) == 14
    for path, stacked in scanned.items():
        for layer in range(2):
            one = unrolled[path.replace("layers/", f"layers/{layer}/")]
            jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(one),
                         [leaf[layer] for leaf in jax.tree.leaves(stacked)])  # fmt: skip


@SCAN
@EACH
def test_abstract_codes_have_the_shapes_of_real_ones(tmp_path, scan_layers, scheme):
    where = decoders.checkpoint(tmp_path, "llama")
    options = {"task": LM, "scan_layers": scan_layers, "quantize": scheme, "dtype": jnp.bfloat16}
    whole = from_pretrained(where, **options)
    (where / "model.safetensors").unlink()
    model = from_pretrained(where, abstract=True, **options)
    assert jax.eval_shape(lambda: whole.params) == model.params
    assert codes_in(model.params)
    logits = jax.eval_shape(model.apply, model.params, jnp.zeros((2, 5), jnp.int32))
    assert (logits.shape, logits.dtype) == ((2, 5, 99), jnp.float32)


def test_a_head_stays_plain_and_so_does_all_that_is_drawn(tmp_path):
    where = checkpoint(tmp_path / "whole", "bert", CLASSES)
    assert "pooler/kernel" in codes_in(from_pretrained(where, quantize="nf4").params)
    stored = {k: v for k, v in checkpoints.tensors("bert", None).items() if "pooler" not in k}
    bare = checkpoints.write(tmp_path / "bare", checkpoints.config_json("bert", None), stored)
    model = from_pretrained(bare, new_head=True, quantize="nf4")
    assert {"pooler/kernel", "classifier/kernel"} < set(model.new)
    assert {path.split("/")[0] for path in codes_in(model.params)} == {"encoder"}
    shapes = from_pretrained(bare, new_head=True, quantize="nf4", abstract=True)
    assert jax.eval_shape(lambda: model.params) == shapes.params


SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "head_dim": 32}


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A decoder whose weights are nearly all in the matrices of its layers."""
    shapes = decoders.checkpoint(tmp_path_factory.mktemp("shapes"), "llama", **SIZES)
    (shapes / "model.safetensors").unlink()
    model = from_pretrained(shapes, LM, abstract=True, dtype=jnp.bfloat16)
    draws = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: jnp.asarray(draws.standard_normal(shape.shape), shape.dtype), model.params
    )
    return save_pretrained(tmp_path_factory.mktemp("models") / "larger", model, params)


@SCAN
@EACH
def test_the_device_never_holds_more_than_codes_and_one_tensor(
    larger, monkeypatch, scan_layers, scheme
):
    """Sampled while a tensor and its codes are both there, which is when most is held."""
    before = {id(array) for array in jax.live_arrays()}
    encode, sampled, largest = _weights.quantize_weight, [], 0

    def held():
        return sum(array.nbytes for array in jax.live_arrays() if id(array) not in before)

    def quantize_weight(weight, layout, scheme):
        nonlocal largest
        largest = max(largest, weight.nbytes)
        sampled.append(held())
        codes = jax.block_until_ready(encode(weight, layout, scheme))
        sampled.append(held())
        return codes

    monkeypatch.setattr(_weights, "quantize_weight", quantize_weight)
    options = {"dtype": jnp.bfloat16, "scan_layers": scan_layers, "quantize": scheme}
    model = from_pretrained(larger, LM, **options)
    monkeypatch.undo()
    quantized = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    plain = 2 * sum(leaf.size for leaf in flatten(model.params)[0].values())
    assert len(sampled) == 2 * 7 * SIZES["num_hidden_layers"]
    assert largest == 2 * 128 * 512
    print(
        f"{scheme}: {max(sampled):,} bytes at the peak, {quantized:,} at the end, {plain:,} plain"
    )
    assert max(sampled) <= quantized + largest
    assert quantized + largest < {"nf4": 0.4, "int8": 0.7, "fp8": 0.7}[scheme] * plain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@EACH
def test_codes_are_computed_in_twice_the_float32_size_of_a_tensor(scheme, dtype):
    """XLA's own count for a CPU, in which all that is not an input or an output is temporary."""
    shape = jax.ShapeDtypeStruct((256, 1024), dtype)
    encode = jax.jit(lambda weight: _weights.quantize_weight(weight, ("in", "out"), scheme))
    temporary = encode.lower(shape).compile().memory_analysis().temp_size_in_bytes
    assert temporary <= 2.1 * 4 * shape.size


@pytest.mark.parametrize(
    ("scheme", "scan_layers"), [("nf4", True), ("nf4", False), ("int8", False), ("fp8", True)]
)
def test_apply_takes_codes_and_adapted_codes_as_they_are(tmp_path, scheme, scan_layers):
    model = from_pretrained(
        decoders.checkpoint(tmp_path, "llama"), LM, scan_layers=scan_layers, quantize=scheme
    )
    ids = jnp.arange(12).reshape(2, 6)
    apply = jax.jit(model.apply)
    plain = dequantize(model.params)
    # Float32 in another order: sums of up to 48 terms, in 2 layers.
    assert_trees_close(apply(model.params, ids), apply(plain, ids), relative=1e-5)
    config = LoraConfig(rank=2, alpha=4, targets=("all-linear",))
    frozen, trainable = split(model.params, config, jax.random.key(0), layouts=model.layouts)
    trainable = jax.tree.map(lambda leaf: leaf + 0.05, trainable)
    adapted = apply(combine(frozen, trainable), ids)
    with pytest.warns(DequantizedMergeWarning):
        merged = merge(frozen, trainable)
    assert_trees_close(adapted, apply(merged, ids), relative=1e-5)
    assert float(jnp.abs(adapted - apply(model.params, ids)).max()) > 0.1


@pytest.mark.parametrize("scheme", ["nf5", "NF4", "", 4])
@pytest.mark.parametrize("abstract", [False, True])
def test_an_unknown_scheme_names_the_known_ones(tmp_path, scheme, abstract):
    where = decoders.checkpoint(tmp_path, "llama")
    with pytest.raises(ValueError, match=f"one of nf4, int8, fp8, got {scheme!r}"):
        from_pretrained(where, LM, quantize=scheme, abstract=abstract)


def test_what_is_excluded_stays_plain(tmp_path):
    where = decoders.checkpoint(tmp_path, "llama")
    some = from_pretrained(where, LM, quantize="nf4", quantize_exclude="up").params
    plain, codes = (
        from_pretrained(where, LM).params,
        from_pretrained(where, LM, quantize="nf4").params,
    )
    for index, layer in some["layers"].items():
        assert_trees_equal(layer["mlp"]["up"], plain["layers"][index]["mlp"]["up"])
        assert_same_codes(layer["attention"], codes["layers"][index]["attention"])


@pytest.mark.parametrize(
    ("quantize", "exclude", "message"),
    [
        ("nf4", "typo", "`quantize_exclude` pattern 'typo' matches none"),
        ("nf4", (".*",), "`quantize_exclude` .* leaves none"),
        (None, "up", "'up' is given without `quantize`"),
    ],
)
def test_wrong_exclusions(tmp_path, quantize, exclude, message):
    where = decoders.checkpoint(tmp_path, "llama")
    with pytest.raises(ValueError, match=message):
        from_pretrained(where, LM, quantize=quantize, quantize_exclude=exclude)


def test_a_quantised_checkpoint_is_still_refused(tmp_path):
    where = decoders.checkpoint(tmp_path, "llama", quantization_config={"load_in_4bit": True})
    with pytest.raises(ValueError, match="`quantization_config`"):
        from_pretrained(where, LM, quantize="nf4")


def test_codes_are_not_written_as_a_model(tmp_path):
    model = from_pretrained(decoders.checkpoint(tmp_path / "a", "llama"), LM, quantize="nf4")
    with pytest.raises(ValueError, match=r"(?s)quantised: .*query.*lora_jax.dequantize gives"):
        save_pretrained(tmp_path / "b", model, model.params)
    assert not (tmp_path / "b").exists()
    save_pretrained(tmp_path / "b", model, dequantize(model.params))
    assert_trees_equal(from_pretrained(tmp_path / "b", LM).params, dequantize(model.params))


def test_a_quantised_base_is_merged_into_its_original_or_says_that_it_is_not(tmp_path):
    where = decoders.checkpoint(tmp_path / "a", "llama")
    plain, model = from_pretrained(where, LM), from_pretrained(where, LM, quantize="nf4")
    config = LoraConfig(rank=2, alpha=4, targets=("query",))
    frozen, trainable = split(model.params, config, jax.random.key(0))
    trainable = jax.tree.map(lambda leaf: leaf + 0.1, trainable)
    save_merged(tmp_path / "original", model, frozen, trainable, base=plain.params)
    original = merge(split(plain.params, config, jax.random.key(0))[0], trainable)
    assert_trees_equal(from_pretrained(tmp_path / "original", LM).params, original)
    with pytest.warns(DequantizedMergeWarning, match="14 weights are quantised") as caught:
        save_merged(tmp_path / "rounded", model, frozen, trainable)
    assert caught[0].filename == __file__
    halves = split(dequantize(model.params), config, jax.random.key(0))[0], trainable
    assert_trees_equal(from_pretrained(tmp_path / "rounded", LM).params, merge(*halves))
    fields = json.loads((tmp_path / "rounded" / "config.json").read_text())
    assert "quantization_config" not in fields


def test_an_adapter_is_loaded_onto_codes(tmp_path):
    where = decoders.checkpoint(tmp_path / "base", "llama")
    plain = from_pretrained(where, LM)
    config = LoraConfig(rank=2, alpha=4, targets=("query", "down"))
    _, trainable = split(plain.params, config, jax.random.key(0))
    trainable = jax.tree.map(lambda leaf: leaf + 0.1, trainable)
    lora_jax.save_adapter(tmp_path / "adapter", trainable, config, plain)
    model = from_pretrained(where, LM, quantize="nf4")
    frozen, loaded, _ = lora_jax.load_adapter(tmp_path / "adapter", model)
    assert_same_codes(frozen, model.params)
    assert_trees_equal(loaded, trainable)
