"""Sweeps: every member is its own run, whatever the others are and whatever becomes of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import _joined, training

STEPS = 4
MESH = training.make_mesh(devices=jax.devices()[:1])


def apply(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
    return hidden @ params["head"]["kernel"]


ADAPTED = lora_jax.adapt(apply, on_materialize="error")


def loss_fn(trainable, frozen, batch, keys):
    params = lora_jax.combine(frozen, trainable, dropout_key=keys.lora)
    noise = jax.random.normal(keys.model, (3,))
    outputs = ADAPTED(params, batch["x"]) + 0.1 * noise[None]
    return jnp.mean((outputs - batch["y"]) ** 2)


def outputs_fn(trainable, frozen, batch):
    return ADAPTED(lora_jax.combine(frozen, trainable), batch["x"])


def make_tx(settings):
    """As the train application has it: clipping, then AdamW, its rate the member's own."""
    rate, decay = settings["learning_rate"], settings.get("weight_decay", 0.1)
    return optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(optax.cosine_decay_schedule(rate, 10), weight_decay=decay),
    )


@dataclasses.dataclass(frozen=True)
class Member:
    """What one run has for itself."""

    rate: float = 1e-2
    seed: int = 0
    rank: int = 2
    alpha: float = 4.0
    decay: float = 0.1

    @property
    def settings(self):
        return {"learning_rate": self.rate, "weight_decay": self.decay}


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "hidden": {"kernel": jax.random.normal(keys[0], (6, 4)), "bias": jnp.zeros(4)},
        "head": {"kernel": jax.random.normal(keys[1], (4, 3))},
    }


def begin(member, params):
    """The frozen half, and the state that the member's own run begins with."""
    config = lora_jax.LoraConfig(
        rank=member.rank,
        alpha=member.alpha,
        targets=("hidden/kernel", "head"),
        train=("bias",),
        dropout=0.5,
    )
    split, steps = jax.random.split(jax.random.key(member.seed))
    frozen, trainable = lora_jax.split(params, config, split)
    return frozen, training.init_state(trainable, make_tx(member.settings), steps)


def batch_of(member, step):
    draw = np.random.default_rng((member.seed, step))
    return {
        "x": draw.normal(size=(16, 6)).astype(np.float32),
        "y": draw.normal(size=(16, 3)).astype(np.float32),
    }


@functools.cache
def own_step(rate, decay, accumulate=1):
    tx = make_tx({"learning_rate": rate, "weight_decay": decay})
    return training.make_train_step(loss_fn, tx, MESH, accumulate=accumulate)


def own_run(member, params, accumulate=1):
    frozen, state = begin(member, params)
    step = own_step(member.rate, member.decay, accumulate)
    losses = []
    for number in range(STEPS):
        state, metrics = step(state, frozen, batch_of(member, number))
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return state, losses


def start(members, params):
    states = [begin(member, params)[1] for member in members]
    names = ("learning_rate", "weight_decay")
    settings = {name: [member.settings[name] for member in members] for name in names}
    return training.stack_states(states, settings), begin(members[0], params)[0]


def sweep(members, params, devices=1, batches=batch_of, **options):
    """The state after all steps, and ``(members, steps, 2)``: loss and norm."""
    mesh = training.make_mesh(devices=jax.devices()[:devices])
    state, frozen = training.replicate(start(members, params), mesh)
    step = training.make_sweep_train_step(loss_fn, make_tx, mesh, **options)
    rows = []
    for number in range(STEPS):
        batch = training.shard_batches([batches(member, number) for member in members], mesh)
        state, metrics = step(state, frozen, batch)
        rows.append(np.stack([metrics["loss"], metrics["grad_norm"]], axis=1))
    return state, np.stack(rows, axis=1)


def assert_states_equal(found, wanted, **tolerances):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_allclose(one, other, **tolerances)


