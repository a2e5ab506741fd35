"""Data movement: the operator itself runs on the labels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from archsmith.atoms.labels import IntArray
from archsmith.atoms.propagate import Axes, Literal, Propagation, Split, arguments, module_name, shape, values_of
from archsmith.atoms.rules.table import packet_name, rule

VIEWS = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "squeeze", "unsqueeze")
SINGLE = (
    *VIEWS,
    "transpose",
    "permute",
    "t",
    "numpy_T",
    "mT",
    "matrix_H",
    "movedim",
    "moveaxis",
    "swapaxes",
    "swapdims",
    "expand",
    "expand_as",
    "broadcast_to",
    "repeat",
    "tile",
    "roll",
    "flip",
    "rot90",
    "select",
    "slice",
    "narrow",
    "chunk",
    "split",
    "split_with_sizes",
    "tensor_split",
    "unbind",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "native_channel_shuffle",
    "unfold",
    "diagonal",
    "im2col",
    "constant_pad_nd",
    "pad",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "repeat_interleave",
    "ravel",
)
SEVERAL = ("cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack")
GATHERS = ("index", "index_select")
MOVEMENTS = frozenset({*SINGLE, *SEVERAL, *GATHERS})
"""Operators whose every output element is an input element or a fill value."""


def apply_to(node: fx.Node, replaced: dict[fx.Node, Tensor]) -> Any:
    """Run a movement operator on other tensors of the same shapes; fills become 0.

    Args:
        node: The operator.
        replaced: What to put in the place of each input.
    """

    def value(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return replaced[argument]
        if isinstance(argument, list | tuple):
            return [value(item) for item in argument]
        return argument

    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    given = {name: value(argument) for name, argument in arguments(node).items()}
    if packet_name(node) in ("constant_pad_nd", "pad") and given.get("value") is not None:
        given["value"] = 0
    names = [argument.name for argument in target._schema.arguments if not argument.kwarg_only]
    keywords = {k: v for k, v in given.items() if k not in names}
    positional = [given[name] for name in names]
    try:
        return target(*positional, **keywords)
    except (RuntimeError, NotImplementedError):
        # Not every operator has a kernel for integers; doubles hold them exactly below 2**53.
        def as_double(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x.double()
            return [as_double(item) for item in x] if isinstance(x, list) else x

        result = target(*[as_double(x) for x in positional], **keywords)
        return [r.long() for r in result] if isinstance(result, list | tuple) else result.long()


def field_of(labels: IntArray, axis: int, size: Sequence[int]) -> Tensor:
    """Return the labels of one axis as a tensor of the whole shape, without using its memory."""
    along = torch.from_numpy(np.ascontiguousarray(labels)).view([-1 if i == axis else 1 for i in range(len(size))])
    return along.expand(list(size))


@rule(*(name for name in SINGLE if name not in VIEWS))
def move(p: Propagation, node: fx.Node) -> Axes | list[Axes]:
    """Run the operator on the labels of each axis."""
    source = node.all_input_nodes[0]
    axes = p.of(source)
    _pin_fixed_positions(p, node, source)
    _note_split(p, node, source)
    several = isinstance(node.meta.get("val"), list | tuple)
    count = len(values_of(node))
    if not axes:
        return [{} for _ in range(count)] if several else {}
    replaced = {other: torch.empty(shape(other)) for other in node.all_input_nodes[1:]}
    results: list[list[Axes]] = [[] for _ in range(count)]
    for axis, labels in axes.items():
        moved = apply_to(node, {source: field_of(labels, axis, shape(source)), **replaced})
        for found, one in zip(results, moved if several else [moved], strict=True):
            found.append(p.spread(one))
    merged = [p.merged(found) for found in results]
    return merged if several else merged[0]


@rule(*VIEWS)
def view(p: Propagation, node: fx.Node) -> Axes:
    """Split and merge axes, segment by segment: only axes that change together are looked at together."""
    source = node.all_input_nodes[0]
    axes, before, after = p.of(source), shape(source), shape(node)
    results: list[Axes] = []
    for first, last, to_first, to_last in segments(before, after):
        for axis in range(first, last):
            if axis not in axes:
                continue
            inner = field_of(axes[axis], axis - first, before[first:last])
            found = p.spread(inner.reshape(after[to_first:to_last]))
            results.append({to_first + at: labels for at, labels in found.items()})
    merged = p.merged(results)
    _note_literals(p, node, merged, split=len(after) > len(before))
    return merged


def _note_literals(p: Propagation, node: fx.Node, found: Axes, *, split: bool) -> None:
    """Note the sizes that a view writes out (-1 is no such size), those of merged axes left out."""
    given = p.arguments(node)
    sizes = next((given[name] for name in ("size", "shape") if isinstance(given.get(name), list | tuple)), None)
    for axis, labels in found.items():
        if (
            sizes is not None
            and axis < len(sizes)
            and sizes[axis] != -1
            and (split or not p.labels.any_product(labels))
        ):
            p.literals.append(Literal(module_name(node), axis, labels))


def segments(before: Sequence[int], after: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Return the shortest runs of axes (first, last, first, last) of both shapes that hold the same elements."""
    runs, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        start, to_start, left, right = i, j, 1, 1
        if i < len(before):
            left, i = before[i], i + 1
        if j < len(after):
            right, j = after[j], j + 1
        while left != right:
            if left < right:
                left, i = left * before[i], i + 1
            else:
                right, j = right * after[j], j + 1
        # Axes of length one that follow belong to the run: they hold nothing.
        while i < len(before) and before[i] == 1:
            i += 1
        while j < len(after) and after[j] == 1:
            j += 1
        runs.append((start, i, to_start, j))
    return runs


