"""Reductions, and operators along one axis that keep its length."""

from __future__ import annotations

from typing import Any

from torch import fx

from archsmith.atoms.propagate import Axes, Propagation, shape, values_of
from archsmith.atoms.rules.contraction import meet_aligned
from archsmith.atoms.rules.elementwise import elementwise
from archsmith.atoms.rules.table import packet_name, rule

PRESERVED = frozenset({"sum", "norm", "linalg_vector_norm", "count_nonzero", "any"})
"""Reductions to which zeros add nothing."""


def _axes(given: Any, rank: int) -> set[int]:
    if given is None or given == []:
        return set(range(rank))
    return {axis % rank for axis in (given if isinstance(given, list | tuple) else [given])} if rank else set()


@rule(
    "sum",
    "mean",
    "amax",
    "amin",
    "max",
    "min",
    "var",
    "std",
    "var_mean",
    "std_mean",
    "logsumexp",
    "prod",
    "norm",
    "linalg_vector_norm",
    "count_nonzero",
    "any",
    "all",
    "median",
    "aminmax",
    "nansum",
)
def reduce(p: Propagation, node: fx.Node) -> Axes | list[Axes]:
    """Drop the reduced axes; except for sums, a removal changes the result."""
    name = packet_name(node)
    if name in ("max", "min") and len(node.all_input_nodes) == 2:
        return elementwise(p, node)
    given = p.arguments(node)
    x = given["self"]
    rank = len(shape(x))
    reduced = _axes(given.get("dim"), rank)
    several = values_of(node)
    positions = name in ("max", "min", "median") and len(several) == 2
    for axis in reduced:
        labels = p.on(x, axis)
        if labels is None:
            continue
        if positions and node_is_used(node, 1):
            p.pin(labels, "positions of the reduced axis are returned")
        elif name not in PRESERVED:
            p.change(labels, name)
    kept = bool(given.get("keepdim", False))
    found: Axes = {}
    for axis, labels in p.of(x).items():
        if axis not in reduced:
            found[axis if kept else axis - sum(1 for other in reduced if other < axis)] = labels
    return [dict(found) for _ in several] if len(several) > 1 else found


def node_is_used(node: fx.Node, result: int) -> bool:
    """Whether one of several results of an operator is read."""
    return any(user.args[1] == result and user.users for user in node.users)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "special_softmax", "special_log_softmax")
def softmax(p: Propagation, node: fx.Node) -> Axes:
    """Keep all labels; along the axis a removal changes the sum."""
    given = p.arguments(node)
    p.change(p.on(given["self"], given["dim"]), "softmax")
    return dict(p.of(given["self"]))


@rule("cumsum", "cumprod", "logcumsumexp")
def cumulative(p: Propagation, node: fx.Node) -> Axes:
    """Keep all labels; along the axis only sums are unchanged by a removal."""
    given = p.arguments(node)
    if packet_name(node) != "cumsum":
        p.change(p.on(given["self"], given["dim"]), packet_name(node))
    return dict(p.of(given["self"]))


@rule("argmax", "argmin", "sort", "argsort", "topk", "multinomial", "bincount", "unique", "nonzero")
def by_rank(p: Propagation, node: fx.Node) -> Axes | list[Axes]:
    """Pin the axis whose positions are returned."""
    given = p.arguments(node)
    x = given["self"]
    dim = given.get("dim")
    rank = len(shape(x))
    if packet_name(node) in ("multinomial", "bincount", "unique", "nonzero"):
        dim = None
    reduced = _axes(dim, rank)
    for axis in reduced:
        p.pin(p.on(x, axis), "positions of the axis are returned")
    several = len(values_of(node))
    gone = packet_name(node) in ("argmax", "argmin") and not given.get("keepdim")
    found = {
        axis - (sum(1 for other in reduced if other < axis) if gone else 0): labels
        for axis, labels in p.of(x).items()
        if axis not in reduced
    }
    return [dict(found) for _ in range(several)] if several > 1 else found


@rule("cosine_similarity")
def cosine_similarity(p: Propagation, node: fx.Node) -> Axes:
    """Two tensors meet; zeros add nothing to product and norms."""
    given = p.arguments(node)
    a, b = given["x1"], given["x2"]
    rank = max(len(shape(a)), len(shape(b)))
    size = tuple(
        max(s[i - rank + len(s)] if i - rank + len(s) >= 0 else 1 for s in (shape(a), shape(b))) for i in range(rank)
    )
    found = meet_aligned(p, [(p.of(a), shape(a)), (p.of(b), shape(b))], size)
    dim = given["dim"] % rank
    return {axis - (axis > dim): labels for axis, labels in found.items() if axis != dim}
