"""Splitting a parameter tree in two, and putting it together again.

frozen, trainable = split(params, config, key)
combine(frozen, trainable)      # the original structure, with a LoraWeight where adapted
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

from ._config import Layout, LoraConfig
from ._parts import init_part_factors
from ._paths import flatten, nearest
from ._targets import Target, select
from ._weights import Factors, LoraWeight, TrainedWeight, init_factors, is_node, path_key

Tree = TypeVar("Tree")
Trainable = dict[str, Any]
"""Path -> `Factors`, or the array itself for a weight that trains in full."""


def split(
    params: Tree,
    config: LoraConfig,
    key: jax.Array,
    *,
    layouts: Mapping[str, Layout] | None = None,
) -> tuple[Tree, Trainable]:
    """Splits ``params`` into what stays and what trains: ``(frozen, trainable)``.

    Pure, and nothing is copied: the frozen arrays are the ones given.

    Args:
        params: A tree of arrays: Linen parameters, an NNX state, any pytree.
        config: Which weights to adapt.
        key: A PRNG key. Every weight folds its own path into it.
        layouts: Path -> layout, as `layouts` measures it; needed for weights of three axes or
            more. A pattern in ``config.layouts`` wins over it.

    Returns:
        ``frozen``, of the structure of ``params``, with ``None`` where a weight trains in full;
        and ``trainable``, a dict from path to `LoraFactors` (`PartFactors` where the config
        names ``parts``) or to the fully trained array. The leaves of ``trainable`` are exactly
        the arrays that train.

    Raises:
        ValueError: A pattern matches nothing, or a weight cannot be adapted as asked. The message
            names the weight or the nearest ones.

    Example:
        >>> params = {"query": {"kernel": jax.numpy.ones((4, 6)), "bias": jax.numpy.zeros(6)}}
        >>> config = LoraConfig(rank=2, alpha=4, targets=("query",), train=("bias",))
        >>> frozen, trainable = split(params, config, jax.random.key(0))
        >>> trainable["query/bias"].shape
        (6,)
        >>> trainable["query/kernel"].a.shape, trainable["query/kernel"].b.shape
        ((4, 2), (2, 6))
        >>> frozen["query"]["bias"] is None
        True
    """
    leaves, treedef = flatten(params, is_leaf=is_node)
    if adapted := [path for path, leaf in leaves.items() if is_node(leaf)]:
        raise ValueError(f"{adapted[0]!r} is adapted already. Split the plain parameters.")
    weights = {path: leaf for path, leaf in leaves.items() if hasattr(leaf, "dtype")}
    adapted, trained = select(weights, config, layouts)

    def init(path: str, target: Target) -> Factors:
        draw = init_part_factors if target.parts else init_factors
        return draw(path, weights[path], target, config.dropout, key)

    trainable: Trainable = {path: init(path, target) for path, target in adapted.items()}
    trainable |= {path: weights[path] for path in trained}
    frozen = treedef.unflatten(None if path in trained else leaf for path, leaf in leaves.items())
    return frozen, dict(sorted(trainable.items()))


def combine(
    frozen: Tree, trainable: Mapping[str, Any], *, dropout_key: jax.Array | None = None
) -> Tree:
    """Puts the halves together: the original structure, each adapted leaf a `LoraWeight`.

    Args:
        frozen: The frozen half of `split`.
        trainable: The trainable half.
        dropout_key: Turns LoRA dropout on: entries of a product's input are dropped before they
            meet the factors. Every product of every weight has its own mask, and so has every
            layer of a stack that a scan or an index takes apart; a stack that one product reads
            whole, and a body that a loop or an inner jit applies again, have one. Lookups, which
            multiply by nothing, have no dropout. In a `shard_map` each shard has its own, unless
            ``check_vma=False`` hides that shards differ: fold ``lax.axis_index`` into the key.

    Raises:
        ValueError: The halves do not belong together; the message names the weight.
    """

    def join(path: str, w: Any) -> Any:
        if path not in trainable:
            return w
        factors = trainable[path]
        if not isinstance(factors, Factors):
            return TrainedWeight(factors)
        return LoraWeight(w, factors, _dropout_keys(dropout_key, path, factors), path)

    leaves, treedef = _frozen_leaves(frozen, trainable)
    return treedef.unflatten(join(path, w) for path, w in leaves.items())


def mask(tree: Tree) -> Tree:
    """Which leaves of a combined tree train: True at ``a``, ``b`` and fully trained weights.

    For scripts that keep one tree, as the mask that Optax transformations take.
    """

    def mark(leaf: Any) -> Any:
        train = is_node(leaf)
        marked = jax.tree.map(lambda _: train, leaf)
        if isinstance(leaf, LoraWeight):
            frozen = jax.tree.map(lambda _: False, (leaf.w, leaf.dropout_keys))
            marked = LoraWeight(frozen[0], marked.factors, frozen[1], leaf.path)
        return marked

    return jax.tree.map(mark, tree, is_leaf=is_node)


def masked(tx: optax.GradientTransformation, tree: Any) -> optax.GradientTransformation:
    """Applies ``tx`` to what trains in a combined tree, and leaves the rest as it is.

    A frozen leaf gets a zero update and no optimizer state. A tree with quantised weights has
    integers, of which `jax.grad` takes none: keep the two halves of `split` there.

    Args:
        tx: Any Optax transformation.
        tree: The combined tree, or its shapes.
    """
    labels = jax.tree.map(lambda train: "train" if train else "freeze", mask(tree))
    return optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)


def _frozen_leaves(frozen: Any, trainable: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """The leaves of ``frozen`` by path, once it is clear that ``trainable`` belongs to them."""
    leaves, treedef = flatten(frozen, is_leaf=lambda leaf: leaf is None)
    for path, factors in trainable.items():
        if path not in leaves:
            raise ValueError(
                f"{path!r} trains, but the frozen tree has no such weight. "
                f"The nearest is {' or '.join(map(repr, nearest(path, leaves)))}."
            )
        if isinstance(factors, Factors) == (leaves[path] is None):
            raise ValueError(
                f"{path!r} is {'missing from' if leaves[path] is None else 'present in'} the "
                "frozen tree, which is not how it was split. Combine two halves of one `split`."
            )
        _check_shapes(path, leaves[path], factors)
    return leaves, treedef


def _check_shapes(path: str, w: Any, factors: Any) -> None:
    if not isinstance(factors, Factors) or not hasattr(w, "shape"):
        return
    if not hasattr(factors.a, "shape") or not hasattr(factors.b, "shape"):
        return  # a tree of shardings or specs
    if not factors.fits(w.shape):
        raise ValueError(
            f"{path!r} has shape {tuple(w.shape)}, and its factors of layout "
            f"{' '.join(factors.layout)!r} have {(factors.a.shape, factors.b.shape)}. "
            "Combine two halves of one `split`."
        )


def _dropout_keys(key: jax.Array | None, path: str, factors: Factors) -> jax.Array | None:
    if key is None or factors.dropout == 0:
        return None
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    stack = factors.a.shape[: factors.layout.count("stack")]
    key = path_key(key, path)
    return jax.random.split(key, stack) if stack else key
