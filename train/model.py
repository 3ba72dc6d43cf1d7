"""The model with its adapters: loaded, split, and made into a train step and an eval step."""

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import lora_jax
from lora_jax import models, training

from .config import Config, lora_config
from .tasks import Model, Task

Key = jax.Array
CHUNK = 1024  # tokens of a device: enough to fill one, and 0.5 GB of logits of 128k words


class Keys(NamedTuple):
    """The run's randomness, one key for each use, all from `training.seed`."""

    head: Key
    adapters: Key
    steps: Key


def run_keys(seed: int) -> Keys:
    """The keys of a run."""
    return Keys(*jax.random.split(jax.random.key(seed), 3))


def load_model(
    config: Config, num_labels: int | None, *, abstract: bool = False
) -> models.Pretrained:
    """Loads the model that the config names; a head that it lacks is drawn from the run's seed.

    Args:
        config: The run's config.
        num_labels: How many classes the data has; None of a decoder.
        abstract: Give shapes for weights, and read no weights.

    Raises:
        ValueError: The checkpoint cannot be read, or does not fit the config or the data.
    """
    section = config.model
    read = functools.partial(
        models.from_pretrained,
        section.path,
        task=section.task,
        num_labels=num_labels,
        dtype=jnp.dtype(section.dtype),
        compute_dtype=section.compute_dtype and jnp.dtype(section.compute_dtype),
        scan_layers=section.scan_layers,
        layers_per_step=section.layers_per_step,
        remat=section.remat,
        new_head=section.new_head or None,
        key=run_keys(config.training.seed).head,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", models.NewHeadWarning)  # the console says it: `model.new`
        plain = lora_config(config).train if section.quantize else ()
        if plain:  # what is wrong with these patterns is said of plain weights
            split_model(read(abstract=True), config)
        model = read(abstract=abstract, quantize=section.quantize, quantize_exclude=plain)
    if model.config.max_length < config.data.max_length:
        raise ValueError(
            f"`data.max_length` is {config.data.max_length}, and the model has positions for "
            f"{model.config.max_length} tokens: set it to that at most."
        )
    return model


def split_model(model: models.Pretrained, config: Config) -> tuple[Any, Any]:
    """The model's weights as ``(frozen, trainable)``; shapes if the model's are shapes."""
    key = run_keys(config.training.seed).adapters
    adapters, layouts = lora_config(config), model.layouts
    if isinstance(jax.tree.leaves(model.params)[0], jax.ShapeDtypeStruct):
        return jax.eval_shape(
            lambda params: lora_jax.split(params, adapters, key, layouts=layouts), model.params
        )
    return lora_jax.split(model.params, adapters, key, layouts=layouts)


def summarise(model: models.Pretrained, config: Config) -> Any:
    """The table of weights that train."""
    return lora_jax.summary(model.params, lora_config(config), layouts=model.layouts)


def make_mesh(config: Config) -> jax.sharding.Mesh:
    """The devices of all processes, as the config lays them out.

    Raises:
        ValueError: It asks for more or fewer than there are, or has no place to read weights to.
    """
    mesh = training.make_mesh(**config.mesh.model_dump())
    where_weights_fit(mesh)  # refused before anything is read
    return mesh


def are_cut(mesh: jax.sharding.Mesh) -> bool:
    """Whether a device holds only parts of weights."""
    return mesh.shape["fsdp"] * mesh.shape["tensor"] > 1


def where_weights_fit(mesh: jax.sharding.Mesh) -> contextlib.AbstractContextManager[Any]:
    """Where the whole model is: in the host's memory, if devices hold only parts of it.

    Raises:
        ValueError: JAX was told to do without the host.
    """
    if not are_cut(mesh):
        return contextlib.nullcontext()
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError as error:
        raise ValueError(
            "A model that is cut over devices is read into the host's memory first, and JAX was "
            f"told to do without: add cpu to JAX_PLATFORMS, as in JAX_PLATFORMS=cuda,cpu ({error})."
        ) from error


def put(
    state: training.TrainState,
    frozen: Any,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    layouts: Any,
) -> tuple[training.TrainState, Any, training.Placement | None]:
    """State and frozen weights on the mesh, and where they are; None if whole on all devices."""
    places = _placement(frozen, state.trainable, mesh, layouts)
    if places is None:
        return (*training.replicate((state, frozen), mesh), None)
    where = training.state_placement(state, places), places.frozen
    return (*training.place((state, frozen), where), places)


def put_halves(
    frozen: Any, trainable: Any, mesh: jax.sharding.Mesh, layouts: Any
) -> tuple[Any, Any, training.Placement | None]:
    """Both halves on the mesh, and where they are, without what an optimizer needs."""
    places = _placement(frozen, trainable, mesh, layouts)
    if places is None:
        return (*training.replicate((frozen, trainable), mesh), None)
    return (*training.place((frozen, trainable), (places.frozen, places.trainable)), places)


def _placement(
    frozen: Any, trainable: Any, mesh: jax.sharding.Mesh, layouts: Any
) -> training.Placement | None:
    if not are_cut(mesh):
        return None
    return training.placements(frozen, trainable, mesh, layouts=layouts)


def make_train_step(
    task: Task,
    model: models.Pretrained,
    tx: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    smoothing: float,
    *,
    accumulate: int = 1,
    placement: training.Placement | None = None,
) -> Any:
    """The jitted train step: `(state, frozen, batch) -> (state, metrics)`."""
    loss_fn = make_loss(task, model, mesh, smoothing)
    return training.make_train_step(loss_fn, tx, mesh, placement=placement, accumulate=accumulate)


def make_loss(
    task: Task, model: models.Pretrained, mesh: jax.sharding.Mesh, smoothing: float
) -> Callable[..., Any]:
    """The loss of a batch while training: `(trainable, frozen, batch, keys) -> (sum, weight)`."""
    adapted = adapt(model, training.batch_shards(mesh))

    def loss_fn(trainable: Any, frozen: Any, batch: Any, keys: training.StepKeys) -> Any:
        params = lora_jax.combine(frozen, trainable, dropout_key=keys.lora)
        return task.loss(adapted, params, batch, smoothing, keys.model)

    return loss_fn


def make_eval_step(
    task: Task,
    model: models.Pretrained,
    mesh: jax.sharding.Mesh,
    placement: training.Placement | None = None,
) -> Any:
    """The jitted eval step: `(trainable, frozen, batch) -> what the task keeps of each row`."""
    outputs_fn = make_outputs(task, model, mesh)
    return training.make_eval_step(outputs_fn, mesh, placement=placement)


def make_outputs(
    task: Task, model: models.Pretrained, mesh: jax.sharding.Mesh
) -> Callable[..., jax.Array]:
    """What the task keeps of each row: `(trainable, frozen, batch) -> (rows, n)`."""
    adapted = adapt(model, training.batch_shards(mesh))

    def outputs_fn(trainable: Any, frozen: Any, batch: Any) -> jax.Array:
        return task.outputs(adapted, lora_jax.combine(frozen, trainable), batch)

    return outputs_fn


def adapt(model: models.Pretrained, devices: int = 1) -> Model:
    """The model's own functions, lifted to adapted weights.

    They would raise rather than form `w + a @ b` anywhere.
    """
    lift = functools.partial(lora_jax.adapt, on_materialize="error")
    apply, hidden, logits = (lift(fn) for fn in (model.apply, model.hidden, model.logits))
    return Model(apply, hidden, logits, model.head, CHUNK * devices)
