"""A sum in chunks is the sum, value and gradient, whatever trains and wherever it runs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lora_jax
from lora_jax import training
from lora_jax.ops import quantize, sum_in_chunks
from lora_jax.testing import assert_trees_close

EXAMPLES, LENGTH, WIDTH, WORDS = 8, 24, 16, 50
LOGITS = f"{EXAMPLES},{LENGTH},{WORDS}]"


class Rows(NamedTuple):
    hidden: jax.Array
    targets: jax.Array
    weights: jax.Array


def product(params, hidden):
    return hidden @ params["head"]["kernel"]


LIFTED = lora_jax.adapt(product, on_materialize="error")


def loss(params, rows):
    """The sum of weighted cross-entropies, and of each example how many tokens were right."""
    logits = LIFTED(params, rows.hidden)
    chosen = jnp.take_along_axis(logits, rows.targets[..., None], axis=-1)[..., 0]
    losses = (jax.nn.logsumexp(logits, axis=-1) - chosen) * rows.weights
    return losses.sum(), (logits.argmax(axis=-1) == rows.targets).sum(axis=1)


def draw(dtype: Any = jnp.float32) -> tuple[dict[str, Any], Rows]:
    """A head and rows, some tokens of which count in part or not at all."""
    source = np.random.default_rng(0)
    head = {"kernel": jnp.asarray(source.normal(size=(WIDTH, WORDS)), dtype)}
    hidden = jnp.asarray(source.normal(size=(EXAMPLES, LENGTH, WIDTH)), dtype)
    targets = jnp.asarray(source.integers(WORDS, size=(EXAMPLES, LENGTH)), jnp.int32)
    weights = jnp.asarray(source.integers(3, size=(EXAMPLES, LENGTH)) / 2, dtype)
    return {"head": head}, Rows(hidden, targets, weights)


def halves(params, kind):
    """The frozen half and the trainable one, away from the start."""
    base, _, trains = kind.partition("-")
    if base == "int8":
        params = quantize(params, "int8", targets=("head",))
    if not trains:
        return params, {}
    chosen = {"targets": ("head",)} if trains == "factors" else {"targets": (), "train": ("head",)}
    config = lora_jax.LoraConfig(rank=2, alpha=4.0, **chosen)
    frozen, trainable = lora_jax.split(params, config, jax.random.key(1))
    source = np.random.default_rng(1)
    return frozen, jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.1 * source.normal(size=leaf.shape), leaf.dtype), trainable
    )


KINDS = ("plain", "plain-factors", "plain-whole", "int8", "int8-factors")


def value_and_gradient(sum_of, kind, dtype):
    """Of what trains and of what the hidden states come from, and the aux."""
    params, rows = draw(dtype)
    frozen, trainable = halves(params, kind)

    def total(trainable, hidden):
        params = lora_jax.combine(frozen, trainable)
        value, aux = sum_of(params, rows._replace(hidden=jnp.sin(hidden)))
        return value**2, aux  # so that the cotangent is no 1

    gradient = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    return jax.jit(gradient)(trainable, rows.hidden)


def chunked(chunk):
    return functools.partial(sum_in_chunks, loss, chunk=chunk)


@functools.cache
def plain_in_float64(kind):
    with jax.enable_x64(True):
        return value_and_gradient(loss, kind, jnp.float64)


def assert_plain(sum_of, kind):
    with jax.enable_x64(True):
        found = value_and_gradient(sum_of, kind, jnp.float64)
    # Sums of some hundred terms in another order, each rounded at 2**-53.
    assert_trees_close(found, plain_in_float64(kind), relative=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_the_plain_ones(kind):
    assert_plain(chunked(5), kind)


@pytest.mark.parametrize("chunk", [1, 12, 23, 24, 100])
def test_every_length_of_a_chunk_gives_the_sum(chunk):
    assert_plain(chunked(chunk), "int8-factors")


def remat(sum_of):
    return jax.checkpoint(sum_of)


def scanned(sum_of):
    """In a scan over halves of the batch, as accumulated gradients are."""

    def both(params, rows):
        def one(total, part):
            value, aux = sum_of(params, part)
            return total + value, aux

        parts = jax.tree.map(lambda row: row.reshape(2, EXAMPLES // 2, *row.shape[1:]), rows)
        total, aux = jax.lax.scan(one, jnp.zeros((), rows.hidden.dtype), parts)
        return total, aux.reshape(-1)

    return both


def vmapped(sum_of):
    def each(params, rows):
        one = jax.tree.map(lambda row: row[:, None], rows)
        totals, aux = jax.vmap(sum_of, in_axes=(None, 0))(params, one)
        return totals.sum(), aux.reshape(-1)

    return each


@pytest.mark.parametrize("within", [remat, scanned, vmapped])
@pytest.mark.parametrize("kind", ["int8-factors", "plain-whole"])
def test_inside_other_transformations(kind, within):
    assert_plain(within(chunked(5)), kind)


def text_of(sum_of, kind, *, differentiate=True):
    params, rows = draw()
    frozen, trainable = halves(params, kind)

    def total(trainable, hidden):
        return sum_of(lora_jax.combine(frozen, trainable), rows._replace(hidden=hidden))[0]

    fn = jax.grad(total, argnums=(0, 1)) if differentiate else total
    return str(jax.make_jaxpr(fn)(trainable, rows.hidden))


@pytest.mark.parametrize(
    ("kind", "products"),
    [
        ("plain", 1 + 1),
        ("plain-whole", 1 + 2),
        ("plain-factors", 3 + 5),
        ("int8", 1 + 1),
        ("int8-factors", 3 + 5),
    ],
)
def test_no_gradient_of_what_is_frozen_and_none_that_nobody_asks_for(kind, products):
    """Of each product one for the input and one for what trains, and none twice."""
    assert text_of(chunked(LENGTH), kind).count("dot_general[") == products
    forward = 3 if kind.endswith("factors") else 1
    assert text_of(chunked(5), kind, differentiate=False).count("dot_general[") == 2 * forward


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_one_chunk_exist_at_a_time(kind):
    assert LOGITS in text_of(loss, kind)
    assert LOGITS not in text_of(chunked(6), kind)


def test_memory_is_less_by_the_logits():
    words, chunk = 4096, 16
    hidden = jax.ShapeDtypeStruct((EXAMPLES, 128, WIDTH), jnp.float32)
    ids = jax.ShapeDtypeStruct((EXAMPLES, 128), jnp.int32)
    weights = jax.ShapeDtypeStruct((EXAMPLES, 128), jnp.float32)
    params = {"head": {"kernel": jax.ShapeDtypeStruct((WIDTH, words), jnp.float32)}}

    def temporary(sum_of):
        def total(hidden, params, ids, weights):
            return sum_of(params, Rows(hidden, ids, weights))[0]

        program = jax.jit(jax.grad(total)).lower(hidden, params, ids, weights).compile()
        return program.memory_analysis().temp_size_in_bytes

    logits = 4 * EXAMPLES * 128 * words
    saved = temporary(loss) - temporary(chunked(chunk))
    assert saved >= logits * (1 - chunk / 128)


def on_devices(count, kind):
    """The gradient on a mesh, compiled, and its results on the host."""
    params, rows = draw()
    frozen, trainable = halves(params, kind)
    mesh = training.make_mesh(devices=jax.devices()[:count])

    def total(trainable, rows):
        hidden = jnp.sin(rows.hidden)
        return chunked(5)(lora_jax.combine(frozen, trainable), rows._replace(hidden=hidden))

    def gradient(trainable, rows):
        differentiated = jax.value_and_grad(total, argnums=(0, 1), has_aux=True, allow_int=True)
        (value, aux), (by_trainable, by_rows) = differentiated(trainable, rows)
        return value, aux, by_trainable, by_rows.hidden

    whole, cut = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    jitted = jax.jit(gradient, in_shardings=(whole, cut))
    program = jitted.lower(trainable, rows).compile()
    arguments = jax.device_put((trainable, rows), (whole, cut))
    return program, jax.device_get(program(*arguments))


@pytest.mark.parametrize("kind", ["plain", "plain-factors", "plain-whole"])
def test_eight_devices_are_one_and_hidden_states_stay_where_they_are(kind):
    (_, one), (program, eight) = on_devices(1, kind), on_devices(8, kind)
    # Float32 sums of 8 * 24 terms in another order.
    assert_trees_close(eight, one, relative=1e-5)
    text = program.as_text()
    for moved in ("all-gather", "all-to-all", "collective-permute"):
        assert moved not in text
    # Each device has the logits of its own example, in chunks of 5 and a rest of 4.
    assert f"[1,5,{WORDS}]" in text
    assert f"[1,4,{WORDS}]" in text
    assert f"[{EXAMPLES},5,{WORDS}]" not in text
    assert program.output_shardings[-1].spec == PartitionSpec("data")


def test_gradients_of_weights_are_summed_in_float32():
    """In bfloat16 a sum of ones ends at 256."""
    weight = jnp.ones((), jnp.bfloat16)
    rows = jnp.ones((1, 1024), jnp.bfloat16)

    def fn(weight, rows):
        return (weight * rows).sum(), None

    def total(weight, rows):
        return sum_in_chunks(fn, weight, rows, chunk=1)[0]

    gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))
    value, (by_weight, by_rows) = gradient(weight, rows)
    assert (value, value.dtype) == (1024, jnp.float32)
    assert (by_weight, by_weight.dtype) == (1024, jnp.bfloat16)
    assert by_rows.dtype == jnp.bfloat16
    np.testing.assert_array_equal(by_rows, jnp.ones_like(rows))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "bool", "float32", "int32"])
def test_aux_is_summed_in_32_bits(dtype):
    """A count of 1024, which no 8 bits hold and where bfloat16 no longer counts by one."""
    rows = jnp.ones((1, 1024), dtype)

    def fn(weight, rows):
        return weight, {"ones": rows.sum(dtype=rows.dtype), "chunks": 1}

    count = jax.jit(lambda rows: sum_in_chunks(fn, jnp.float32(1), rows, chunk=1)[1])(rows)
    assert (count["ones"], count["chunks"]) == (1024, 1024)
    is_float = jnp.issubdtype(rows.dtype, jnp.floating)
    assert count["ones"].dtype == (jnp.float32 if is_float else jnp.int32)
    assert count["chunks"].dtype == jnp.int32


@pytest.mark.parametrize(
    ("kind", "chunk"), [("plain-factors", LENGTH), ("plain-whole", 5), ("int8-factors", 5)]
)
def test_the_shards_of_a_shard_map_add_up(kind, chunk):
    """Weights are alike on all devices and rows are not: JAX checks which sums are."""
    params, rows = draw()
    frozen, trainable = halves(params, kind)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def total(trainable, rows):
        return sum_in_chunks(loss, lora_jax.combine(frozen, trainable), rows, chunk=chunk)

    def of_shards(trainable, rows):
        value, right = total(trainable, rows)
        return jax.lax.psum(value, "data"), right

    cut = PartitionSpec("data")
    spec = {"in_specs": (PartitionSpec(), cut), "out_specs": (PartitionSpec(), cut)}

    def gradient(total, trainable, hidden):
        def of_hidden(trainable, hidden):
            return total(trainable, rows._replace(hidden=hidden))

        return jax.value_and_grad(of_hidden, (0, 1), has_aux=True)(trainable, hidden)

    shards = jax.shard_map(of_shards, mesh=mesh, **spec)
    found, wanted = (
        jax.jit(gradient, static_argnums=0)(f, trainable, rows.hidden) for f in (shards, total)
    )
    # Float32 sums of 8 * 24 terms in another order.
    assert_trees_close(found, wanted, relative=1e-5)


@pytest.mark.parametrize("chunk", [5, LENGTH])
def test_words_may_be_cut_over_another_axis_than_examples(chunk):
    """What the rows alone give is alike on all shards of the words there, and no sum over them."""
    params, rows = draw()
    mesh = jax.make_mesh((4, 2), ("data", "words"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def of_part(kernel, rows):
        logits = rows.hidden @ kernel
        first = jax.lax.axis_index("words") * kernel.shape[1]
        mine = rows.targets[..., None] == first + jnp.arange(kernel.shape[1])[None, None]
        normaliser = jnp.log(jax.lax.psum(jnp.exp(logits).sum(-1), "words"))
        losses = normaliser - jax.lax.psum((logits * mine).sum(-1), "words")
        return (losses * rows.weights).sum(), rows.weights.sum()

    def gradient(kernel, rows):
        def total(kernel, hidden):
            return sum_in_chunks(of_part, kernel, rows._replace(hidden=hidden), chunk=chunk)

        by, count = jax.grad(total, (0, 1), has_aux=True)(kernel, rows.hidden)
        return by, jax.lax.psum(count, "data")

    cut, words = PartitionSpec("data"), PartitionSpec(None, "words")
    shards = jax.shard_map(
        gradient, mesh=mesh, in_specs=(words, cut), out_specs=((words, cut), PartitionSpec())
    )
    kernel = params["head"]["kernel"]
    found = jax.jit(shards)(kernel, rows)

    def plain(kernel, hidden):
        return loss({"head": {"kernel": kernel}}, rows._replace(hidden=hidden))[0]

    wanted = jax.jit(jax.grad(plain, (0, 1)))(kernel, rows.hidden), rows.weights.sum()
    # Float32 sums of 8 * 24 terms in another order.
    assert_trees_close(found, wanted, relative=1e-5)


def test_aux_has_no_gradient():
    params, rows = draw()

    def fn(params, rows):
        total, _ = loss(params, rows)
        return total, total

    def aux(params, hidden):
        return sum_in_chunks(fn, params, rows._replace(hidden=hidden), chunk=5)[1]

    gradient = jax.jit(jax.grad(aux, argnums=(0, 1)))(params, rows.hidden)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, jnp.zeros_like(leaf))


@pytest.mark.parametrize(
    ("fn", "rows", "chunk", "message"),
    [
        pytest.param(loss, None, 0, "`chunk` must be a whole number above 0, got 0", id="chunk"),
        pytest.param(loss, None, 2.5, "`chunk` must be a whole number", id="fraction"),
        pytest.param(
            lambda params, rows: rows.hidden.sum(), None, 5, "and aux, got Shape", id="no-aux"
        ),
        pytest.param(
            loss, Rows(jnp.ones((1, 3, WIDTH)), jnp.ones((1, 3), int), jnp.ones((1, 4))), 1,
            "as many positions", id="positions",
        ),
        pytest.param(loss, jnp.ones(3), 1, r"arrays \(examples, positions", id="no-positions"),
        pytest.param(
            lambda params, rows: (rows.hidden.sum(axis=(0, 1)), None), None, 5,
            r"a scalar and aux, got a sum of .*16", id="no-scalar",
        ),
    ],
)  # fmt: skip
def test_refused(fn, rows, chunk, message):
    params, drawn = draw()
    with pytest.raises(ValueError, match=message):
        sum_in_chunks(fn, params, drawn if rows is None else rows, chunk=chunk)