# Some roundings of float32 a step; Adam divides by the square root of what may be small.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}
DIFFERENT = {
    "rates-and-seeds": [Member(rate=rate, seed=seed) for rate in (1e-3, 1e-1) for seed in (0, 1)],
    "seeds": [Member(seed=seed) for seed in (0, 1)],
    "ranks": [Member(rank=1, alpha=16.0), Member(rank=3, decay=0.0), Member(alpha=1.0)],
}


@pytest.mark.parametrize(
    ("different", "devices", "options"),
    [
        pytest.param("rates-and-seeds", 1, {}, id="rates-and-seeds"),
        pytest.param("ranks", 1, {}, id="ranks-alphas-and-decays"),
        pytest.param("ranks", 4, {}, id="four-devices"),
        pytest.param("seeds", 1, {"accumulate": 2}, id="two-passes"),
        pytest.param("ranks", 1, {"at_once": 1}, id="one-after-the-other"),
        pytest.param("ranks", 1, {"at_once": 2}, id="two-at-once"),
    ],
)
def test_every_member_is_its_own_run(params, different, devices, options):
    members, accumulate = DIFFERENT[different], options.get("accumulate", 1)
    state, rows = sweep(members, params, devices, **options)
    for number, member in enumerate(members):
        alone, wanted = own_run(member, params, accumulate)
        np.testing.assert_allclose(rows[number], wanted, rtol=1e-5)
        assert_states_equal(training.member_state(state, number, alone), alone, **CLOSE)
    assert len({row.tobytes() for row in rows}) == len(members)


def test_what_is_stacked_comes_out_bit_for_bit(params):
    members = DIFFERENT["ranks"]
    state, _ = start(members, params)
    for number, member in enumerate(members):
        own = begin(member, params)[1]
        assert_states_equal(training.member_state(state, number, own), own, rtol=0, atol=0)


def test_padded_ranks_stay_exactly_zero(params):
    ranks = [member.rank for member in DIFFERENT["ranks"]]
    state, _ = sweep(DIFFERENT["ranks"], params)
    moments = state.states.opt_state[1][0]
    for tree in (state.states.trainable, moments.mu, moments.nu):
        for path in ("hidden/kernel", "head/kernel"):
            for number, rank in enumerate(ranks):
                a, b = tree[path].a[number], tree[path].b[number]
                assert a.shape[-1] == b.shape[0] == max(ranks)
                assert not a[:, rank:].any()
                assert not b[rank:].any()
                assert a[:, :rank].any()
                assert b[:rank].any()


def test_one_that_diverges_stops_and_changes_no_bit_of_the_others(params):
    """Its data is not finite in step 2; the same sweep where it is, is compared."""
    members = DIFFERENT["rates-and-seeds"]

    def poisoned(member, step):
        batch = batch_of(member, step)
        if member == members[1] and step == 2:
            batch["x"] = np.full_like(batch["x"], np.nan)
        return batch

    healthy, good = sweep(members, params)
    state, rows = sweep(members, params, batches=poisoned)
    others = [0, 2, 3]
    assert state.running.tolist() == [True, False, True, True]
    np.testing.assert_array_equal(rows[others], good[others])
    for number in others:
        like = begin(members[number], params)[1]
        found, wanted = (training.member_state(one, number, like) for one in (state, healthy))
        assert_states_equal(found, wanted, rtol=0, atol=0)
    # It took two steps, and none after that although its data is finite again.
    like = begin(members[1], params)[1]
    stopped = training.member_state(state, 1, like)
    assert int(stopped.step) == 2
    np.testing.assert_array_equal(rows[1, :2], good[1, :2])
    assert not np.isfinite(rows[1, 2]).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stopped[:-1]))


