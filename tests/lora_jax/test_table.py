"""Rows that are looked up in the parts of a table are those of the table, and the table stays."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

import lora_jax
from lora_jax import training
from lora_jax._table import TableWeight, look_up_parts

WORDS, WIDTH, BATCH, LENGTH = 96, 16, 8, 5
LAYOUT = ("in", "out")
MESHES = {"fsdp": {"fsdp": 8}, "both": {"data": 2, "fsdp": 4}}


def table() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (WORDS, WIDTH))


def ids(*shape: int) -> jax.Array:
    """Some from behind, and some that are not there."""
    return jax.random.randint(jax.random.key(1), shape, -WORDS - 8, WORDS + 8)


def over(axes: dict[str, int], fn: Any) -> Any:
    """``fn`` of a table that is cut, and of ids cut as a batch is, as one program."""
    mesh = training.make_mesh(**axes)
    place, rows = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P(("data", "fsdp")))

    def held(part: jax.Array, ids: jax.Array) -> Any:
        whole = jax.lax.with_sharding_constraint(part, NamedSharding(mesh, P()))
        leaf = look_up_parts(part, whole, place, "fsdp", LAYOUT)
        assert isinstance(leaf, TableWeight)
        return lora_jax.adapt(fn, on_materialize="error")({"table": leaf}, ids)

    return jax.jit(held, in_shardings=(place, rows))


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("mode", ["fill", "clip", "wrap"])
@pytest.mark.parametrize("shape", [(BATCH, LENGTH), (BATCH, 2, 3)], ids=str)
def test_rows_are_those_of_the_table(axes, mode, shape):
    def look_up(params: Any, ids: jax.Array) -> jax.Array:
        return jnp.take(params["table"].astype(jnp.bfloat16), ids, axis=0, mode=mode)

    where = ids(*shape)
    compiled = over(axes, look_up).lower(table(), where).compile()
    np.testing.assert_array_equal(
        np.asarray(compiled(table(), where), np.float32),
        np.asarray(look_up({"table": table()}, where), np.float32),
    )
    text = compiled.as_text()
    assert f"[{WORDS},{WIDTH}]" not in text  # on no device is it whole
    assert " all-to-all(" in text


def test_a_head_that_is_tied_reads_the_whole_table():
    def both_ends(params: Any, ids: jax.Array) -> jax.Array:
        return jnp.sin(params["table"][ids]) @ params["table"].T

    where = ids(BATCH, LENGTH)
    compiled = over(MESHES["fsdp"], both_ends).lower(table(), where).compile()
    wanted = both_ends({"table": table()}, where)
    np.testing.assert_allclose(compiled(table(), where), wanted, rtol=1e-5, atol=1e-5)
    assert f"[{WORDS},{WIDTH}]" in compiled.as_text()


@pytest.mark.parametrize(
    "shape",
    [(LENGTH,), (BATCH,), (BATCH + 4, LENGTH), (BATCH * 8, WORDS)],
    ids=["positions", "one-a-row", "not-of-this-mesh", "more-than-the-table-has"],
)
def test_other_lookups_take_the_whole_table(shape):
    def look_up(params: Any, ids: jax.Array) -> jax.Array:
        return params["table"][ids]

    mesh = training.make_mesh(fsdp=8)
    place = NamedSharding(mesh, P(None, "fsdp"))

    def held(part: jax.Array, ids: jax.Array) -> Any:
        leaf = look_up_parts(part, part, place, "fsdp", LAYOUT)
        return lora_jax.adapt(look_up, on_materialize="error")({"table": leaf}, ids)

    where = ids(*shape)
    compiled = jax.jit(held).lower(jax.device_put(table(), place), where).compile()
    assert " all-to-all(" not in compiled.as_text()
    found = compiled(jax.device_put(table(), place), where)
    np.testing.assert_array_equal(found, look_up({"table": table()}, where))


@pytest.mark.parametrize(
    ("axes", "spec"),
    [({"fsdp": 8}, P("fsdp")), ({"fsdp": 4, "tensor": 2}, P("tensor", "fsdp")), ({"data": 8}, P())],
)
def test_a_table_that_is_cut_otherwise_is_gathered(axes, spec):
    place = NamedSharding(training.make_mesh(**axes), spec)
    found = look_up_parts(part=table(), gathered=table(), place=place, axis="fsdp", layout=LAYOUT)
    assert isinstance(found, jax.Array)


def test_a_table_that_is_adapted_is_looked_up_in_its_parts():
    config = lora_jax.LoraConfig(rank=4, alpha=8.0, targets=("table",))
    frozen, trainable = lora_jax.split(
        {"table": table()}, config, jax.random.key(2), layouts={"table": LAYOUT}
    )
    trainable = jax.tree.map(lambda leaf: leaf + 0.1, trainable)
    mesh = training.make_mesh(fsdp=8)
    place = NamedSharding(mesh, P(None, "fsdp"))

    def look_up(params: Any, ids: jax.Array) -> jax.Array:
        return jnp.tanh(params["table"][ids])

    adapted = lora_jax.adapt(look_up, on_materialize="error")

    def loss(trainable: Any, part: Any, ids: jax.Array) -> jax.Array:
        leaf = look_up_parts(part, part, place, "fsdp", LAYOUT)
        return adapted(lora_jax.combine({"table": leaf}, trainable), ids).sum()

    def plain(trainable: Any, part: Any, ids: jax.Array) -> jax.Array:
        return adapted(lora_jax.combine({"table": part}, trainable), ids).sum()

    where = ids(BATCH, LENGTH) % WORDS
    part = jax.device_put(frozen["table"], place)
    found = jax.jit(jax.value_and_grad(loss))(trainable, part, where)
    wanted = jax.value_and_grad(plain)(trainable, frozen["table"], where)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, wanted)


def test_every_pass_looks_rows_up_and_the_table_would_be_sent_once():
    place = NamedSharding(training.make_mesh(fsdp=8), P(None, "fsdp"))

    def sent(passes: int) -> bool:
        def look_up(part: jax.Array, ids: jax.Array) -> jax.Array:
            leaf = look_up_parts(part, part, place, "fsdp", LAYOUT, passes)
            return lora_jax.adapt(lambda table, ids: table[ids])(leaf, ids)

        return "all_to_all" in str(jax.make_jaxpr(look_up)(table(), ids(BATCH * 4, LENGTH)))

    rows = 4 * LENGTH  # of a device in a pass
    assert [sent(passes) for passes in (1, WORDS // rows, WORDS // rows + 1)] == [True, True, False]


@pytest.mark.parametrize(("length", "looks_up"), [(5, True), (7, False)])
def test_a_step_counts_its_passes(length, looks_up):
    mesh, passes = training.make_mesh(fsdp=2, devices=jax.devices()[:2]), 16
    frozen, trainable = {"embed": {"embedding": table()}, "scale": None}, {"scale": jnp.ones(())}
    placement = training.placements(frozen, trainable, mesh)
    adapted = lora_jax.adapt(lambda params, ids: params["embed"]["embedding"][ids])
    tx = optax.sgd(0.1)

    def loss(trainable: Any, frozen: Any, ids: jax.Array, keys: Any) -> jax.Array:
        return (adapted(frozen, ids) * trainable["scale"]).sum()

    step = training.make_train_step(loss, tx, mesh, placement=placement, accumulate=passes)
    state = training.init_state(trainable, tx, jax.random.key(0))
    where = training.shard_batch(np.zeros((2 * passes, length), np.int32), mesh)
    text = step.lower(state, frozen, where).compile().as_text()
    assert passes * length < WORDS or not looks_up
    assert (" all-to-all(" in text) == looks_up


@pytest.mark.parametrize(
    "look_up",
    [
        lambda table, ids: table[:50][ids % 50],
        lambda table, ids: table[:, :8][ids],
        lambda table, ids: table.T[:, ids],
        lambda table, ids: jax.lax.gather(
            table,
            ids[..., None],
            jax.lax.GatherDimensionNumbers((0,), (0,), (0,)),
            (1, WIDTH),
        ),
        lambda table, ids: jax.lax.gather(
            table,
            ids[..., None],
            jax.lax.GatherDimensionNumbers((2,), (0,), (0,)),
            (1, WIDTH // 2),
        ),
    ],
    ids=[
        "of-some-rows",
        "of-some-features",
        "of-columns",
        "features-first",
        "of-half-the-features",
    ],
)
def test_what_is_no_lookup_of_rows_is_read_as_it_stands(look_up):
    where = ids(BATCH, LENGTH) % WORDS
    found = over(MESHES["fsdp"], lambda params, ids: look_up(params["table"], ids))(table(), where)
    np.testing.assert_array_equal(found, look_up(table(), where))


def test_a_batch_over_data_and_fsdp_sends_rows_and_ids_alone():
    def look_up(params: Any, ids: jax.Array) -> jax.Array:
        return params["table"][ids]

    text = over(MESHES["both"], look_up).lower(table(), ids(BATCH, LENGTH)).compile().as_text()
    sent = re.findall(r" (all-to-all|all-gather|all-reduce|collective-permute)\(", text)
    assert sorted(sent) == ["all-gather", "all-to-all"], sent  # ids, and rows


def test_what_is_sent_has_the_dtype_of_the_arithmetic():
    place = NamedSharding(training.make_mesh(fsdp=8), P(None, "fsdp"))

    def look_up(part: jax.Array, ids: jax.Array) -> jax.Array:
        leaf = look_up_parts(part, part, place, "fsdp", LAYOUT).astype(jnp.bfloat16)
        return lora_jax.adapt(lambda table, ids: (table[ids], table + 0))(leaf, ids)

    where = ids(BATCH, LENGTH) % WORDS
    jaxpr = str(jax.make_jaxpr(look_up)(table(), where))
    assert re.search(r"bf16\[\S+\] = all_to_all", jaxpr), jaxpr
    rows, whole = jax.jit(look_up)(table(), where)
    np.testing.assert_array_equal(rows, table().astype(jnp.bfloat16)[where])
    np.testing.assert_array_equal(whole, table().astype(jnp.bfloat16))


def test_a_loss_that_reads_the_table_computes_its_logits_once():
    place = NamedSharding(training.make_mesh(fsdp=8), P(None, "fsdp"))
    x = jax.random.normal(jax.random.key(3), (BATCH, LENGTH, WIDTH))

    def loss(table: jax.Array, x: jax.Array) -> jax.Array:
        def part(table: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.sin(x @ table.T).sum(), jnp.float32(1)

        return lora_jax.ops.sum_in_chunks(part, table, x, chunk=BATCH // 2)[0]

    def held(x: jax.Array, part: jax.Array) -> jax.Array:
        leaf = look_up_parts(part, part, place, "fsdp", LAYOUT)
        return lora_jax.adapt(loss, on_materialize="error")(leaf, x)

    def products(fn: Any) -> int:
        return str(jax.make_jaxpr(jax.grad(fn))(x, table())).count(" dot_general[")

    assert products(held) == products(lambda x, table: loss(table, x))


def test_another_mesh_around_takes_the_whole_table():
    def look_up(params: Any, ids: jax.Array) -> jax.Array:
        return params["table"][ids]

    whole, where = table(), ids(BATCH, LENGTH)
    wanted = look_up({"table": whole}, where)
    with jax.set_mesh(training.make_mesh(data=2, fsdp=4)):
        found = over(MESHES["fsdp"], look_up)(whole, where)
    np.testing.assert_array_equal(found, wanted)


def test_what_is_held_is_no_array():
    place = NamedSharding(training.make_mesh(fsdp=8), P(None, "fsdp"))
    leaf = look_up_parts(table(), table(), place, "fsdp", LAYOUT)
    for read in (lambda: leaf[0], lambda: jnp.sum(leaf), lambda: jnp.ones(WORDS) @ leaf):
        with pytest.raises(TypeError, match=r"TableWeight.*`lora_jax.adapt`"):
            read()
    assert not np.iterable(leaf)


@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_table_of_codes_is_gathered_as_codes(scheme):
    params, layouts = {"embed": {"embedding": table()}}, {"embed/embedding": LAYOUT}
    codes = lora_jax.quantize(params, scheme, targets=("embedding",), layouts=layouts)
    mesh = training.make_mesh(fsdp=8)
    placement = training.placements(codes, {}, mesh, layouts=layouts)

    def look_up(params: Any, ids: jax.Array) -> jax.Array:
        return params["embed"]["embedding"][ids]

    adapted, where = lora_jax.adapt(look_up), ids(BATCH, LENGTH)
    step = training.make_eval_step(lambda _, frozen, ids: adapted(frozen, ids), mesh,
                                   placement=placement)  # fmt: skip
    found = step({}, training.place(codes, placement.frozen), training.shard_batch(where, mesh))
    np.testing.assert_array_equal(found, adapted(codes, where))
