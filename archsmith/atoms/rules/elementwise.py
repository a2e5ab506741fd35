"""Operators that work element by element: the operands' axes meet where they are aligned."""

from __future__ import annotations

import torch
from torch import fx

from archsmith.atoms.labels import IntArray
from archsmith.atoms.propagate import Axes, Propagation, shape, values_of
from archsmith.atoms.rules.table import rule


def is_elementwise(node: fx.Node) -> bool:
    """Whether torch itself says that an operator works element by element."""
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


@rule(
    "alias",
    "clone",
    "contiguous",
    "detach",
    "lift_fresh_copy",
    "lift_fresh",
    "to",
    "_to_copy",
    "type_as",
    "copy",
    "dropout",
    "feature_dropout",
    "alpha_dropout",
    "native_dropout",
    "masked_fill",
    "where",
    "lerp",
    "addcmul",
    "addcdiv",
    "gelu",
    "hardtanh",
    "relu6",
    "selu",
    "celu",
    "softplus",
    "hardswish",
    "hardsigmoid",
    "rsub",
    "floor_divide",
    "clip",
    "square",
    "nan_to_num",
    "positive",
    "absolute",
    "true_divide",
    "divide",
    "multiply",
    "subtract",
    "tril",
    "triu",
    "fill",
    "zero",
    "conj",
    "resolve_conj",
    "resolve_neg",
    "rand_like",  # noise of the shape of a tensor: no number of it belongs to a position
    "randn_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
)
def elementwise(p: Propagation, node: fx.Node) -> Axes | list[Axes]:
    """Unite the labels of aligned axes; an axis of fixed width pins what it meets, an axis of length one does not."""
    size = shape(values_of(node)[0]) if values_of(node) else ()
    operands = [(source, shape(source)) for source in node.all_input_nodes]
    found: Axes = {}
    for axis, n in enumerate(size):
        if n == 1:
            continue
        aligned: list[IntArray | None] = []
        for source, own in operands:
            at = axis - len(size) + len(own)
            if at >= 0 and own[at] == n:
                aligned.append(p.on(source, at))
        present = [labels for labels in aligned if labels is not None]
        if not present:
            continue
        if len(present) < len(aligned):
            for labels in present:
                p.pin(labels, "meets a tensor of fixed width")
            continue
        for labels in present[1:]:
            p.meet(present[0], labels)
        found[axis] = present[0]
    several = len(values_of(node))
    return [dict(found) for _ in range(several)] if several > 1 else found


@rule("prelu")
def prelu(p: Propagation, node: fx.Node) -> Axes:
    """Unite the channels (axis 1) with the slopes, where there is one for each."""
    given = p.arguments(node)
    x, slopes = given["self"], given["weight"]
    if shape(slopes) and shape(slopes)[0] > 1:
        p.meet(p.on(x, 1), p.on(slopes, 0))
    return dict(p.of(x))


@rule("glu")
def glu(p: Propagation, node: fx.Node) -> Axes:
    """Unite the two halves of the axis."""
    given = p.arguments(node)
    x, axis = given["self"], given["dim"] % len(shape(given["self"]))
    found = dict(p.of(x))
    labels = found.get(axis)
    if labels is not None:
        half = len(labels) // 2
        p.meet(labels[:half], labels[half:])
        found[axis] = labels[:half]
    if shape(node)[axis] == 1:
        p.pin(found.pop(axis, None), "is reduced to one position")
    return found


@rule("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_size", "item", "_local_scalar_dense")
def nothing(p: Propagation, node: fx.Node) -> Axes:
    """Return nothing: these hand on no tensor. A value taken out of a tensor pins it."""
    if not str(node.target).startswith("aten._assert"):
        p.pin_inputs(node, "its value is read as a number")
    return {}
