"""Rows that are looked up in the parts of a table are those of the table, and the table stays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    [(LENGTH,), (BATCH,), (BATCH * 8, WORDS)],
    ids=["positions", "one-a-row", "more-than-the-table-has"],
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