def _pin_fixed_positions(p: Propagation, node: fx.Node, source: fx.Node) -> None:
    """Pin axes of which an operator takes positions by their number."""
    if packet_name(node) in ("select", "unbind", "diagonal"):
        given = p.arguments(node)
        for name in ("dim", "dim1", "dim2"):
            if isinstance(given.get(name), int):
                p.pin(p.on(source, given[name]), "takes positions by their number")


def _note_split(p: Propagation, node: fx.Node, source: fx.Node) -> None:
    """Note splits into pieces of equal length."""
    if packet_name(node) not in ("chunk", "split", "split_with_sizes", "tensor_split"):
        return
    axis = p.arguments(node)["dim"] % len(shape(source))
    labels = p.on(source, axis)
    if labels is None:
        return
    lengths = [shape(value)[axis] for value in values_of(node)]
    bounds = np.cumsum([0, *lengths])
    pieces = tuple(labels[a:b] for a, b in itertools.pairwise(bounds))
    if packet_name(node) == "split_with_sizes":
        for position, piece in enumerate(pieces):
            p.expect("split_sizes", piece, position)
    elif len(set(lengths)) == 1:
        if packet_name(node) == "split":
            p.expect("split_size", pieces[0])
        p.splits.append(Split(pieces, p.cause("splits into pieces of equal width")))
    else:
        p.pin(labels, "splits into pieces of unequal width")


@rule("cat", "concat", "concatenate")
def cat(p: Propagation, node: fx.Node) -> Axes:
    """Put the labels of the axis one behind the other; the other axes meet."""
    given = p.arguments(node)
    sources = [source for source in given["tensors"] if shape(source) != (0,)]
    size = shape(node)
    dim = given.get("dim", 0) % len(size)
    found = _meet_others(p, sources, size, dim)
    each = [p.on(source, dim) for source in sources]
    if any(labels is not None for labels in each):
        found[dim] = np.concatenate(
            [
                labels if labels is not None else np.zeros(shape(source)[dim], dtype=np.int64)
                for labels, source in zip(each, sources, strict=True)
            ]
        )
    return found


@rule("stack")
def stack(p: Propagation, node: fx.Node) -> Axes:
    """Let all axes meet; the new axis is constant."""
    given = p.arguments(node)
    size = shape(node)
    dim = given.get("dim", 0) % len(size)
    inner = _meet_others(p, given["tensors"], size[:dim] + size[dim + 1 :], None)
    return {axis + (axis >= dim): labels for axis, labels in inner.items()}


def _meet_others(p: Propagation, sources: Sequence[fx.Node], size: Sequence[int], dim: int | None) -> Axes:
    found: Axes = {}
    for axis, n in enumerate(size):
        if axis == dim or n == 1:
            continue
        each = [p.on(source, axis) for source in sources]
        if all(labels is None for labels in each):
            continue
        for labels in each[1:]:
            p.meet(each[0], labels)
        if each[0] is not None and all(labels is not None for labels in each):
            found[axis] = each[0]
    return found


@rule("index_select")
def index_select(p: Propagation, node: fx.Node) -> Axes:
    """Pin the axis of which positions are taken by number."""
    given = p.arguments(node)
    dim = given["dim"] % len(shape(given["self"]))
    p.pin(p.on(given["self"], dim), "takes positions by their number")
    _pin_axes(p, given["index"], "is used as positions")
    return {axis: labels for axis, labels in p.of(given["self"]).items() if axis != dim}


@rule("index")
def index(p: Propagation, node: fx.Node) -> Axes:
    """Pin the axes that are indexed; the others move, and the axes of the indices take their place."""
    given = p.arguments(node)
    source, indices = given["self"], list(given["indices"])
    rank = len(shape(source))
    indices += [None] * (rank - len(indices))
    used = [axis for axis, one in enumerate(indices) if one is not None]
    for axis in used:
        p.pin(p.on(source, axis), "takes positions by their number")
    if any(one.meta["val"].dtype == torch.bool for one in indices if one is not None):
        p.pin_inputs(node, "how many positions a mask selects depends on the data")
        return {}
    for axis in used:
        _pin_axes(p, indices[axis], "is used as positions")
    block = len(shape(node)) - (rank - len(used))  # axes that stand for the indices
    together = used == list(range(used[0], used[-1] + 1))
    at = used[0] if together else 0
    found: Axes = {}
    for axis, labels in p.of(source).items():
        if axis in used:
            continue
        earlier = sum(1 for other in range(axis) if other not in used)
        found[earlier if earlier < at else earlier + block] = labels
    return found


@rule("gather", "scatter", "scatter_add", "index_add", "index_put", "take_along_dim", "index_copy", "select_scatter")
def by_number(p: Propagation, node: fx.Node) -> Axes:
    """Pin what positions are taken of by number; other axes of all tensors meet."""
    given = p.arguments(node)
    name = packet_name(node)
    if name in ("index_put", "take_along_dim", "index_copy", "select_scatter", "scatter", "scatter_add", "gather"):
        p.pin_inputs(node, "takes positions by their number")
        return {}
    source, dim = given["self"], given["dim"] % len(shape(given["self"]))
    p.pin(p.on(source, dim), "takes positions by their number")
    p.pin(p.on(given["source"], dim), "takes positions by their number")
    found: Axes = {}
    for axis, n in enumerate(shape(node)):
        if axis == dim or n == 1:
            continue
        first, second = p.on(source, axis), p.on(given["source"], axis)
        p.meet(first, second)
        if first is not None and second is not None:
            found[axis] = first
    return found


def _pin_axes(p: Propagation, node: fx.Node, reason: str) -> None:
    for labels in p.of(node).values():
        p.pin(labels, reason)
