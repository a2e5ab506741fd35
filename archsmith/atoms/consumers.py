"""Which axes of which tensors read a width: the input axes of the weights of matrix products and convolutions.

Read off the exported graph, through transpositions of the weights; free parameters are covered like those of layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from archsmith.atoms.propagate import arguments, shape
from archsmith.atoms.rules.recurrent import GATES
from archsmith.atoms.rules.table import packet_name

Axis = tuple[str, int]
"""A tensor's name and one of its axes."""

_CONVOLUTIONS = {f"conv{n}d" for n in (1, 2, 3)}
_TRANSPOSED = {f"conv_transpose{n}d" for n in (1, 2, 3)}
_PRODUCTS = {"matmul": (0, 1), "mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "mv": (0, 1)}
_TRANSPOSITIONS = ("t", "numpy_T", "mT", "transpose", "permute", "swapaxes", "alias", "detach", "to", "contiguous")


def consuming_axes(graph_module: fx.GraphModule, names: Mapping[str, str]) -> tuple[set[Axis], set[Axis]]:
    """Return the axes that consume, and those that also serve another purpose.

    Args:
        graph_module: Exported graph, parameters as placeholders.
        names: Name of the tensor by placeholder name, tied ones under one name.

    Returns:
        ``(consuming, mixed)``: axes over which some operator sums, and among them those of tensors that some other use
        takes as they are (tied embeddings), where a copy can not be divided.
    """
    sums: dict[Axis, set[fx.Node]] = {}
    uses: dict[str, set[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if packet_name(node) not in _TRANSPOSITIONS:
            for source in node.all_input_nodes:
                if (origin := _origin(source, names)) is not None:
                    uses.setdefault(origin[0], set()).add(node)
        for argument, axis in _summed(node):
            origin = _origin(argument, names)
            if origin is not None:
                sums.setdefault((origin[0], origin[1][axis]), set()).add(node)
    mixed = {axis for axis, nodes in sums.items() if uses[axis[0]] - nodes}
    return set(sums), mixed


def _origin(node: object, names: Mapping[str, str]) -> tuple[str, list[int]] | None:
    """Return the tensor that a node is a transposition of, and for each axis that of the tensor."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "placeholder":
        return (names[node.name], list(range(len(shape(node))))) if node.name in names else None
    if not isinstance(node.target, torch._ops.OpOverload) or packet_name(node) not in _TRANSPOSITIONS:
        return None
    inner = _origin(node.all_input_nodes[0], names)
    if inner is None:
        return None
    name, axes = inner
    given = arguments(node)
    match packet_name(node):
        case "t" | "numpy_T":
            axes = axes[::-1]
        case "mT":
            axes = [*axes[:-2], axes[-1], axes[-2]]
        case "transpose" | "swapaxes":
            first, second = list(given.values())[1:3]
            axes = list(axes)
            axes[first], axes[second] = axes[second], axes[first]
        case "permute":
            axes = [axes[axis] for axis in given["dims"]]
    return name, axes


def _summed(node: fx.Node) -> Iterator[tuple[Any, int]]:
    """Yield the operands of an operator that may be weights, with the axis over which it sums."""
    name, given = packet_name(node), arguments(node)
    if name == "linear":
        yield given["weight"], len(shape(given["weight"])) - 1
    elif name in _CONVOLUTIONS and shape(given["weight"])[1] > (int(given["groups"]) > 1):
        yield given["weight"], 1
    elif name in _TRANSPOSED and int(given["groups"]) == 1:
        yield given["weight"], 0
    elif name in _PRODUCTS:
        first, second = (list(given.values())[i] for i in _PRODUCTS[name])
        if (rank := len(shape(first))) > 1 or name == "matmul":
            yield first, rank - 1
        yield second, max(len(shape(second)) - 2, 0)
    elif name == "bilinear":
        yield given["weight"], 1
        yield given["weight"], 2
    elif name == "einsum":
        terms, _, right = str(given["equation"]).replace(" ", "").partition("->")
        if "..." not in terms:
            for operand, term in zip(given["tensors"], terms.split(","), strict=True):
                yield from ((operand, axis) for axis, letter in enumerate(term) if letter not in right)
    elif name in GATES and "params" in given:
        yield from ((weight, 1) for weight in given["params"] if len(shape(weight)) == 2)
