"""Rules: what each operator does to labels. One file per family of operators.

A rule gets the labels of the inputs and returns those of the output; on the way it unites labels that meet. An operator
without a rule pins all its inputs, with its name as the reason.
"""

from __future__ import annotations

from torch import fx

from archsmith.atoms.propagate import Axes, Propagation, Rule
from archsmith.atoms.rules import (
    contraction,
    creation,
    elementwise,
    movement,
    normalisation,
    recurrent,
    reduction,
    spatial,
)
from archsmith.atoms.rules.table import TABLE, packet_name

__all__ = [
    "TABLE",
    "contraction",
    "creation",
    "elementwise",
    "movement",
    "normalisation",
    "recurrent",
    "reduction",
    "rule_for",
    "spatial",
]


def rule_for(node: fx.Node) -> Rule:
    """Return the rule of a node's operator."""
    found = TABLE.get(packet_name(node))
    if found is not None:
        return found
    return elementwise.elementwise if elementwise.is_elementwise(node) else no_rule


def no_rule(p: Propagation, node: fx.Node) -> Axes:
    """Pin everything that goes into an unknown operator."""
    p.pin_inputs(node, "this operator has no rule")
    return {}
