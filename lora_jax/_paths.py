"""The one spelling of a weight's name: the keys on the way to it, joined by ``/``.

    {"params": {"layers": [{"kernel": w}]}}   ->   "layers/0/kernel"

A leading Linen collection ``params`` is left out, so that a variables dict and its parameters
spell a weight alike; so is the ``value`` inside an NNX variable.
"""

import difflib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from ._held import is_held

IMPLIED_NAMES = ("kernel", "embedding", "weight")


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[dict[str, Any], Any]:
    """Flattens ``tree`` into ``{path: leaf}``, in the tree's own order, and its structure.

    A held weight is one leaf.

    Raises:
        ValueError: Two leaves have the same path.
    """

    def is_whole(leaf: Any) -> bool:
        return is_held(leaf) or (is_leaf is not None and is_leaf(leaf))

    keyed, treedef = jax.tree_util.tree_flatten_with_path(tree, is_whole)
    leaves: dict[str, Any] = {}
    for key_path, leaf in keyed:
        path = spell(key_path)
        if path in leaves:
            raise ValueError(
                f"Two weights share the path {path!r}. "
                "Rename one: adapters are stored and matched by path."
            )
        leaves[path] = leaf
    return leaves, treedef


def spell(key_path: Sequence[Any]) -> str:
    """Spells a JAX key path: ``(DictKey("a"), SequenceKey(0))`` is ``"a/0"``."""
    segments = [_segment(key) for key in key_path]
    if len(segments) > 1 and segments[0] == "params":
        segments = segments[1:]
    if len(segments) > 1 and _is_variable_value(key_path[-1]):
        segments = segments[:-1]
    return "/".join(segments)


def nearest(name: str, names: Iterable[str], count: int = 1) -> list[str]:
    """The ``count`` names most like ``name``, best first; a run of last segments counts whole."""

    def likeness(candidate: str) -> float:
        segments = [part for part in candidate.split("/") if part not in IMPLIED_NAMES]
        runs = ("/".join(segments[start:]) for start in range(len(segments)))
        return max((difflib.SequenceMatcher(None, name, run).ratio() for run in runs), default=0.0)

    return sorted(names, key=likeness, reverse=True)[:count]


def _segment(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name) | GetAttrKey(name=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
    return str(key)


def _is_variable_value(key: Any) -> bool:
    return isinstance(key, GetAttrKey) and key.name in ("value", "raw_value")
