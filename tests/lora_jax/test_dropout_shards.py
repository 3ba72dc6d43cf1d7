"""LoRA dropout inside a `shard_map`: every shard has a mask of its own."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec as P

import lora_jax

CONFIG = lora_jax.LoraConfig(rank=4, alpha=4.0, targets=("w",), dropout=0.5)


def test_shards_drop_different_entries():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    frozen, start = lora_jax.split({"w": jnp.zeros((64, 4))}, CONFIG, jax.random.key(0))
    trainable = jax.tree.map(lambda leaf: leaf + 0.1, start)
    apply = lora_jax.adapt(lambda params, x: x @ params["w"], on_materialize="error")

    def shard(trainable, x, key):
        return apply(lora_jax.combine(frozen, trainable, dropout_key=key), x)

    specs = (P(), P("data"), P())
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P("data"))
    rows = jax.jit(sharded)(trainable, jnp.ones((8, 64)), jax.random.key(1))
    assert len(np.unique(np.asarray(rows), axis=0)) == 8
