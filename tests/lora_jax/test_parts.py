"""Fused kernels adapted in part: what trains, what stays as it is, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import LoraConfig, LoraFactors, PartFactors
from lora_jax._paths import flatten
from lora_jax.io import checkpoints
from lora_jax.testing import assert_trees_close, assert_trees_equal

QKV = (True, False, True)
KEY = jax.random.key(0)
FIRST, SECOND, THIRD = (slice(4 * part, 4 * part + 4) for part in range(3))


def config(parts=QKV, rank=2, alpha=3, **options):
    options = {"targets": ("qkv",), "parts": {"qkv": parts}, **options}
    return LoraConfig(rank=rank, alpha=alpha, **options)


def params(*shape):
    shape = shape or (6, 12)
    return {"qkv": {"kernel": jax.random.normal(jax.random.key(1), shape), "bias": jnp.ones(3)}}


def halves(chosen=None, tree=None):
    """Both halves, with a ``b`` that is not zero."""
    frozen, trainable = lora_jax.split(tree or params(), chosen or config(), KEY)

    def shake(x):
        return x + 0.1 + jnp.sin(jnp.arange(x.size)).reshape(x.shape)

    return frozen, jax.tree.map(shake, trainable)


def apply(params, x):
    return x @ params["qkv"]["kernel"]


def test_only_the_chosen_parts_have_parameters():
    _, trainable = lora_jax.split(params(), config(), KEY)
    factors = trainable["qkv/kernel"]
    assert isinstance(factors, PartFactors)
    assert [leaf.shape for leaf in jax.tree.leaves(trainable)] == [(6, 2, 2), (2, 2, 4)]
    assert (factors.rank, factors.scale, factors.parts) == (2, 3 / 2, QKV)
    assert not factors.b.any()


def test_the_update_is_a_product_of_its_own_for_each_part():
    frozen, trainable = halves()
    a, b = (np.float64(x) for x in jax.tree.leaves(trainable))
    w = np.float64(frozen["qkv"]["kernel"])
    expected = w.copy()
    expected[:, FIRST] += 1.5 * a[:, 0] @ b[0]
    expected[:, THIRD] += 1.5 * a[:, 1] @ b[1]
    merged = lora_jax.merge(frozen, trainable)["qkv"]["kernel"]
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged[:, SECOND], frozen["qkv"]["kernel"][:, SECOND])


def test_whole_has_a_block_for_each_chosen_part():
    factors = halves()[1]["qkv/kernel"]
    whole = factors.whole()
    assert isinstance(whole, LoraFactors)
    blocks = np.zeros((4, 12), np.float32)
    blocks[:2, FIRST], blocks[2:, THIRD] = factors.b
    np.testing.assert_array_equal(whole.b, blocks)
    np.testing.assert_array_equal(whole.a, np.concatenate([factors.a[:, 0], factors.a[:, 1]], 1))
    assert (whole.rank, whole.scale, whole.layout) == (4, factors.scale, factors.layout)
    assert whole.whole() is whole


def test_every_part_draws_its_own_a_whichever_others_are_chosen():
    def drawn(*parts):
        return lora_jax.split(params(), config(parts), KEY)[1]["qkv/kernel"].a

    both, third = drawn(True, False, True), drawn(False, False, True)
    assert_trees_equal(third[:, 0], both[:, 1])
    assert (both[:, 0] != both[:, 1]).all()
    assert jnp.abs(both).max() <= 6**-0.5
    np.testing.assert_allclose(jnp.abs(both).mean(), 6**-0.5 / 2, rtol=0.5)


@pytest.mark.parametrize(
    ("shape", "layout", "a_shape", "b_shape"),
    [
        pytest.param((6, 12), "in out", (6, 2, 2), (2, 2, 4), id="plain"),
        pytest.param((12, 6), "out in", (6, 2, 2), (2, 2, 4), id="transposed"),
        pytest.param((3, 6, 12), "stack in out", (3, 6, 2, 2), (3, 2, 2, 4), id="scanned"),
        pytest.param((5, 12, 3), "in out stack", (3, 5, 2, 2), (3, 2, 2, 4), id="stacked-last"),
        pytest.param((2, 3, 12), "in in out", (2, 3, 2, 2), (2, 2, 4), id="two-in-axes"),
    ],
)
def test_any_layout_with_one_out_axis(shape, layout, a_shape, b_shape):
    chosen = config(layouts={"qkv/kernel": layout})
    frozen, trainable = halves(chosen, params(*shape))
    a, b = jax.tree.leaves(trainable)
    assert (a.shape, b.shape) == (a_shape, b_shape)
    merged = lora_jax.merge(frozen, trainable)["qkv"]["kernel"]
    moved = np.asarray(merged != frozen["qkv"]["kernel"])
    along_out = moved.all(axis=tuple(i for i, axis in enumerate(layout.split()) if axis != "out"))
    assert along_out.tolist() == 4 * [True] + 4 * [False] + 4 * [True]
    assert moved.sum() == 2 / 3 * moved.size
    assert lora_jax.summary(params(*shape), chosen).trained == a.size + b.size


def test_one_tree_that_trains_keeps_the_other_parts():
    """In a combined tree the leaves are the small factors too, so nothing outside them moves."""
    frozen, trainable = halves()
    tree = lora_jax.combine(frozen, trainable)
    marked, _ = flatten(lora_jax.mask(tree))
    assert {path for path, train in marked.items() if train} == {
        "qkv/kernel/factors/a",
        "qkv/kernel/factors/b",
    }
    tx = lora_jax.masked(optax.sgd(0.1), tree)
    forward = lora_jax.adapt(apply, on_materialize="error")
    x = jnp.ones((5, 6))
    gradient = jax.grad(lambda tree: (forward(tree, x) ** 2).sum())(tree)
    stepped = optax.apply_updates(tree, tx.update(gradient, tx.init(tree), tree)[0])
    moved = np.asarray(forward(stepped, x) != forward(tree, x))
    assert moved.all(axis=0).tolist() == 4 * [True] + 4 * [False] + 4 * [True]
    assert not moved[:, SECOND].any()


def test_dropout_is_one_mask_for_all_parts():
    frozen, trainable = halves(config((True, True), dropout=0.5), params(6, 12))
    factors = trainable["qkv/kernel"]
    same = {"qkv/kernel": jax.tree.map(jnp.ones_like, factors)}
    zero = jax.tree.map(jnp.zeros_like, frozen)
    forward = lora_jax.adapt(apply, on_materialize="error")
    on = forward(lora_jax.combine(zero, same, dropout_key=KEY), jnp.ones((8, 6)))
    off = forward(lora_jax.combine(zero, same), jnp.ones((8, 6)))
    np.testing.assert_array_equal(on[:, :6], on[:, 6:])
    assert (on != off).any()


def test_jit_vmap_and_shapes_take_part_factors():
    frozen, trainable = halves()
    x = jax.random.normal(jax.random.key(3), (5, 6))
    forward = lora_jax.adapt(apply, on_materialize="error")

    def outputs(trainable):
        return forward(lora_jax.combine(frozen, trainable), x)

    merged = apply(lora_jax.merge(frozen, trainable), x)
    assert_trees_close(jax.jit(outputs)(trainable), merged, relative=1e-5)
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), trainable)
    assert_trees_close(jax.vmap(outputs)(many)[0], merged, relative=1e-5)
    shapes = jax.eval_shape(lambda p: lora_jax.split(p, config(), KEY), params())
    assert jax.tree.structure(shapes) == jax.tree.structure((frozen, trainable))
    lora_jax.combine(*shapes)


@pytest.mark.parametrize(
    "leaf",
    [
        pytest.param(jax.sharding.PartitionSpec(), id="specs"),
        pytest.param(None, id="nothing"),
    ],
)
def test_halves_that_hold_no_arrays_combine(leaf):
    frozen, trainable = halves()
    marked = jax.tree.map(lambda _: leaf, trainable)
    assert lora_jax.combine(frozen, marked)["qkv"]["kernel"].factors.a is leaf


def test_a_checkpoint_gives_them_back(tmp_path):
    _, trainable = halves()
    with checkpoints.open_checkpoints(tmp_path) as opened:
        checkpoints.save(opened, 1, trainable)
        restored = checkpoints.restore(opened, jax.tree.map(jnp.zeros_like, trainable))
    assert_trees_equal(restored.state, trainable)


def test_arrays_on_the_host_merge_alike():
    frozen, trainable = halves()
    on_host = jax.device_get(trainable)
    assert isinstance(on_host["qkv/kernel"].a, np.ndarray)
    assert_trees_equal(lora_jax.merge(frozen, on_host), lora_jax.merge(frozen, trainable))


def test_float64_weights_have_float64_factors():
    with jax.enable_x64(True):
        tree = {"qkv": {"kernel": jnp.ones((6, 12), jnp.float64)}}
        _, trainable = lora_jax.split(tree, config(), KEY)
        assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {np.dtype("float64")}


def test_patterns_and_rslora_count_the_rank_of_one_part():
    chosen = config(rank_pattern={"qkv": 4}, alpha_pattern={"qkv": 6}, use_rslora=True)
    factors = lora_jax.split(params(), chosen, KEY)[1]["qkv/kernel"]
    assert (factors.rank, factors.scale) == (4, 6 / 4**0.5)


REFUSED = {
    "a key that matches no adapted weight": (
        config(targets=("other",)),
        {**params(), "other": jnp.ones((3, 3))},
        "`parts` key 'qkv' matches none of the 1 adapted weights. The nearest is 'other'",
    ),
    "parts that do not divide": (
        config((True,) * 5),
        params(),
        "The out axis of 'qkv/kernel' has size 12, which does not divide into the 5 equal parts",
    ),
    "two out axes": (
        config(layouts={"qkv/kernel": "in out out"}),
        params(6, 3, 4),
        r"'qkv/kernel' has 2 out axes \(its axes are in out out\), and `parts` are counted along",
    ),
    "a rank above the size of a part": (
        config(rank=5),
        params(),
        "'qkv/kernel' is 3 parts, each a 6 by 4 matrix, so its rank can be at most 4, got 5",
    ),
}


@pytest.mark.parametrize(("chosen", "tree", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_split_refuses(chosen, tree, message):
    with pytest.raises(ValueError, match=message):
        lora_jax.split(tree, chosen, KEY)
    with pytest.raises(ValueError, match=message):
        lora_jax.summary(tree, chosen)


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param((), id="none"),
        pytest.param((False, False), id="all-false"),
        pytest.param((True, 1), id="a-number"),
        pytest.param("TFT", id="text"),
        pytest.param(True, id="no-tuple"),
    ],
)
def test_a_config_refuses_parts_that_are_not_flags(parts):
    with pytest.raises(ValueError, match="`parts` of 'qkv' must be True or False for each part"):
        config(parts)


def test_a_list_of_parts_is_a_tuple():
    assert config([True, False]).parts == {"qkv": (True, False)}


@pytest.mark.parametrize("shape", [(6, 13), (6, 8), (5, 12)])
def test_factors_of_a_weight_of_another_shape_are_refused(shape):
    _, trainable = halves()
    with pytest.raises(ValueError, match=r"'qkv/kernel' has shape .* Combine two halves of one"):
        lora_jax.combine(params(*shape), trainable)
