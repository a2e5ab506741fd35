"""What removed units still say in evaluation mode, moved to what follows them.

A unit whose scale is zero is not silent: behind its normalisation stands a shift, behind that an activation, and the
next layer receives a constant. Without it the output changes although nothing of value went (a known trap of slimming).
The constant goes into the bias of the layer that consumes the unit, or into the running mean behind a layer without
bias. This is exact where the layer does not pad; padded borders see zeros in the original, and the gap that is left
there is what the probe of ``apply_`` measures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from archsmith.atoms.fingerprint import first_names, unwrap
from archsmith.atoms.masked import MaskedInterpreter
from archsmith.atoms.propagate import arguments, module_name
from archsmith.atoms.rules.table import packet_name
from archsmith.atoms.slices import take
from archsmith.atoms.trace import Forward, call_arguments, export
from archsmith.atoms.units import Cut, TensorCut

CONSTANT = 1e-5
"""Largest spread of a constant activation over examples and positions, relative to its size."""


@dataclass(frozen=True)
class _Consumer:
    """A layer that loses inputs: its operator, its tensors by first name, and where a constant can go."""

    node: fx.Node
    operand: str
    weight: str
    into: str
    sign: int


class Absorber:
    """Computes what to add to biases and running means when units go; to be handed to ``apply_`` as ``absorb``.

    Works for cuts of hand-declared and of found groups: which inputs a layer loses is read off the cut. Activations are
    computed on the example inputs, with the weights of whatever is being cut (the model, an average).

    Args:
        model: The network before the cut; not changed.
        cut: The planned cut.
        example_inputs: What it is called with; real data where ``means`` is used.
        forward: How to call it, see the finder.
        means: Also absorb units that are not constant, by their mean over the examples and positions: the best that a
            bias can do for a living unit. False leaves those alone.

    Attributes:
        notes: Sentences on constants that have nowhere to go.

    Source: NNI issue 2130 and the implementations of network slimming report the loss; exact absorption follows from
    ``w (x + c) = w x + w c``.
    """

    def __init__(
        self,
        model: nn.Module,
        cut: Cut,
        example_inputs: Any,
        forward: Forward | None = None,
        *,
        means: bool = False,
    ) -> None:
        model = unwrap(model)
        self.cut, self.means = cut, means
        self.notes: list[str] = []
        self._program = export(model, example_inputs, forward)
        first = first_names(model)
        self._names = {key: first[name] for key, name in self._program.tensor_names.items()}
        self._inputs = list(tree_leaves(call_arguments(model, example_inputs)))
        self._consumers = list(self._find_consumers())

    def _find_consumers(self) -> list[_Consumer]:
        uses: dict[str, int] = {}
        nodes = [node for node in self._program.graph_module.graph.nodes if _operator(node) in WEIGHTED]
        for node in nodes:
            name = self._tensor(arguments(node)[WEIGHTED[packet_name(node)][1]])
            uses[name] = uses.get(name, 0) + 1
        found = []
        for node in nodes:
            given = arguments(node)
            operand, weight_key, bias_key, axis_of = WEIGHTED[packet_name(node)]
            weight = self._tensor(given[weight_key])
            remains = self.cut.tensors.get(weight)
            if remains is None or not _loses_inputs(remains, axis_of(given)):
                continue
            where = f"constants of removed inputs of '{module_name(node)}'"
            if uses[weight] > 1:
                self.notes.append(f"{where} stay out: the layer is used {uses[weight]} times")
            elif bias := self._tensor(given[bias_key]):
                found.append(_Consumer(node, operand, weight, bias, 1))
            elif mean := self._running_mean_behind(node):
                found.append(_Consumer(node, operand, weight, mean, -1))
            else:
                self.notes.append(f"{where} stay out: it has no bias and no normalisation follows")
        return found

    def _tensor(self, node: object) -> str:
        return self._names.get(node.name, "") if isinstance(node, fx.Node) else ""

    def _running_mean_behind(self, node: fx.Node) -> str:
        users = list(node.users)
        if len(users) != 1 or _operator(users[0]) != "batch_norm":
            return ""
        return self._tensor(arguments(users[0])["running_mean"])

    @torch.no_grad()
    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what to add, by name of the bias or running mean, for these weights."""
        needed = {name: tensors[name].detach() for name in self._names.values()}
        captured = _Capturing(self._program.graph_module, self._names, self._program.constants, needed, self._consumers)
        captured.run_on(self._inputs)
        additions: dict[str, Tensor] = {}
        for consumer in self._consumers:
            constant = self._constant(consumer, captured.inputs[consumer.node], needed[consumer.weight])
            if constant is not None:
                added = consumer.sign * constant
                additions[consumer.into] = additions[consumer.into] + added if consumer.into in additions else added
        return additions

    def _constant(self, consumer: _Consumer, x: Tensor, weight: Tensor) -> Tensor | None:
        """Return the mean of what the removed inputs give to each output, None where they give nothing."""
        given, name = arguments(consumer.node), packet_name(consumer.node)
        operand, weight_key, bias_key, _ = WEIGHTED[name]
        last = name in ("linear", "addmm")
        channels = x.dim() - 1 if last else x.dim() - weight.dim() + 1
        others = [axis for axis in range(x.dim()) if axis != channels]
        center = x.mean(others, keepdim=True)
        spread, size = (x - center).abs().amax(others), x.abs().amax(others)
        chosen = torch.ones_like(size, dtype=torch.bool) if self.means else spread <= CONSTANT * size
        if not bool(chosen.any()):
            return None
        x = center.masked_fill(~chosen.view(center.shape), 0).expand_as(x)
        lost = weight * _lost(weight, self.cut.tensors[consumer.weight])
        bias = weight.new_zeros(weight.shape[1]) if name == "addmm" else None
        values = {operand: x, weight_key: lost, bias_key: bias}
        target = consumer.node.target
        assert isinstance(target, torch._ops.OpOverload)
        y = target(*[values.get(key, argument) for key, argument in given.items() if key not in ("beta", "alpha")])
        out = y.dim() - 1 if last else y.dim() - weight.dim() + 1
        constant: Tensor = y.mean([axis for axis in range(y.dim()) if axis != out])
        return constant if bool(constant.any()) else None


