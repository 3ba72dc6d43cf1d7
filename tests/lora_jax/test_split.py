"""`split`, `combine`, `mask` and `masked`: what trains, what stays, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn, nnx

import lora_jax
from lora_jax import LoraConfig, LoraFactors
from lora_jax.testing import assert_trees_equal

PARAMS = {
    "embed": {"embedding": jnp.ones((11, 8))},
    "layers": [
        {
            "attention": {
                "query": {"kernel": jnp.ones((8, 8)), "bias": jnp.zeros(8)},
                "value": {"kernel": jnp.ones((8, 6), jnp.bfloat16)},
                "out": {"kernel": jnp.ones((2, 3, 8))},
            },
            "norm": {"scale": jnp.ones(8)},
        }
        for _ in range(2)
    ],
    "lm_head": {"kernel": jnp.ones((8, 11))},
    "steps": jnp.array([[1, 2], [3, 4]]),
}
KEY = jax.random.key(0)


def config(*targets, rank=2, **options):
    return LoraConfig(rank=rank, alpha=4, targets=targets, **options)


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        pytest.param(
            ["query"], ["layers/0/attention/query", "layers/1/attention/query"], id="name"
        ),
        pytest.param(["layers/1/.*query"], ["layers/1/attention/query"], id="whole-path"),
        pytest.param(
            ["attention/query/kernel"],
            ["layers/0/attention/query", "layers/1/attention/query"],
            id="run",
        ),
        pytest.param(
            ["0/attention/(query|value)"],
            ["layers/0/attention/query", "layers/0/attention/value"],
            id="alternatives",
        ),
        pytest.param(["embed"], ["embed"], id="embedding"),
        pytest.param(
            ["0/.*query", "lm_head"], ["layers/0/attention/query", "lm_head"], id="two-targets"
        ),
    ],
)
def test_targets_match_a_path_or_a_run_of_its_last_segments(targets, adapted):
    _, trainable = lora_jax.split(PARAMS, config(*targets), KEY)
    found = [path.removesuffix("/kernel").removesuffix("/embedding") for path in trainable]
    assert found == adapted


def test_a_string_is_one_target():
    assert config("query").targets == LoraConfig(rank=2, alpha=4, targets="query").targets


def test_all_linear_leaves_out_embeddings_head_norms_and_integers():
    _, trainable = lora_jax.split(PARAMS, config("all-linear", layouts={"out": "in in out"}), KEY)
    names = {path.split("/")[-2] for path in trainable}
    assert (names, len(trainable)) == ({"query", "value", "out"}, 6)


def test_the_frozen_half_is_the_original_and_nothing_is_copied():
    frozen, trainable = lora_jax.split(PARAMS, config("query", train=("norm/scale",)), KEY)
    assert (
        frozen["layers"][0]["attention"]["query"]["kernel"]
        is (PARAMS["layers"][0]["attention"]["query"]["kernel"])
    )
    assert frozen["layers"][0]["norm"]["scale"] is None
    assert trainable["layers/0/norm/scale"] is PARAMS["layers"][0]["norm"]["scale"]
    leaves = jax.tree.leaves(trainable)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    assert len(leaves) == 2 * 2 + 2


def test_factors_of_a_bf16_weight_are_float32_and_their_shapes_follow_the_layout():
    layouts = {"layers/0/attention/out/kernel": ("in", "in", "out")}
    _, trainable = lora_jax.split(PARAMS, config("value", "0/.*out"), KEY, layouts=layouts)
    value, out = (
        trainable["layers/0/attention/value/kernel"],
        trainable["layers/0/attention/out/kernel"],
    )
    assert (value.a.dtype, value.b.dtype) == (jnp.float32, jnp.float32)
    assert (value.a.shape, value.b.shape) == ((8, 2), (2, 6))
    assert (out.a.shape, out.b.shape) == ((2, 3, 2), (2, 8))
    assert not value.b.any()
    assert jnp.abs(value.a).max() <= 8**-0.5
    np.testing.assert_allclose(jnp.abs(value.a).mean(), 8**-0.5 / 2, rtol=0.5)


def test_rank_alpha_and_scale_by_pattern():
    chosen = config(
        "query", "value", rank=2, rank_pattern={"0/.*query": 4}, alpha_pattern={"1/.*": 6}
    )
    _, trainable = lora_jax.split(PARAMS, chosen, KEY)
    found = {
        (path.split("/")[1], path.split("/")[3]): (factors.rank, factors.scale)
        for path, factors in trainable.items()
    }
    assert found == {
        ("0", "query"): (4, 1.0),
        ("0", "value"): (2, 2.0),
        ("1", "query"): (2, 3.0),
        ("1", "value"): (2, 3.0),
    }


def test_rslora_scales_by_the_root_of_the_rank():
    _, trainable = lora_jax.split(PARAMS, config("0/.*query", rank=4, use_rslora=True), KEY)
    assert trainable["layers/0/attention/query/kernel"].scale == 4 / 4**0.5


def test_factors_differ_and_depend_on_the_path_alone():
    _, both = lora_jax.split(PARAMS, config("query"), KEY)
    first, second = both.values()
    assert (first.a != second.a).any()
    reordered = dict(reversed(PARAMS.items()))
    _, alone = lora_jax.split(reordered, config("layers/1/.*query", "lm_head"), KEY)
    assert_trees_equal(alone["layers/1/attention/query/kernel"], second)


def test_a_variables_dict_and_its_parameters_spell_paths_alike():
    variables = {"params": PARAMS, "batch_stats": {"mean": jnp.zeros(3)}}
    assert list(lora_jax.split(variables, config("query"), KEY)[1]) == list(
        lora_jax.split(PARAMS, config("query"), KEY)[1]
    )


def test_nnx_states_split_and_combine():
    _graph, state = nnx.split(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), nnx.Param)
    frozen, trainable = lora_jax.split(state, config("kernel", train=("bias",)), KEY)
    assert list(trainable) == ["bias", "kernel"]
    assert isinstance(trainable["kernel"], LoraFactors)
    assert_trees_equal(lora_jax.merge(frozen, trainable), state)


def test_split_runs_under_jit_and_on_shapes():
    chosen = config("query")
    eager = lora_jax.split(PARAMS, chosen, KEY)[1]
    jitted = jax.jit(lambda p, k: lora_jax.split(p, chosen, k)[1])(PARAMS, KEY)
    assert_trees_equal(jitted, eager)
    shapes = jax.eval_shape(lambda p, k: lora_jax.split(p, chosen, k)[1], PARAMS, KEY)
    assert jax.tree.structure(shapes) == jax.tree.structure(eager)


REFUSED = {
    "a target that matches nothing": (
        config("qeury"),
        "Target 'qeury' matches none of the 13 weights. "
        "The nearest is 'layers/0/attention/query/kernel'",
    ),
    "part of a name": (config("uery"), "Target 'uery' matches none"),
    "an exclude that matches nothing": (
        config("query", exclude=("layers/7/.*",)),
        "`exclude` pattern 'layers/7/.*' matches none",
    ),
    "a train pattern that matches nothing": (
        config("query", train=("norm/bias",)),
        "`train` pattern 'norm/bias' matches none of .* nearest is .*'layers/./norm/scale'",
    ),
    "a weight of one axis": (
        config("norm/scale"),
        r"'layers/0/norm/scale' of shape \(8,\) cannot be adapted.*`train`",
    ),
    "integers": (config("steps"), "'steps' holds int32 and cannot be adapted.*`exclude`"),
    "integers in full": (
        config("query", train=("steps",)),
        "'steps' holds int32 and cannot be trained.*narrower",
    ),
    "a rank above the smaller side": (
        config("value", rank=7),
        "'layers/0/attention/value/kernel' is a 8 by 6 matrix, so its rank can be at most 6, got 7",
    ),
    "a rank pattern that matches no adapted weight": (
        config("query", rank_pattern={"value": 1}),
        "`rank_pattern` key 'value' matches none of the 2 adapted weights. The nearest is 'layers",
    ),
    "an alpha pattern that matches no adapted weight": (
        config("query", alpha_pattern={"nothing": 1}),
        "`alpha_pattern` key 'nothing' matches none of the 2 adapted weights",
    ),
    "three axes of unknown layout": (
        config("out"),
        r"'layers/0/attention/out/kernel' of shape \(2, 3, 8\) has 3 axes"
        r".*lora_jax.layouts.*'stack in out'",
    ),
    "a layout of the wrong length": (
        config("out", layouts={"out": "in out"}),
        "has 3 axes, but its layout 'in out' names 2",
    ),
    "a layout key that matches nothing": (
        config("query", layouts={"qkv": "in out"}),
        "`layouts` key 'qkv' matches none",
    ),
    "adapted and trained in full": (
        config("query", train=("query/kernel",)),
        "is both a target and trained in full. Name it in `exclude`",
    ),
    "everything excluded": (
        config("query", exclude=("query",)),
        r"`exclude` \('query',\) leaves none of the 2 weights that the targets .* match",
    ),
}


@pytest.mark.parametrize(("chosen", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_split_refuses(chosen, message):
    with pytest.raises(ValueError, match=message):
        lora_jax.split(PARAMS, chosen, KEY)
    with pytest.raises(ValueError, match=message):
        lora_jax.summary(PARAMS, chosen)


def test_split_refuses_a_tree_that_is_adapted():
    frozen, trainable = lora_jax.split(PARAMS, config("query"), KEY)
    with pytest.raises(ValueError, match="'layers/0/attention/query/kernel' is adapted already"):
        lora_jax.split(lora_jax.combine(frozen, trainable), config("query"), KEY)


def test_split_refuses_two_weights_of_one_path():
    with pytest.raises(ValueError, match="Two weights share the path 'a/w'"):
        lora_jax.split({"a": {"w": jnp.ones((2, 2))}, "a/w": jnp.ones((2, 2))}, config("w"), KEY)


def test_a_layout_without_an_in_axis_is_refused():
    layouts = {"layers/0/attention/query/kernel": ("out", "out")}
    with pytest.raises(ValueError, match="never multiplies its input by it"):
        lora_jax.split(PARAMS, config("0/.*query"), KEY, layouts=layouts)


# --- combine -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda frozen, trainable: (frozen, {"layers/0/qeury/kernel": trainable["a/kernel"]}),
            "'layers/0/qeury/kernel' trains, but the frozen tree has no such weight. The nearest",
            id="no-such-weight",
        ),
        pytest.param(
            lambda frozen, trainable: ({"a": {"kernel": None}, "b": None}, trainable),
            "'a/kernel' is missing from the frozen tree",
            id="missing-frozen-weight",
        ),
        pytest.param(
            lambda frozen, trainable: ({**frozen, "b": jnp.ones(3)}, trainable),
            "'b' is present in the frozen tree",
            id="trained-in-full-but-frozen",
        ),
    ],
)
def test_halves_that_do_not_belong_together_are_refused(change, message):
    params = {"a": {"kernel": jnp.ones((3, 3))}, "b": jnp.ones(3)}
    halves = lora_jax.split(params, config("a", rank=1, train=("b",)), KEY)
    frozen, trainable = change(*halves)
    with pytest.raises(ValueError, match=message):
        lora_jax.combine(frozen, trainable)
    with pytest.raises(ValueError, match=message):
        lora_jax.merge(frozen, trainable)


# --- one tree: mask and masked -------------------------------------------------------------------


def one_tree():
    model = nn.Sequential([nn.Dense(16), nn.relu, nn.Dense(4)])
    x = jax.random.normal(jax.random.key(1), (5, 8))
    params = model.init(jax.random.key(0), x)["params"]
    chosen = LoraConfig(rank=2, alpha=4, targets=("layers_0",), train=("layers_2/bias",))
    tree = lora_jax.combine(*lora_jax.split(params, chosen, KEY))
    apply = lora_jax.adapt(model.apply, on_materialize="error")
    return tree, lambda tree: ((apply({"params": tree}, x) - 1) ** 2).sum()


def test_mask_is_true_at_what_trains():
    tree, _ = one_tree()
    marked, _ = lora_jax._paths.flatten(lora_jax.mask(tree))
    assert {path for path, train in marked.items() if train} == {
        "layers_0/kernel/factors/a",
        "layers_0/kernel/factors/b",
        "layers_2/bias/w",
    }
    assert jax.tree.structure(lora_jax.mask(tree)) == jax.tree.structure(tree)


def test_masked_neither_updates_nor_allocates_for_what_is_frozen():
    tree, loss = one_tree()
    tx = lora_jax.masked(optax.adamw(0.1, weight_decay=0.5), tree)
    state = tx.init(tree)
    assert sorted(leaf.size for leaf in jax.tree.leaves(state)) == [1, 4, 4, 16, 16, 32, 32]

    @jax.jit
    def step(tree, state):
        updates, state = tx.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    stepped = tree
    for _ in range(3):
        stepped, state = step(stepped, state)
    marked = jax.tree.leaves(lora_jax.mask(tree))
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), stepped, tree)
    assert jax.tree.leaves(moved) == marked
    assert loss(stepped) < loss(tree)