def test_those_that_are_chosen_take_a_step_and_the_others_stand_still(params):
    members = DIFFERENT["rates-and-seeds"]
    state, frozen = start(members, params)
    step = training.make_sweep_train_step(loss_fn, make_tx, MESH)
    batches = [batch_of(members[number], 0) for number in (3, 1)]
    state, metrics = step(
        state, frozen, training.shard_batches(batches, MESH), jnp.array([3, 1], jnp.int32)
    )
    assert state.states.step.tolist() == [0, 1, 0, 1]
    for place, number in enumerate((3, 1)):
        frozen, own = begin(members[number], params)
        alone = own_step(members[number].rate, members[number].decay)
        own, wanted = alone(own, frozen, batches[place])
        np.testing.assert_allclose(metrics["loss"][place], wanted["loss"], rtol=1e-5)
        assert_states_equal(training.member_state(state, number, own), own, **CLOSE)
    for number in (0, 2):
        own = begin(members[number], params)[1]
        assert_states_equal(training.member_state(state, number, own), own, rtol=0, atol=0)


@pytest.mark.parametrize(("devices", "at_once"), [(1, None), (4, None), (1, 2)])
def test_evaluation_is_that_of_each_member(params, devices, at_once):
    members = DIFFERENT["ranks"]
    states = [begin(member, params)[1] for member in members]
    states = [
        state._replace(trainable=jax.tree.map(lambda leaf: leaf + 0.1, state.trainable))
        for state in states
    ]
    state = training.stack_states(states)
    mesh = training.make_mesh(devices=jax.devices()[:devices])
    state, frozen = training.replicate((state, begin(members[0], params)[0]), mesh)
    batch = training.shard_batch(batch_of(Member(), 9), mesh)
    outputs = training.make_sweep_eval_step(outputs_fn, mesh, at_once=at_once)(state, frozen, batch)
    assert outputs.shape == (16, 3, 3)
    for number in range(len(members)):
        wanted = outputs_fn(states[number].trainable, frozen, batch)
        np.testing.assert_allclose(outputs[:, number], wanted, rtol=1e-5, atol=1e-6)


def test_frozen_weights_are_not_copied_for_each_member(params, monkeypatch):
    """Where products are joined, each would be: of ``w`` and the member's ``b`` below it."""
    monkeypatch.setattr(_joined, "BACKENDS", (jax.default_backend(),))
    wide = {"w": jnp.ones((8, 64))}
    config = lora_jax.LoraConfig(rank=2, alpha=2.0, targets=("w",))
    frozen, trainable = lora_jax.split(wide, config, jax.random.key(0))
    product = lora_jax.adapt(lambda params, x: x @ params["w"])

    def loss(trainable, frozen, batch, keys):
        return jnp.mean(product(lora_jax.combine(frozen, trainable), batch) ** 2)

    def tx(settings):
        return optax.sgd(0.1)

    state = training.init_state(trainable, tx({}), jax.random.key(0))
    x = np.ones((32, 8), np.float32)
    alone = training.make_train_step(loss, tx({}), MESH).trace(state, frozen, x)
    assert "_joined" in str(alone.jaxpr)
    state = training.stack_states([state, state])
    step = training.make_sweep_train_step(loss, tx, MESH)
    assert "_joined" not in str(step.trace(state, frozen, np.stack([x, x])).jaxpr)


def test_what_cannot_be_stacked_is_refused(params):
    two = [begin(Member(seed=seed), params)[1] for seed in (0, 1)]
    with pytest.raises(ValueError, match="2 members, and 3 values of 'learning_rate'"):
        training.stack_states(two, {"learning_rate": [1.0, 2.0, 3.0]})
    fewer = {path: w for path, w in two[0].trainable.items() if path != "head/kernel"}
    other = training.init_state(fewer, make_tx(Member().settings), jax.random.key(0))
    with pytest.raises(ValueError, match="train different weights"):
        training.stack_states([two[0], other])


def test_a_batch_must_divide_over_the_devices(params):
    mesh = training.make_mesh()
    batches = [{"x": np.ones((12, 6), np.float32)}] * 2
    with pytest.raises(ValueError, match=r"batch of 12 examples .* that does is 16\."):
        training.shard_batches(batches, mesh)