class _Capturing(MaskedInterpreter):
    """Runs the whole graph and keeps the inputs of the consumers."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        names: Mapping[str, str],
        constants: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        consumers: list[_Consumer],
    ) -> None:
        super().__init__(graph_module, names, constants, lambda node: {}, tensors)
        self.wanted = {consumer.node: consumer.operand for consumer in consumers}
        self.inputs: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one operator; of a consumer, keep what goes in."""
        if n in self.wanted:
            self.inputs[n] = self.env[arguments(n)[self.wanted[n]]]
        return super().run_node(n)


def _operator(node: fx.Node) -> str | None:
    """Return an operator's name, None for other nodes."""
    return packet_name(node) if isinstance(node.target, torch._ops.OpOverload) else None


def _second(given: Mapping[str, Any]) -> int:
    return 1


def _first(given: Mapping[str, Any]) -> int:
    return 0


WEIGHTED: dict[str, tuple[str, str, str, Callable[[Mapping[str, Any]], int]]] = {
    "linear": ("input", "weight", "bias", _second),
    "addmm": ("mat1", "mat2", "self", _first),
    **{f"conv{n}d": ("input", "weight", "bias", _second) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": ("input", "weight", "bias", _first) for n in (1, 2, 3)},
}
"""By operator: its arguments for activation, weight and bias, and the weight's axis of the inputs."""


def _loses_inputs(cut: TensorCut, axis: int) -> bool:
    return axis in cut.axes or (cut.joint is not None and axis in cut.joint[0])


def _lost(weight: Tensor, cut: TensorCut) -> Tensor:
    """Return ones where a weight loses elements of rows that stay, zeros elsewhere; of the weight's shape."""
    positions = torch.arange(math.prod(weight.shape)).reshape(weight.shape)
    living = torch.zeros(weight.numel(), dtype=torch.bool)
    living[take(positions, cut).reshape(-1)] = True
    return (~living.reshape(weight.shape)).to(weight)
