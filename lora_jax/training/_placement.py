"""Where weights live on a mesh: each is cut over devices by a rule on its path and its axes.

    w (in, out)   P("fsdp", "tensor")     most matrices
    w (in, out)   P("tensor", "fsdp")     those that bring a layer's features back together, and
                                          tables; without ``tensor``, tables alone
    a (in, rank)  as the in axes of w     b (rank, out)  as the out axes of w, and either over
                                          ``fsdp`` where w is, if it has a free axis that divides

The rank and stacked axes are never cut, nor are vectors. An axis that a number of devices does not
divide stands whole on all of them, and the log says once what that costs.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._config import Layout
from .._gathered import gather_later, without
from .._paths import flatten, nearest
from .._quantized import QuantizedWeight, is_quantized
from .._table import look_up_parts
from .._targets import matches
from .._weights import Factors
from ._batch import batch_shards
from ._mesh import replicated

log = logging.getLogger(__name__)

Rules = Mapping[str, Mapping[str, str]]
"""Pattern of paths, as in `LoraConfig` -> axis kind (``"in"``, ``"out"``) -> axis of the mesh."""

TABLES = "[^/]*embed[^/]*|wte|wpe"
"""Weights whose rows are looked up, where a device has its part of them."""

RULES: Rules = MappingProxyType(
    {
        "out|down|output|o_proj|down_proj|wo": {"in": "tensor", "out": "fsdp"},
        TABLES: {"in": "tensor", "out": "fsdp"},
        ".*": {"in": "fsdp", "out": "tensor"},
    }
)
"""The first pattern to match a path decides."""

RULES_WITHOUT_TENSOR: Rules = MappingProxyType({TABLES: {"out": "fsdp"}, ".*": {"in": "fsdp"}})
"""Where no device computes with its part alone: parts are rows, one after the other in memory, so
that nothing is transposed before it is gathered or after."""

GATHERED_ONCE = f"{TABLES}|lm_head"
"""Weights that a step gathers once, if it reads them whole: they are read in every chunk of a loss
(`lora_jax.ops.sum_in_chunks`), where each reading would gather them again."""


class Whole(NamedTuple):
    """A weight that stands whole on every device of a mesh axis that was to cut it.

    Attributes:
        path: The weight's path.
        axis: The mesh's axis.
        why: In words.
        nbytes: What each device holds in addition.
    """

    path: str
    axis: str
    why: str
    nbytes: int


class Placement(NamedTuple):
    """Where both halves of `lora_jax.split` live.

    Attributes:
        frozen: The structure of the frozen half, a ``NamedSharding`` for each array.
        trainable: The same of the trainable half.
        layouts: Path -> layout, of what a rule cuts.
        whole: What could not be cut as its rule says.
    """

    frozen: Any
    trainable: Any
    layouts: Mapping[str, Layout]
    whole: tuple[Whole, ...]


def placements(
    frozen: Any,
    trainable: Mapping[str, Any],
    mesh: Mesh,
    *,
    layouts: Mapping[str, Layout] | None = None,
    rules: Rules | None = None,
) -> Placement:
    """Chooses a sharding for each array of both halves.

    Args:
        frozen: The frozen half of `lora_jax.split`, arrays or their shapes.
        trainable: The trainable half.
        mesh: The mesh of `make_mesh`.
        layouts: Path -> layout of weights without factors, as `lora_jax.layouts` measures it.
            A matrix is ``(in, out)`` without; a weight of more axes stands whole on all devices.
        rules: Which axes are cut over which of the mesh. The first pattern to match decides. None
            is `RULES`, or `RULES_WITHOUT_TENSOR` where the mesh has one device along ``tensor``.

    Raises:
        ValueError: A rule names an axis that the mesh has not, or one twice; something trains
            that the frozen half has no place for.
    """
    if rules is None:
        rules = RULES if mesh.shape["tensor"] > 1 else RULES_WITHOUT_TENSOR
    _check_rules(rules, mesh)
    leaves, treedef = flatten(frozen, is_leaf=lambda leaf: leaf is None)
    if absent := next((path for path in trainable if path not in leaves), None):
        near = nearest(absent, leaves)
        raise ValueError(
            f"No weight of the frozen half has the path {absent!r}, nearest: {near}. "
            "Give both halves of one `lora_jax.split`."
        )
    places: dict[str, Any] = dict.fromkeys(leaves)
    moving: dict[str, Any] = {}
    whole: list[Whole] = []
    known: dict[str, Layout] = {}
    for path, leaf in leaves.items():
        trained = trainable.get(path)
        weight: Any = trained if leaf is None else leaf
        layout = _layout(path, leaf, trained, layouts or {})
        rule = _rule(path, weight.shape, mesh, rules)
        cut, failed = _cut(weight.shape, layout, mesh, rule)
        if trained is not None:
            moving[path] = _place(trained, cut, mesh)
        if isinstance(leaf, QuantizedWeight):
            places[path] = _place_codes(leaf, rule, mesh)
            failed = _of_codes(leaf, places[path], rule)
        elif leaf is not None:
            places[path] = _place(leaf, cut, mesh)
        known |= {path: layout} if layout is not None and rule else {}
        more = _more(weight, (moving if leaf is None else places)[path], rule.values(), mesh)
        whole += [Whole(path, name, why, more[name]) for name, why in failed.items() if more[name]]
    if whole:
        _say(whole)
    return Placement(treedef.unflatten(places.values()), moving, known, tuple(whole))


def gathered_later(frozen: Any, placement: Placement, passes: int = 1) -> Any:
    """The frozen half, gathered over ``fsdp`` only where an adapted function reads a weight.

    Tables and heads (`GATHERED_ONCE`) are gathered for all of the step; rows of tables (`TABLES`)
    are looked up in their parts.

    Args:
        frozen: Arrays, inside a jitted function over the mesh.
        placement: Where they are.
        passes: How often a step reads them: once for each part of a batch.
    """
    leaves, treedef = flatten(frozen, is_leaf=lambda leaf: leaf is None)
    places, _ = flatten(placement.frozen, is_leaf=lambda leaf: leaf is None)

    def gathered(path: str, leaf: Any) -> Any:
        if leaf is None or path not in placement.layouts:
            return leaf
        if matches(GATHERED_ONCE, path):
            whole = gathered_now(leaf, places[path])
            if isinstance(leaf, QuantizedWeight) or not matches(TABLES, path):
                return whole
            layout = placement.layouts[path]
            return look_up_parts(leaf, whole, places[path], "fsdp", layout, passes)
        return gather_later(leaf, places[path], "fsdp", placement.layouts[path])

    return treedef.unflatten(gathered(path, leaf) for path, leaf in leaves.items())


def gathered_now(tree: Any, places: Any) -> Any:
    """A tree gathered over ``fsdp``, from where it is: factors, which are small, and tables."""

    def gathered(place: NamedSharding) -> NamedSharding:
        return NamedSharding(place.mesh, PartitionSpec(*without(tuple(place.spec), "fsdp")))

    return jax.lax.with_sharding_constraint(tree, jax.tree.map(gathered, places))


def state_placement(state: Any, placement: Placement) -> Any:
    """Where a `TrainState` lives: moments of the optimizer with what they are moments of.

    What ends in a trained weight's path and has its shape is one of its moments; all else stands
    whole on every device.

    Args:
        state: Of `init_state`, or its shapes.
        placement: Of `placements`.
    """
    places = jax.tree.leaves(placement.trainable)
    leaves, _ = jax.tree_util.tree_flatten_with_path(state.trainable)
    known = {(path, leaf.shape): place for (path, leaf), place in zip(leaves, places, strict=True)}
    lengths = sorted({len(path) for path, _ in known}, reverse=True)
    whole = replicated(jax.tree.leaves((placement.frozen, placement.trainable))[0].mesh)

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        ends = (known.get((path[-length:], leaf.shape)) for length in lengths)
        return next(filter(None, ends), whole)

    opt_state = jax.tree_util.tree_map_with_path(place, state.opt_state)
    return state._replace(step=whole, trainable=placement.trainable, opt_state=opt_state, key=whole)


def row_shards(placement: Placement | None, mesh: Mesh) -> int | None:
    """Into how many parts inputs are cut along their rows; None where weights are cut as well.

    What is gathered before it is read does not count as cut.
    """
    cuts_products = placement is not None and mesh.shape["tensor"] > 1
    return None if cuts_products else batch_shards(mesh)


Cut = Mapping[int, str]
"""Axis of a weight -> the mesh's axis that it is cut over."""


