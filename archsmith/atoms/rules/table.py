"""The table of rules by operator, and how a rule gets into it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from archsmith.atoms.propagate import Rule

TABLE: dict[str, Rule] = {}
"""Rule by operator name without namespace and overload; in-place variants share the rule (``relu_`` is ``relu``)."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a function as the rule of the operators with these names."""

    def enter(function: Rule) -> Rule:
        for name in names:
            assert name not in TABLE, f"two rules for {name}"
            TABLE[name] = function
        return function

    return enter


def packet_name(node: fx.Node) -> str:
    """Return the name under which an operator's rule is kept; a namespace other than ``aten`` stays in front."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return str(target)
    namespace, _, name = target._schema.name.partition("::")
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return name if namespace == "aten" else f"{namespace}::{name}"
