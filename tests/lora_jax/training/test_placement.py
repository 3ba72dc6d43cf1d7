"""Meshes of every shape compute what one device does, and move what they should and no more."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import _joined, training
from lora_jax.testing import assert_trees_close
from lora_jax.training import _compiler

LAYERS, WIDTH, WIDE, WORDS = 2, 32, 64, 128
BATCH, LENGTH = 8, 6
CONFIG = lora_jax.LoraConfig(rank=4, alpha=8.0, targets=("all-linear",))
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def draw(stacked: bool) -> dict[str, Any]:
    source = np.random.default_rng(0)

    def matrix(*shape: int) -> jax.Array:
        return jnp.asarray(source.normal(size=shape) / shape[-2] ** 0.5, jnp.float32)

    layers = [{"up": matrix(WIDTH, WIDE), "down": matrix(WIDE, WIDTH)} for _ in range(LAYERS)]
    return {
        "embed": {"embedding": matrix(WORDS, WIDTH)},
        "layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers) if stacked else layers,
        "norm": {"scale": jnp.ones(WIDTH)},
    }


def apply(params: Any, ids: jax.Array) -> jax.Array:
    table = params["embed"]["embedding"]
    x = table[ids]

    def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
        return x + jnp.tanh(x @ weights["up"]) @ weights["down"], None

    if isinstance(params["layers"], list):
        for weights in params["layers"]:
            x, _ = layer(x, weights)
    else:
        x, _ = jax.lax.scan(layer, x, params["layers"])
    return (x * params["norm"]["scale"][None, None]) @ table.T


ADAPTED = lora_jax.adapt(apply, on_materialize="error")


def loss_fn(trainable, frozen, batch, keys):
    logits = ADAPTED(lora_jax.combine(frozen, trainable), batch["ids"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return (losses * batch["weights"]).sum(), batch["weights"].sum()


def halves(base: str, stacked: bool) -> tuple[Any, Any, Any]:
    params = draw(stacked)
    layouts = lora_jax.layouts(apply, params, jnp.zeros((1, 1), jnp.int32))
    if base != "plain":
        params = lora_jax.quantize(params, base, layouts=layouts)
    frozen, start = lora_jax.split(params, CONFIG, jax.random.key(1), layouts=layouts)
    return frozen, jax.tree.map(lambda leaf: leaf + 0.1, start), layouts


def batch() -> dict[str, np.ndarray]:
    source = np.random.default_rng(1)
    ids = source.integers(WORDS, size=(2, BATCH, LENGTH)).astype(np.int32)
    weights = source.integers(2, size=(BATCH, LENGTH)).astype(np.float32)
    return {"ids": ids[0], "targets": ids[1], "weights": weights}


def run(base: str, stacked: bool, devices: int, accumulate: int = 1, **axes: int) -> Any:
    """Three steps over a mesh: losses, factors and the program."""
    frozen, trainable, layouts = halves(base, stacked)
    mesh = training.make_mesh(devices=jax.devices()[:devices], **axes)
    placement = training.placements(frozen, trainable, mesh, layouts=layouts)
    tx = optax.adamw(1e-2)
    state = training.init_state(trainable, tx, jax.random.key(2))
    state = jax.device_put(state, training.state_placement(state, placement))
    frozen = jax.device_put(frozen, placement.frozen)
    rows = training.shard_batch(batch(), mesh)
    step = training.make_train_step(loss_fn, tx, mesh, placement=placement, accumulate=accumulate)
    text = step.lower(state, frozen, rows).compile().as_text()
    losses, places = [], jax.tree.map(lambda leaf: leaf.sharding, state)
    for _ in range(3):
        state, metrics = step(state, frozen, rows)
        losses.append(metrics["loss"])
        stays = jax.tree.map(
            lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), state, places
        )
        assert all(jax.tree.leaves(stays))
    return jax.device_get((losses, state.trainable)), state, text


@pytest.fixture(scope="module")
def alone():
    """What one device computes, once for each kind of base."""
    found: dict[tuple[str, bool], Any] = {}

    def one(base: str, stacked: bool) -> Any:
        if (base, stacked) not in found:
            found[base, stacked] = run(base, stacked, 1)[0]
        return found[base, stacked]

    return one


MESHES = {
    "data": {"devices": 8},
    "fsdp": {"devices": 8, "fsdp": 8},
    "tensor": {"devices": 4, "tensor": 4},
    "all-three": {"devices": 8, "fsdp": 2, "tensor": 2},
    "accumulated": {"devices": 4, "fsdp": 2, "accumulate": 2},
}


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES.keys())
@pytest.mark.parametrize(
    ("base", "stacked"), [("plain", False), ("plain", True), ("nf4", True), ("int8", False)]
)
def test_every_mesh_is_one_device(alone, base, stacked, mesh):
    found, state, _ = run(base, stacked, **mesh)
    # Float32 sums in another order, through three updates of Adam, which divides by their size.
    assert_trees_close(found, alone(base, stacked), relative=1e-3)
    for leaf in jax.tree.leaves(state.trainable):
        assert len(leaf.sharding.device_set) == mesh["devices"]


def moved(text: str) -> list[tuple[str, int]]:
    """Every collective of a program: its kind and its bytes."""
    found = []
    for line in text.splitlines():
        if match := re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line):
            shapes = re.findall(r"(f32|s32|u8|s8|u32|pred)\[([\d,]*)\]", match[1])
            sizes = [4 if kind in ("f32", "s32", "u32") else 1 for kind, _ in shapes]
            counts = [math.prod(map(int, filter(None, dims.split(",")))) for _, dims in shapes]
            found.append((match[2], sum(n * size for n, size in zip(counts, sizes, strict=True))))
    return found


def test_data_parallel_sends_the_factors_gradients_alone():
    (_, trainable), _, text = run("plain", False, 8)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(trainable))
    kinds = {kind for kind, _ in moved(text)}
    assert kinds == {"all-reduce"}
    scalars = 64  # loss, weight, and the parts of a norm
    assert size <= sum(count for _, count in moved(text)) <= size + scalars


@pytest.mark.parametrize("base", ["plain", "nf4"])
def test_fsdp_gathers_weights_and_nothing_of_a_batch(base):
    (_, trainable), _, text = run(base, False, 8, fsdp=8)
    sent = {"all-gather", "all-reduce", "all-to-all"}
    assert {kind for kind, _ in moved(text)} == sent
    # Of a batch, the ids, and the rows that the table has for them.
    features = WIDTH // 8
    rows = BATCH * LENGTH * features * 4
    assert sum(count for kind, count in moved(text) if kind == "all-to-all") == rows
    summed = sum(count for kind, count in moved(text) if kind == "all-reduce")
    factors = sum(leaf.nbytes for leaf in jax.tree.leaves(trainable))
    assert factors <= summed <= factors + 64
    frozen, _, _ = halves(base, False)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    gathered = sum(count for kind, count in moved(text) if kind == "all-gather")
    # Each weight at most forwards and backwards, the factors and the ids once.
    assert gathered <= 2 * held + factors + BATCH * LENGTH * 4
    # All factors by one message.
    assert sum(found == ("all-gather", factors) for found in moved(text)) == 1
    assert set(re.findall(rf"f32\[{BATCH},{LENGTH},(\d+)\]", text)) <= {str(features)}
    # The table, read at both ends, is gathered once.
    assert sum(count == WORDS * WIDTH * 4 for _, count in moved(text)) == 1


def test_a_device_holds_its_part():
    frozen, trainable, layouts = halves("plain", False)
    mesh = training.make_mesh(fsdp=4, tensor=2)
    placement = training.placements(frozen, trainable, mesh, layouts=layouts)
    specs = {path: placement.frozen["layers"][0][path].spec for path in ("up", "down")}
    assert specs == {"up": P("fsdp", "tensor"), "down": P("tensor", "fsdp")}
    up, down = (placement.trainable[f"layers/0/{name}"] for name in ("up", "down"))
    assert (up.a.spec, up.b.spec) == (P("fsdp", None), P(None, "tensor"))
    assert (down.a.spec, down.b.spec) == (P("tensor", None), P(None, "fsdp"))
    assert placement.frozen["norm"]["scale"].spec == P(None)
    assert placement.whole == ()
    placed = jax.device_put(frozen, placement.frozen)
    (shard, *_) = placed["layers"][0]["up"].addressable_shards
    assert shard.data.shape == (WIDTH // 4, WIDE // 2)


@pytest.mark.parametrize(
    ("axes", "down"),
    [({"fsdp": 4}, P("fsdp", None)), ({"fsdp": 2, "tensor": 2}, P("tensor", "fsdp"))],
)
def test_parts_are_rows_where_nothing_computes_with_them(axes, down):
    frozen, trainable, layouts = halves("plain", False)
    mesh = training.make_mesh(devices=jax.devices()[:4], **axes)
    placement = training.placements(frozen, trainable, mesh, layouts=layouts)
    first = placement.frozen["layers"][0]
    up = P("fsdp", "tensor") if "tensor" in axes else P("fsdp", None)
    factors = placement.trainable["layers/0/down"]
    found = [first["up"].spec, first["down"].spec, factors.a.spec, factors.b.spec]
    assert found == [up, down, P(down[0], None), P(None, "fsdp")]
    assert placement.frozen["embed"]["embedding"].spec[1] == "fsdp"


BY_OUT = {"w": {"out": "fsdp"}}


@pytest.mark.parametrize(
    ("shape", "layout", "axes", "rules", "specs"),
    [
        ((64, 3, 16), "in out out", {"fsdp": 8}, None, [P("fsdp", None), P(None, None, "fsdp")]),
        ((64, 30), "in out", {"fsdp": 8}, None, [P("fsdp", None), P(None, None)]),
        ((64, 32), "in out", {"fsdp": 8}, BY_OUT, [P("fsdp", None), P(None, "fsdp")]),
        ((64, 32), "in out", {"fsdp": 4, "tensor": 2}, None, [P("fsdp", None), P(None, "tensor")]),
        ((64, 32), "in out", {"tensor": 8}, None, [P(None, None), P(None, "tensor")]),
        ((60, 32), "in out", {"fsdp": 8}, None, [P(None, None), P(None, None)]),
    ],
    ids=["first-that-divides", "none-divides", "by-outputs", "taken", "tensor-alone", "whole"],
)
def test_factors_are_cut_both_where_their_weight_is(shape, layout, axes, rules, specs):
    layouts = {"w": tuple(layout.split())}
    config = lora_jax.LoraConfig(rank=2, alpha=4.0, targets=("w",))
    params = {"w": jnp.ones(shape)}
    frozen, trainable = lora_jax.split(params, config, jax.random.key(0), layouts=layouts)
    mesh = training.make_mesh(**axes)
    placement = training.placements(frozen, trainable, mesh, layouts=layouts, rules=rules)
    factors = placement.trainable["w"]
    assert [factors.a.spec, factors.b.spec] == specs


def test_what_does_not_divide_stands_whole_and_is_said_once(caplog):
    params = {"up": jnp.ones((30, 64)), "down": jnp.ones((64, 30))}
    config = lora_jax.LoraConfig(rank=2, alpha=4.0, targets=("up", "down"))
    frozen, trainable = lora_jax.split(params, config, jax.random.key(0))
    mesh = training.make_mesh(fsdp=4, tensor=2)
    placement = training.placements(frozen, trainable, mesh)
    assert placement.frozen["up"].spec == P(None, "tensor")
    assert [(one.path, one.axis) for one in placement.whole] == [("down", "fsdp"), ("up", "fsdp")]
    # Half of 7,680 bytes is there for tensor; three quarters of that more than a fourth.
    assert {one.nbytes for one in placement.whole} == {30 * 64 * 4 // 2 * 3 // 4}
    (record,) = caplog.records
    assert "2 weights are not cut" in record.message
    assert "30, which 4 does not divide" in record.message


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({".*": {"in": "model"}}, "cuts over 'model', and the mesh has the axes 'data', 'fsdp'"),
        ({".*": {"rank": "fsdp"}}, "cuts 'rank': axes are 'in' or 'out'"),
        ({".*": {"in": "fsdp", "out": "fsdp"}}, "in and out over one axis, 'fsdp'"),
    ],
)
def test_wrong_rules(rules, message):
    frozen, trainable, layouts = halves("plain", False)
    with pytest.raises(ValueError, match=message):
        training.placements(frozen, trainable, training.make_mesh(), layouts=layouts, rules=rules)


def test_what_trains_has_a_place_in_the_frozen_half():
    frozen, trainable, layouts = halves("plain", False)
    trainable["layers/0/upp"] = trainable.pop("layers/0/up")
    with pytest.raises(ValueError, match=r"the path 'layers/0/upp', nearest: \['layers/0/up'\]"):
        training.placements(frozen, trainable, training.make_mesh(), layouts=layouts)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"fsdp": 3}, "takes 6 devices, and there are 8"),
        ({"data": 2, "tensor": 2}, "takes 4 devices, and there are 8"),
        ({"tensor": 0}, "at least one device, got tensor=0"),
    ],
)
def test_wrong_meshes(axes, message):
    with pytest.raises(ValueError, match=message):
        training.make_mesh(**axes)


def test_a_step_takes_apart_what_divides():
    frozen, trainable, _ = halves("plain", False)
    mesh = training.make_mesh()
    step = training.make_train_step(loss_fn, optax.sgd(1.0), mesh, accumulate=2)
    state = training.init_state(trainable, optax.sgd(1.0), jax.random.key(0))
    with pytest.raises(ValueError, match=r"8 devices, 2 times each\. The nearest .* is 16\."):
        step(*training.replicate((state, frozen), mesh), batch())
    with pytest.raises(ValueError, match="at least 1, got 0"):
        training.make_train_step(loss_fn, optax.sgd(1.0), mesh, accumulate=0)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_pmap_is_the_same_step(alone, accumulate):
    frozen, trainable, _ = halves("plain", False)
    tx = optax.adamw(1e-2)
    devices = jax.devices()[:4]
    state = training.init_state(trainable, tx, jax.random.key(2))
    state, frozen = training.pmap_replicate((state, frozen), devices)
    rows = jax.tree.map(lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:]), batch())
    step = training.make_pmap_train_step(loss_fn, tx, accumulate=accumulate, devices=devices)
    losses = []
    for _ in range(3):
        state, metrics = step(state, frozen, rows)
        losses.append(metrics["loss"])
    first = jax.tree.map(lambda leaf: leaf[0], (losses, state.trainable))
    assert_trees_close(jax.device_get(first), alone("plain", False), relative=1e-3)


@pytest.mark.parametrize(("axes", "joins"), [({}, True), ({"tensor": 2}, False)])
def test_products_are_joined_where_no_in_axis_is_cut(alone, monkeypatch, axes, joins):
    seen, asked = [], set()

    def joined(*operands, **params):
        seen.append(operands)
        return _joined.joined(*operands, **params)

    def pays(rows, ins, outs):
        asked.add(rows)
        return True

    monkeypatch.setattr("lora_jax._products.joined", joined)
    monkeypatch.setattr("lora_jax._products.pays", pays)
    found, _, text = run("plain", False, 8, **axes)
    assert bool(seen) == joins
    if joins:  # it is asked of what each device has to copy
        assert asked == {batch()["ids"].size // 8}
    assert_trees_close(found, alone("plain", False), relative=1e-3)
    if joins:
        assert {kind for kind, _ in moved(text)} == {"all-reduce"}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("base", ["plain", "nf4", "int8"])
@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"tensor": 4}])
def test_a_device_holds_its_part_or_the_log_says_so(base, stacked, axes, caplog):
    frozen, trainable, layouts = halves(base, stacked)
    mesh = training.make_mesh(devices=jax.devices()[:4], **axes)
    placement = training.placements(frozen, trainable, mesh, layouts=layouts)
    placed = training.place(frozen, placement.frozen)
    matrices = jax.tree.leaves({"embed": placed["embed"], "layers": placed["layers"]})
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in matrices)
    total, said = sum(leaf.nbytes for leaf in matrices), sum(one.nbytes for one in placement.whole)
    assert held - said == pytest.approx(total / 4, rel=0.01)  # scales of scales are not said
    assert bool(placement.whole) == (base != "plain" and "tensor" in axes)
    assert ("through all inputs" in caplog.text) == bool(placement.whole)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((36, 34), {"fsdp": 4, "tensor": 2}),  # 8 divides neither codes nor outputs
        ((30, 64), {"fsdp": 4}),  # 4 does not divide inputs
        ((33, 35), {"fsdp": 2, "tensor": 2}),  # nothing divides
    ],
)
def test_what_does_not_divide_is_said_to_the_byte(scheme, shape, axes, caplog):
    weight = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    config = lora_jax.LoraConfig(rank=2, alpha=4.0, targets=("w",))
    options = {"double": False} if scheme == "nf4" else {}
    codes = lora_jax.quantize({"w": weight}, scheme=scheme, targets=("w",), **options)
    frozen, trainable = lora_jax.split(codes, config, jax.random.key(0))
    mesh = training.make_mesh(devices=jax.devices()[: math.prod(axes.values())], **axes)
    placement = training.placements(frozen, trainable, mesh)
    placed = training.place(frozen, placement.frozen)
    leaves = jax.tree.leaves(placed)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    ideal = sum(leaf.nbytes for leaf in leaves) / mesh.size
    assert held - sum(one.nbytes for one in placement.whole) == pytest.approx(ideal, abs=2)
    assert bool(caplog.text) == bool(placement.whole) == (held > ideal + 2)

    def outputs(trainable, frozen, x):
        return lora_jax.adapt(lambda p, x: x @ p["w"])(lora_jax.combine(frozen, trainable), x)

    x = np.random.default_rng(1).normal(size=(8, shape[0])).astype(np.float32)
    step = training.make_eval_step(outputs, mesh, placement=placement)
    moved = training.place(trainable, placement.trainable)
    found = step(moved, placed, training.shard_batch(x, mesh))
    assert_trees_close(jax.device_get(found), outputs(trainable, frozen, x), relative=1e-5)


@pytest.mark.parametrize("base", ["plain", "nf4"])
@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2}])
def test_evaluation_reads_weights_where_they_are(base, axes):
    frozen, trainable, layouts = halves(base, True)
    mesh = training.make_mesh(**axes)
    placement = training.placements(frozen, trainable, mesh, layouts=layouts)

    def outputs(trainable, frozen, batch):
        return ADAPTED(lora_jax.combine(frozen, trainable), batch["ids"])

    step = training.make_eval_step(outputs, mesh, placement=placement)
    placed = training.place((trainable, frozen), (placement.trainable, placement.frozen))
    found = step(*placed, training.shard_batch(batch(), mesh))
    one = training.make_mesh(devices=jax.devices()[:1])
    wanted = training.make_eval_step(outputs, one)(trainable, frozen, batch())
    assert_trees_close(jax.device_get(found), jax.device_get(wanted), relative=1e-5)


@pytest.mark.parametrize(
    ("axes", "options"),
    [
        ({"data": 4}, _compiler.WITHOUT_GATHERS),
        ({"data": 2, "fsdp": 2}, _compiler.WITH_GATHERS),
        ({"data": 2, "tensor": 2}, {}),
        ({"data": 1}, {}),
    ],
)
def test_the_compiler_is_told_on_gpus_alone(alone, monkeypatch, axes, options):
    devices = math.prod(axes.values())
    mesh = training.make_mesh(**axes, devices=jax.devices()[:devices])
    assert _compiler.compiler_options(mesh) == {}
    monkeypatch.setattr(_compiler, "PLATFORMS", ("cpu",))
    assert _compiler.compiler_options(mesh) == options
    found, _, _ = run("plain", True, devices, **axes)  # XLA knows the options by these names
    assert_trees_close(found, alone("plain", True), relative=1e-3)


@pytest.mark.parametrize("options", [_compiler.WITH_GATHERS, _compiler.WITHOUT_GATHERS])
def test_what_the_user_told_the_compiler_stays(monkeypatch, options):
    (name,) = options
    axes = {"fsdp": 8} if options is _compiler.WITH_GATHERS else {"data": 8}
    monkeypatch.setattr(_compiler, "PLATFORMS", ("cpu",))
    monkeypatch.setenv("XLA_FLAGS", f"--xla_gpu_autotune_level=0 --{name}=1")
    assert _compiler.compiler_options(training.make_mesh(**axes)) == {}
    monkeypatch.setenv("XLA_FLAGS", f"--{name}_of_another=1")
    assert _compiler.compiler_options(training.make_mesh(**axes)) == options


@pytest.mark.parametrize("axes", [{"data": 4}, {"fsdp": 4}])
def test_a_step_that_the_compiler_is_told_of_may_be_part_of_more(monkeypatch, axes):
    monkeypatch.setattr(_compiler, "PLATFORMS", ("cpu",))
    frozen, trainable, layouts = halves("plain", True)
    mesh, tx = training.make_mesh(**axes, devices=jax.devices()[:4]), optax.sgd(0.1)
    placement = training.placements(frozen, trainable, mesh, layouts=layouts)
    step = training.make_train_step(loss_fn, tx, mesh, placement=placement)
    frozen = training.place(frozen, placement.frozen)
    rows = training.shard_batch(batch(), mesh)

    def begin():
        state = training.init_state(trainable, tx, jax.random.key(0))
        return training.place(state, training.state_placement(state, placement))

    def two(state, frozen, rows):
        return jax.lax.scan(lambda state, _: step(state, frozen, rows), state, length=2)

    wanted, _ = step(step(begin(), frozen, rows)[0], frozen, rows)
    found, _ = jax.jit(two)(begin(), frozen, rows)
    assert_trees_close(found.trainable, wanted.trainable, relative=1e-5)

    outputs = training.make_eval_step(
        lambda *halves: ADAPTED(lora_jax.combine(halves[1], halves[0]), halves[2]["ids"]),
        mesh, placement=placement,
    )  # fmt: skip
    gradient = jax.grad(lambda moved: outputs(moved, frozen, rows).sum())(found.trainable)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def everything(tree):
    return jax.tree.map(lambda _: True, tree)


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(optax.masked(optax.adam(1e-3), everything), id="masked"),
        pytest.param(optax.adafactor(1e-3), id="factored-moments"),
        pytest.param(optax.apply_if_finite(optax.adamw(1e-3), 2), id="wrapped"),
        pytest.param(optax.MultiSteps(optax.adam(1e-3), 2), id="several-steps"),
        pytest.param(
            optax.partition(
                {"a": optax.adam(1e-3), "b": optax.sgd(1e-3)},
                lambda tree: {path: "a" if "up" in path else "b" for path in tree},
            ),
            id="by-labels",
        ),
    ],
)
def test_states_of_many_optimizers_have_a_place(tx):
    frozen, trainable, layouts = halves("plain", False)
    mesh = training.make_mesh(fsdp=4, tensor=2)
    placement = training.placements(frozen, trainable, mesh, layouts=layouts)
    state = training.init_state(trainable, tx, jax.random.key(2))
    places = training.state_placement(state, placement)
    placed = training.place((state, frozen), (places, placement.frozen))
    step = training.make_train_step(loss_fn, tx, mesh, placement=placement)
    state, metrics = step(*placed, training.shard_batch(batch(), mesh))
    assert np.isfinite(metrics["loss"])
