"""Labels carried through an exported graph: what every rule works on, and what comes out.

A tensor of the graph has labels per axis; an axis without labels is constant: all of its positions stay. An element is
dead when one of its labels is. The rules (``rules/``) say for one operator at a time what its output's labels are and
which labels meet.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from archsmith.atoms.labels import BoolArray, Cause, IntArray, Labels

Axes = dict[int, IntArray]
"""Labels by axis; axes of length one and constant axes are not named."""

Rule = Callable[["Propagation", fx.Node], Axes | list[Axes]]


@dataclass(frozen=True, eq=False)
class Change:
    """A reduction over labelled positions: removing some of them changes what it returns."""

    labels: IntArray
    text: str


@dataclass(frozen=True, eq=False)
class Split:
    """A split of a labelled axis into pieces of equal length: as many must be left in each."""

    pieces: tuple[IntArray, ...]
    cause: Cause


@dataclass(frozen=True, eq=False)
class Expected:
    """A literal argument that counts labels: it must equal the number of living ones.

    Attributes:
        node: Node with the argument.
        argument: Its name in the operator's schema.
        position: Entry, where the argument is a list; None for a number.
        labels: What it counts.
    """

    node: fx.Node
    argument: str
    position: int | None
    labels: IntArray


@dataclass(frozen=True, eq=False)
class Literal:
    """A size written out in a view: what has it in common must keep equal widths.

    Attributes:
        module: Qualified name of the module that issued the view.
        axis: Axis of the view's result.
        labels: Its labels.
    """

    module: str
    axis: int
    labels: IntArray


@dataclass(eq=False)
class Propagation:
    """Labels of every tensor of a graph, while they are found.

    Attributes:
        labels: The labels.
        axes: Labels by node; a list for operators with several results.
        changes: Reductions met.
        splits: Equal splits met.
        expected: Literal arguments that count labels.
        literals: Sizes written out in views.
    """

    labels: Labels
    axes: dict[fx.Node, Axes | list[Axes]] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    expected: list[Expected] = field(default_factory=list)
    literals: list[Literal] = field(default_factory=list)
    node: fx.Node | None = None

    # What a rule asks.

    def of(self, node: object) -> Axes:
        """Return the labels of a tensor by axis; nothing for numbers and constants."""
        axes = self.axes.get(node, {}) if isinstance(node, fx.Node) else {}
        return axes if isinstance(axes, dict) else {}

    def on(self, node: object, axis: int) -> IntArray | None:
        """Return the labels of one axis, None where it is constant."""
        if not isinstance(node, fx.Node):
            return None
        return self.of(node).get(axis % max(len(shape(node)), 1))

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """Return the arguments of an operator by their names, defaults included."""
        return arguments(node)

    def cause(self, reason: str) -> Cause:
        """Return a cause at the present operator."""
        assert self.node is not None
        return Cause(operator_name(self.node), module_name(self.node), reason)

    # What a rule does.

    def meet(
        self, first: IntArray | None, second: IntArray | None, reason: str = "meets a tensor of fixed width"
    ) -> None:
        """Unite labels position by position; labels that meet a constant axis (None) are pinned."""
        if first is None and second is None:
            return
        if first is None or second is None:
            present = first if first is not None else second
            assert present is not None
            self.pin(present, reason)
            return
        self.labels.join(first, second, self.cause(reason))

    def pin(self, labels: IntArray | None, reason: str) -> None:
        """Pin labels, where there are any."""
        if labels is not None:
            self.labels.pin(labels, self.cause(reason))

    def pin_inputs(self, node: fx.Node, reason: str) -> None:
        """Pin everything that goes into an operator."""
        for source in node.all_input_nodes:
            axes = self.axes.get(source, {})
            for one in axes if isinstance(axes, list) else [axes]:
                for labels in one.values():
                    self.pin(labels, reason)

    def change(self, labels: IntArray | None, what: str) -> None:
        """Note a reduction over labels: removing some of them changes its result."""
        if labels is not None:
            assert self.node is not None
            self.changes.append(Change(labels, f"{what} {module_name(self.node)}".strip()))

    def expect(self, argument: str, labels: IntArray | None, position: int | None = None) -> None:
        """Note that a literal argument of the present operator counts labels."""
        if labels is not None:
            assert self.node is not None
            self.expected.append(Expected(self.node, argument, position, labels))

    def spread(self, given: Tensor) -> Axes:
        """Return labels per axis of a field that may vary along several axes.

        Args:
            given: Labels, of the shape of the activation or broadcast to it.
        """
        for axis, stride in enumerate(given.stride()):
            if stride == 0 and given.shape[axis] > 1:
                given = given.narrow(axis, 0, 1)
        values = self.labels.roots(given.numpy())
        for axis in range(values.ndim):
            if values.shape[axis] > 1 and bool((values == values.take([0], axis)).all()):
                values = values.take([0], axis)
        varying = [axis for axis, n in enumerate(values.shape) if n > 1]
        if not varying:
            self.pin(values.ravel(), "is reduced to one position, or used as a whole")
            return {}
        if len(varying) == 1:
            return {varying[0]: values.ravel()}
        parts = self.labels.factor(
            values.reshape([values.shape[axis] for axis in varying]),
            self.cause("shares rows or columns with a constant"),
        )
        return dict(zip(varying, parts, strict=True))

    def merged(self, several: Sequence[Axes]) -> Axes:
        """Return the labels of a tensor for which several fields hold at once."""
        found: dict[int, list[IntArray]] = {}
        for axes in several:
            for axis, labels in axes.items():
                found.setdefault(axis, []).append(labels)
        return {a: each[0] if len(each) == 1 else self.labels.product(each) for a, each in sorted(found.items())}

    def run(self, nodes: Sequence[fx.Node], rules: Callable[[fx.Node], Rule]) -> None:
        """Carry the labels through the operators ``nodes``, in order; sources are in ``axes`` already."""
        for node in nodes:
            self.node = node
            if node.target is operator.getitem:
                source, index = node.args
                assert isinstance(source, fx.Node) and isinstance(index, int)
                axes = self.axes.get(source, {})
                self.axes[node] = axes[index] if isinstance(axes, list) else {}
                continue
            found = rules(node)(self, node)
            sizes = [shape(value) for value in values_of(node)]
            for one, size in zip(found if isinstance(found, list) else [found], sizes, strict=False):
                for axis, labels in one.items():
                    assert len(labels) == size[axis], f"{node}: {len(labels)} labels on axis {axis} of {size}"
            self.axes[node] = found


def shape(node: fx.Node | Tensor) -> tuple[int, ...]:
    """Return the sizes of a tensor of the graph."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else node
    return tuple(int(n) for n in value.shape) if isinstance(value, Tensor) else ()