def _check_rules(rules: Rules, mesh: Mesh) -> None:
    for pattern, rule in rules.items():
        if unknown := sorted(set(rule) - {"in", "out"}):
            raise ValueError(f"Rule {pattern!r} cuts {unknown[0]!r}: axes are 'in' or 'out'.")
        if len({*rule.values()}) < len(rule):
            raise ValueError(f"Rule {pattern!r} cuts in and out over one axis, {rule['in']!r}.")
        if absent := sorted(set(rule.values()) - set(mesh.axis_names)):
            raise ValueError(
                f"Rule {pattern!r} cuts over {absent[0]!r}, and the mesh has the axes "
                f"{', '.join(map(repr, mesh.axis_names))}."
            )


def _layout(path: str, leaf: Any, trained: Any, layouts: Mapping[str, Layout]) -> Layout | None:
    """What each axis of a weight does, as far as anything says so."""
    if isinstance(trained, Factors):
        return trained.layout
    if path in layouts:
        return layouts[path]
    if is_quantized(leaf):
        return leaf.layout
    return ("in", "out") if len((trained if leaf is None else leaf).shape) == 2 else None


def _rule(path: str, shape: Sequence[int], mesh: Mesh, rules: Rules) -> Mapping[str, str]:
    """Kind of axis -> what of the mesh is to cut it, where that has more than one device."""
    if len(shape) < 2:
        return {}
    rule = next((rule for pattern, rule in rules.items() if matches(pattern, path)), {})
    return {kind: name for kind, name in rule.items() if mesh.shape[name] > 1}


