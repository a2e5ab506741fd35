"""Operators that make tensors from nothing."""

from __future__ import annotations

from torch import fx

from archsmith.atoms.propagate import Axes, Propagation, shape
from archsmith.atoms.rules.table import rule

UNIFORM = frozenset({"zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "scalar_tensor"})


@rule(*sorted(UNIFORM))
def uniform(p: Propagation, node: fx.Node) -> Axes:
    """Give each axis free labels: a tensor with the same value everywhere fits every width.

    The literal sizes must follow the width that the tensor meets; the replay of a cut sees whether they do.
    """
    found: Axes = {axis: p.labels.fresh(n) for axis, n in enumerate(shape(node)) if n > 1}
    for axis, labels in found.items():
        if "size" in p.arguments(node):
            p.expect("size", labels, axis)
    return found


@rule("arange", "linspace", "eye", "rand", "randn", "randint", "randperm", "empty", "new_empty")
def fixed(p: Propagation, node: fx.Node) -> Axes:
    """Return no labels: what the values are depends on the position."""
    p.pin_inputs(node, "random numbers follow the width")
    return {}
