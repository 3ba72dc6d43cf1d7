"""What each policy keeps, by name and number, adapted or not; and gradients that do not change."""

import collections
import contextlib
import functools
import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.ad_checkpoint import print_saved_residuals
from safetensors.numpy import load_file

import lora_jax
from lora_jax.models import _attention, from_pretrained
from lora_jax.testing import assert_trees_close
from tests.references import checkpoints, decoders

LAYERS = {"llama": 2, "gemma3": 3, "gpt2": 2, "bert": 2}
STREAM = ("query", "key", "value", "attention")
# What a layer keeps under "named", and how many adapted matrices it has.
NAMED = {
    "llama": (*STREAM, "residual", "gate", "up"),
    "gemma3": (*STREAM, "out", "gate", "up", "down"),
    "gpt2": (*STREAM, "residual", "up"),
    "bert": (*STREAM, "out", "up", "down"),
}
MATRICES = {"llama": 7, "gemma3": 7, "gpt2": 4, "bert": 6}
FORM = pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    @functools.cache
    def directory(family):
        at = tmp_path_factory.mktemp(family)
        if family in decoders.FAMILIES:
            return decoders.checkpoint(at, family)
        if family == "bert":
            return checkpoints.checkpoint(at, family, None)
        fields = json.loads((checkpoints.HERE / family / "config.json").read_text())
        stored = load_file(checkpoints.HERE / family / "model.safetensors")
        stored.pop("lm_head.weight")
        return checkpoints.write(at, fields, stored)

    @functools.cache
    def load_from(family, **options):
        task = "feature-extraction" if family == "bert" else "causal-lm"
        return from_pretrained(directory(family), task, **options)

    return load_from


@functools.cache
def hidden_of(model):
    """The states before the head as a function of what trains, and adapters on every matrix."""
    config = lora_jax.LoraConfig(rank=2, alpha=4.0, targets=("all-linear",))
    frozen, trainable = lora_jax.split(
        model.params, config, jax.random.key(0), layouts=model.layouts
    )
    run = model.apply if model.task == "feature-extraction" else model.hidden
    lifted = lora_jax.adapt(run, on_materialize="error")
    ids = jnp.arange(12, dtype=jnp.int32).reshape(2, 6)
    source = np.random.default_rng(0)
    trainable = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.1 * source.normal(size=leaf.shape), leaf.dtype), trainable
    )
    return lambda trainable: lifted(lora_jax.combine(frozen, trainable), ids), trainable


def kept(model):
    """The values that wait for the backward pass, counted by shape and origin."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        print_saved_residuals(*hidden_of(model))
    lines = printed.getvalue().splitlines()
    return collections.Counter(line.partition(" from ")[0] for line in lines)


def names_of(found):
    """Name to number, and to number of shapes without one."""
    names = collections.Counter()
    for line, count in found.items():
        name = re.search("named '(.*)'", line)
        names[name[1] if name else "?"] += count
    return names


@pytest.mark.parametrize("family", LAYERS)
def test_named_and_attention_keep_what_they_say(load, family):
    full, named, attention = (
        kept(load(family, remat=policy)) for policy in ("full", "named", "attention")
    )
    layers = LAYERS[family]
    expected = dict.fromkeys(NAMED[family], layers) | {"low_rank": layers * MATRICES[family]}
    assert names_of(named - full) == expected
    assert names_of(attention - full) == {"attention": layers}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_scan_stacks_the_same(load, family):
    def stacked(policy):
        found = kept(load(family, remat=policy, scan_layers=True))
        return sum(n for line, n in found.items() if "output of scan" in line)

    expected = len(NAMED[family]) + MATRICES[family]
    assert stacked("named") - stacked("full") == expected
    assert stacked("attention") - stacked("full") == 1


def equations(jaxpr):
    """All of them, inner ones too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def gradient_of(model):
    fn, trainable = hidden_of(model)
    return jax.make_jaxpr(jax.grad(lambda t: jnp.sum(fn(t) ** 2)))(trainable)


def products(model):
    """How many products of a matrix the gradient has, those of attention aside."""
    dots = [e for e in equations(gradient_of(model).jaxpr) if e.primitive.name == "dot_general"]
    return sum(dot.params["dimension_numbers"][1] == ((), ()) for dot in dots)


@pytest.mark.parametrize(
    ("family", "scan_layers"),
    [*((family, False) for family in LAYERS), ("llama", True), ("gpt2", True)],
)
def test_named_computes_no_product_again(load, family, scan_layers):
    none, named, full = (
        products(load(family, remat=policy, scan_layers=scan_layers))
        for policy in ("none", "named", "full")
    )
    assert none == named < full


@pytest.mark.parametrize(("family", "scan_layers"), [("gpt2", False), ("gemma3", True)])
def test_gradients_do_not_change(load, family, scan_layers):
    def gradient(policy):
        fn, trainable = hidden_of(load(family, remat=policy, scan_layers=scan_layers))
        return jax.jit(jax.grad(lambda t: jnp.mean(fn(t) ** 2)))(trainable)

    expected = gradient("none")
    for policy in ("named", "attention"):
        # The same operations, fused differently: rounding of sums of some hundred terms.
        assert_trees_close(gradient(policy), expected, relative=1e-4)


@FORM
@pytest.mark.parametrize(
    ("policy", "runs"), [("none", 1), ("named", 1), ("attention", 1), ("full", 2), ("dots", 2)]
)
def test_a_fused_kernel_of_attention_runs_once(load, monkeypatch, policy, runs, scan_layers):
    """As traced for a GPU, of which the version of cuDNN alone would be asked here."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(_attention, "fits_cudnn", lambda *_: True)
    model = load("llama", remat=policy, scan_layers=scan_layers, compute_dtype=jnp.bfloat16)
    primitives = [eqn.primitive.name for eqn in equations(gradient_of(model).jaxpr)]
    layers = 1 if scan_layers else LAYERS["llama"]
    assert primitives.count("dot_product_attention_fwd_wrapper") == runs * layers
    assert primitives.count("dot_product_attention_bwd_wrapper") == layers