def _cut(
    shape: Sequence[int], layout: Layout | None, mesh: Mesh, rule: Mapping[str, str]
) -> tuple[Cut, dict[str, str]]:
    """How a weight is cut, and which axis of the mesh does not cut it, and why."""
    cut: dict[int, str] = {}
    failed: dict[str, str] = {}
    for kind, name in rule.items():
        count = mesh.shape[name]
        if layout is None:
            failed[name] = f"nothing says which of its {len(shape)} axes are in and out"
            continue
        axes = [axis for axis, own in enumerate(layout) if own == kind]
        fitting = [axis for axis in axes if shape[axis] % count == 0]
        if fitting:
            cut[fitting[0]] = name
        elif axes:
            sizes = " and ".join(str(shape[axis]) for axis in axes)
            failed[name] = f"{kind} is {sizes}, which {count} does not divide"
    return cut, failed


def _place(node: Any, cut: Cut, mesh: Mesh) -> Any:
    """A sharding for a weight, or for each of its factors."""
    if isinstance(node, Factors):
        ins, outs = (_names(cut, node.layout, kind) for kind in ("in", "out"))
        stack = [None] * node.layout.count("stack")
        if "fsdp" in cut.values():
            ins = _also_over("fsdp", ins, node.a.shape[len(stack) :], mesh)
            outs = _also_over("fsdp", outs, node.b.shape[-len(outs) :], mesh)
        a = _sharding(mesh, node.a.shape, [*stack, *ins])
        b = _sharding(mesh, node.b.shape, [*[None] * (len(node.b.shape) - len(outs)), *outs])
        return dataclasses.replace(node, a=a, b=b)
    return _sharding(mesh, node.shape, [cut.get(axis) for axis in range(len(node.shape))])


