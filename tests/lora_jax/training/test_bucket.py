"""What is gathered in buckets is what was cut, by one message for each dtype."""

import re

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import training
from lora_jax._gathered import without
from lora_jax.training._bucket import gathered_in_buckets

AXES = {
    "fsdp": {"fsdp": 8},
    "data": {"fsdp": 4},
    "tensor": {"fsdp": 2, "tensor": 4},
}


def gathered(tree, places):
    """The tree, and the program that gathers it."""
    step = jax.jit(lambda tree: gathered_in_buckets(tree, places, "fsdp"))
    placed = jax.device_put(tree, places)
    return step(placed), step.lower(placed).compile().as_text()


def gathers(text: str) -> list[str]:
    return re.findall(r"= \(?(\w+)\[[\d,]*\]\S* all-gather(?:-start)?\(", text)


@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_array_comes_back_whole(axes, data):
    mesh = training.make_mesh(**axes)
    kinds = st.sampled_from([(), ("fsdp",), (None, "fsdp"), (None, None, "fsdp"), ("tensor",),
                             ("fsdp", "tensor"), (("tensor", "fsdp"),)])  # fmt: skip
    dtypes = st.sampled_from([jnp.float32, jnp.bfloat16])
    source = np.random.default_rng(0)
    tree, places = {}, {}
    for i in range(data.draw(st.integers(0, 6))):
        spec = data.draw(kinds)
        sizes = data.draw(st.lists(st.integers(1, 3), min_size=max(len(spec), 1), max_size=3))
        shape = [
            size * np.prod([mesh.shape[name] for name in jax.tree.leaves(names)], dtype=int)
            for size, names in zip(sizes, [*spec, *[None] * 3], strict=False)
        ]
        tree[i] = jnp.asarray(source.normal(size=shape), data.draw(dtypes))
        places[i] = NamedSharding(mesh, PartitionSpec(*spec))
    whole, _ = gathered(tree, places)
    assert jax.tree.structure(whole) == jax.tree.structure(tree)
    for i, array in whole.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(tree[i]))
        assert array.dtype == tree[i].dtype
        left = NamedSharding(mesh, PartitionSpec(*without(tuple(places[i].spec), "fsdp")))
        assert array.sharding.is_equivalent_to(left, array.ndim)


def test_a_weak_type_stays_weak():
    mesh = training.make_mesh(fsdp=8)
    tree = {"weak": jnp.full((16, 4), 0.1), "strong": jnp.ones((16, 4), jnp.float32)}
    places = dict.fromkeys(tree, NamedSharding(mesh, PartitionSpec("fsdp")))
    whole, _ = gathered(tree, places)
    assert (whole["weak"].weak_type, whole["strong"].weak_type) == (True, False)


def test_there_is_one_message_for_each_dtype():
    mesh = training.make_mesh(fsdp=8)
    tree = {
        "rows": jnp.ones((16, 4)),
        "columns": jnp.ones((3, 24)),
        "stacked": jnp.ones((2, 8, 4)),
        "narrow": jnp.ones((8, 5), jnp.bfloat16),
        "narrow too": jnp.ones((16,), jnp.bfloat16),
        "whole": jnp.ones((16, 4)),
    }
    cut = {"columns": (None, "fsdp"), "stacked": (None, "fsdp"), "whole": ()}
    places = {name: NamedSharding(mesh, PartitionSpec(*cut.get(name, ("fsdp",)))) for name in tree}
    _, text = gathered(tree, places)
    assert len(gathers(text)) == 2, gathers(text)