def values_of(node: fx.Node) -> list[Tensor]:
    """Return the example tensors that a node hands on."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return [value]
    return [v for v in value if isinstance(v, Tensor)] if isinstance(value, list | tuple) else []


def arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of an operator by their names, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    found: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            found[argument.name] = node.args[index]
        elif argument.name in node.kwargs:
            found[argument.name] = node.kwargs[argument.name]
        else:
            found[argument.name] = argument.default_value if argument.has_default_value() else None
    return found


def operator_name(node: fx.Node) -> str:
    """Return the operator as torch names it."""
    return str(node.target) if node.op == "call_function" else node.op


def module_name(node: fx.Node) -> str:
    """Return the qualified name of the submodule that issued a node."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((str(name) for name, _ in reversed(stack.values())), "")


@dataclass(eq=False)
class LabelledGraph:
    """An exported graph with labels on every tensor.

    Attributes:
        graph_module: The exported graph (aten operators); parameters, buffers, constants and inputs are placeholders.
        tensor_names: Qualified name of the parameter or buffer by placeholder name; tied tensors have one name.
        constants: Other tensors that the export lifted, by placeholder name.
        input_names: Placeholders of the inputs, in the order of the flattened arguments.
        propagation: Labels by node.
        sources: Labels of every parameter and buffer by axis, by qualified name.
        shapes: Their shapes.
    """

    graph_module: fx.GraphModule
    tensor_names: Mapping[str, str]
    constants: Mapping[str, Any]
    input_names: tuple[str, ...]
    propagation: Propagation
    sources: dict[str, Axes]
    shapes: dict[str, tuple[int, ...]]
    units: dict[str, IntArray] = field(default_factory=dict)
    _nodes: dict[str, fx.Node] = field(default_factory=dict)

    @property
    def labels(self) -> Labels:
        """The labels."""
        return self.propagation.labels

    def dead_units(self, removed: Mapping[str, Sequence[int] | IntArray]) -> BoolArray:
        """Return which classes of labels are dead when units of the groups go.

        Args:
            removed: Positions of the removed units by group name.
        """
        dead = np.zeros(len(self.labels), dtype=np.bool_)
        for name, positions in removed.items():
            dead[self.units[name][np.asarray(positions, dtype=np.int64)]] = True
        return dead

    def dead_axes(self, node: fx.Node, dead: BoolArray) -> list[dict[int, BoolArray]]:
        """Return the dead positions by axis for every result of a node; only axes that lose some are named."""
        axes = self.propagation.axes.get(node, {})
        found = []
        for one in axes if isinstance(axes, list) else [axes]:
            gone = {axis: self.labels.dead(labels, dead) for axis, labels in one.items()}
            found.append({axis: flags for axis, flags in gone.items() if flags.any()})
        return found

    def dead(self, node_name: str, removed: Mapping[str, Sequence[int] | IntArray] | BoolArray) -> torch.Tensor | None:
        """Return the positions of a node's output that are dead when units go.

        Args:
            node_name: A node with one tensor as its result (the parts of a split are the ``getitem`` nodes).
            removed: Positions of the removed units by group name, or what ``dead_units`` returned for them.

        Returns:
            Boolean tensor that broadcasts to the output's shape; None when nothing of it is dead.
        """
        if not self._nodes:
            self._nodes = {node.name: node for node in self.graph_module.graph.nodes}
        node = self._nodes[node_name]
        axes = self.propagation.axes.get(node, {})
        if isinstance(axes, list) or not axes:
            return None
        dead = removed if isinstance(removed, np.ndarray) else self.dead_units(removed)
        mask: torch.Tensor | None = None
        rank = len(shape(node))
        for axis, flags in self.dead_axes(node, dead)[0].items():
            one = torch.from_numpy(flags).view([-1 if i == axis else 1 for i in range(rank)])
            mask = one if mask is None else mask | one
        return mask

    def operators(self) -> Iterator[fx.Node]:
        """Iterate over the operators of the graph in order."""
        return (node for node in self.graph_module.graph.nodes if node.op == "call_function")