def _place_codes(codes: QuantizedWeight, rule: Mapping[str, str], mesh: Mesh) -> QuantizedWeight:
    """Each array is cut over as many devices as its sizes allow.

    Codes are kept by outputs, and of each output by inputs. Where an array has no axis of inputs,
    or one that does not divide, ``fsdp`` cuts outputs: the array is gathered before it is used.
    """
    outs, ins = rule.get("out"), rule.get("in")
    stack = [None] * codes.layout.count("stack")
    along = tuple(name for name in (outs, ins) if name and name in (outs, "fsdp"))

    def place(leaf: Any) -> NamedSharding:
        sizes = leaf.shape[len(stack) :]
        options = [[outs, ins], [along], *([name] for name in along), []]
        fitting = [
            NamedSharding(mesh, PartitionSpec(*stack, *names))
            for names in options
            if len(names) <= len(sizes)
            and all(n % _count(mesh, name) == 0 for n, name in zip(sizes, names, strict=False))
        ]
        return max(fitting, key=lambda found: _count(mesh, _used(found)))

    return jax.tree.map(place, codes)


def _of_codes(
    codes: QuantizedWeight, places: QuantizedWeight, rule: Mapping[str, str]
) -> dict[str, str]:
    """Which axis of the mesh does not cut all arrays of a weight's codes, and why."""
    failed: dict[str, str] = {}
    pairs = list(zip(jax.tree.leaves(codes), jax.tree.leaves(places), strict=True))
    for kind, name in rule.items():
        shapes = [leaf.shape for leaf, place in pairs if name not in _used(place)]
        if not shapes:
            continue
        what = "scales" if name in _used(places.codes) else "codes"  # pyright: ignore
        failed[name] = f"its {what} have the shape {shapes[0]}, which does not divide"
        if kind == "in" and name != "fsdp" and (what == "scales" or codes.axes == 1):
            kept = f"{type(codes).__name__} keeps {what} by outputs, through all inputs of each"
            failed[name] = kept
    return failed


def _more(weight: Any, places: Any, names: Iterable[str], mesh: Mesh) -> dict[str, int]:
    """For each axis of the mesh, the bytes that a device holds because it does not cut an array.

    What is less than a hundredth of the weight does not count: scales of scales.
    """
    more = dict.fromkeys(names, 0.0)
    for leaf, place in zip(jax.tree.leaves(weight), jax.tree.leaves(places), strict=True):
        held = _nbytes(leaf) / _count(mesh, _used(place))
        for name in [name for name in more if name not in _used(place)]:
            more[name] += held * (1 - 1 / mesh.shape[name])
            held /= mesh.shape[name]
    least = _nbytes(weight) / 100
    return {name: round(nbytes) if nbytes > least else 0 for name, nbytes in more.items()}


def _used(place: NamedSharding) -> list[str]:
    """The mesh's axes that cut an array."""
    return jax.tree.leaves(tuple(place.spec))


def _also_over(
    axis: str, names: Sequence[str | None], sizes: Sequence[int], mesh: Mesh
) -> list[str | None]:
    """What cuts the axes of a factor, and one of the mesh the first that is free and divides."""
    count = mesh.shape[axis]
    free = [i for i, name in enumerate(names) if name is None and sizes[i] % count == 0]
    first = free[0] if free and axis not in names else None
    return [axis if i == first else name for i, name in enumerate(names)]


def _names(cut: Cut, layout: Layout, kind: str) -> list[str | None]:
    """What cuts the axes of a kind, one after the other."""
    return [cut.get(axis) for axis, own in enumerate(layout) if own == kind]


def _sharding(mesh: Mesh, shape: Sequence[int], names: Sequence[str | None]) -> NamedSharding:
    """The axes cut over these axes of the mesh; whole where they do not divide."""
    names = [*names, *[None] * (len(shape) - len(names))]
    spec = [
        name if size % _count(mesh, name) == 0 else None
        for name, size in zip(names, shape, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*spec))


def _count(mesh: Mesh, names: Any) -> int:
    """Over how many devices one axis of the mesh goes, several together, or none."""
    return math.prod(mesh.shape[name] for name in jax.tree.leaves(names))


def _nbytes(weight: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))


def _say(whole: Sequence[Whole]) -> None:
    first, total = whole[0], sum(one.nbytes for one in whole)
    log.warning(
        "%d weights are not cut as their rules say, %.1f MB more on each device: "
        "%r, %s, stands whole along %r, and so on.",
        len(whole), total / 1e6, first.path, first.why, first.axis,
    )  # fmt: skip
