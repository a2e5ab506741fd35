"""What a cut network must compute: the ORIGINAL graph, its dead units masked where they are consumed.

The interpreter runs the exported original. Whatever sums over an axis with dead positions (matrix products,
convolutions, attention, recurrences) sees zeros there; whatever depends on how many there are (means, variances,
normalisations, softmax, the default scale of attention) counts the living ones only. Elsewhere dead values run along
and reach nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from archsmith.atoms.propagate import LabelledGraph, arguments
from archsmith.atoms.rules.recurrent import CELLS, GATES
from archsmith.atoms.rules.table import packet_name
from archsmith.atoms.units import IntArray

Flags = Mapping[int, Tensor]
"""Dead positions by axis, bool; an element is dead when one of its positions is. Axes without any are not named."""

DeadAxes = Callable[[fx.Node], Flags]
"""Gives the dead positions of a node's result."""


class MaskedInterpreter(fx.Interpreter):
    """Runs an exported graph as if the units marked dead were not there.

    Args:
        graph_module: Exported graph, parameters and buffers as placeholders.
        tensor_names: Name of the parameter or buffer by placeholder name.
        constants: Other placeholders' values by name.
        dead: Dead positions of every node.
        tensors: Parameters and buffers by name; gradients flow to those that require them.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        tensor_names: Mapping[str, str],
        constants: Mapping[str, Any],
        dead: DeadAxes,
        tensors: Mapping[str, Tensor],
    ) -> None:
        super().__init__(graph_module)
        self.tensor_names, self.constants, self.tensors = tensor_names, constants, tensors
        self.dead = dead

    def run_on(self, inputs: Iterable[Any]) -> list[Any]:
        """Run the graph on the flattened inputs and return its flattened outputs."""
        given = iter(inputs)
        values = []
        for node in self.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in self.tensor_names:
                values.append(self.tensors[self.tensor_names[node.name]])
            elif node.name in self.constants:
                values.append(self.constants[node.name])
            else:
                values.append(next(given))
        result = self.run(*values, enable_io_processing=False)
        return list(result) if isinstance(result, list | tuple) else [result]

    def run_node(self, n: fx.Node) -> Any:
        """Run one operator, masked where an operand has dead positions."""
        if n.op != "call_function" or not isinstance(n.target, torch._ops.OpOverload):
            return super().run_node(n)
        name = packet_name(n)
        rule = RULES.get(name)
        if rule is None or not any(self.dead(source) for source in n.all_input_nodes):
            return super().run_node(n)
        with self._set_current_node(n):
            return rule(_Call(self, n, name))


class _Call:
    """One operator with its arguments, their values and their dead positions."""

    def __init__(self, interpreter: MaskedInterpreter, node: fx.Node, name: str) -> None:
        self.interpreter, self.node, self.name = interpreter, node, name
        self.given = arguments(node)

    def value(self, argument: Any) -> Any:
        """Return the value of an argument, lists included."""
        if isinstance(argument, fx.Node):
            return self.interpreter.env[argument]
        if isinstance(argument, list | tuple):
            return type(argument)(self.value(item) for item in argument)
        return argument

    def flags(self, argument: Any) -> Flags:
        """Return the dead positions of an operand by axis."""
        return self.interpreter.dead(argument) if isinstance(argument, fx.Node) else {}

    def filled(self, argument: Any, fill: Any = 0, axes: Iterable[int] | None = None) -> Any:
        """Return an operand with another value at its dead positions.

        Args:
            argument: A node, or a list of them.
            fill: The value.
            axes: Only the dead positions of these axes; None for all.
        """
        if isinstance(argument, list | tuple):
            return type(argument)(self.filled(item, fill, axes) for item in argument)
        value = self.value(argument)
        flags = self.flags(argument)
        chosen = [axis for axis in flags if axes is None or axis in set(axes)]
        if not chosen or not isinstance(value, Tensor):
            return value
        return value.masked_fill(_mask(flags, chosen, value), fill)

    def run(self, replaced: Mapping[str, Any] | None = None) -> Any:
        """Run the operator itself, some arguments replaced by values."""
        replaced = replaced or {}
        target = self.node.target
        assert isinstance(target, torch._ops.OpOverload)
        values = {name: replaced[name] if name in replaced else self.value(a) for name, a in self.given.items()}
        keywords = {a.name for a in target._schema.arguments if a.kwarg_only}
        positional = [value for name, value in values.items() if name not in keywords]
        return target(*positional, **{name: value for name, value in values.items() if name in keywords})


Rule = Callable[[_Call], Any]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return enter


def _mask(flags: Flags, axes: Sequence[int], value: Tensor) -> Tensor:
    """Return where an element is dead on one of ``axes``; broadcasts to ``value``."""
    mask = torch.zeros((1,) * value.dim(), dtype=torch.bool, device=value.device)
    for axis in axes:
        shape = [-1 if i == axis else 1 for i in range(value.dim())]
        mask = mask | flags[axis].to(value.device).view(shape)
    return mask


# --------------------------------------------------------------------- sums: zeros add nothing

_CONVOLUTIONS = [f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)]


@_rule("linear", *_CONVOLUTIONS, "convolution", "_convolution", "matmul", "mm", "bmm", "mv", "dot")
@_rule("addmm", "baddbmm", "addbmm", "addmv")
def _product(call: _Call) -> Any:
    """Zero the dead elements of the first factor; they meet those of the second."""
    names = list(call.given)
    first = names[1] if call.name.startswith("add") or call.name == "baddbmm" else names[0]
    return call.run({first: call.filled(call.given[first])})


@_rule("einsum", "bilinear", "cosine_similarity", "_weight_norm", *GATES, *CELLS)
def _contraction(call: _Call) -> Any:
    """Zero every dead element of activations and weights.

    A recurrent operator is covered by its weights: a dead unit has no incoming and no outgoing ones.
    """
    return call.run({name: call.filled(argument) for name, argument in call.given.items()})


@_rule("scaled_dot_product_attention")
def _attention(call: _Call) -> Any:
    query, key, value = (call.filled(call.given[name]) for name in ("query", "key", "value"))
    replaced: dict[str, Any] = {"query": query, "key": key, "value": value}
    features = call.flags(call.given["query"]).get(query.dim() - 1)
    if call.given["scale"] is None and features is not None:
        replaced["scale"] = 1 / math.sqrt(int((~features).sum()))
    positions = call.flags(call.given["key"]).get(key.dim() - 2)
    if positions is not None:
        living = ~positions.to(key.device)
        mask = call.value(call.given["attn_mask"])
        if call.given["is_causal"]:
            causal = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=key.device).tril()
            mask, replaced["is_causal"] = causal, False
        if mask is None or mask.dtype == torch.bool:
            replaced["attn_mask"] = living.expand(query.shape[-2], -1) if mask is None else mask & living
        else:
            replaced["attn_mask"] = mask.masked_fill(~living, -math.inf)
    return call.run(replaced)


# --------------------------------------------------------------------- reductions over some axes


def _reduced(call: _Call, rank: int) -> list[int]:
    dim = call.given.get("dim")
    if dim is None or dim == []:
        return list(range(rank))
    return [axis % rank for axis in (dim if isinstance(dim, list | tuple) else [dim])]


def _operand(call: _Call) -> Any:
    return call.given["self"] if "self" in call.given else call.given["input"]


def _with_fill(call: _Call, fill: float | bool) -> Any:
    first = next(iter(call.given))
    value = call.value(call.given[first])
    return call.run({first: call.filled(call.given[first], fill, _reduced(call, value.dim()))})


@_rule("sum", "nansum", "norm", "linalg_vector_norm", "count_nonzero", "any", "cumsum")
def _zeros_add_nothing(call: _Call) -> Any:
    order = call.given.get("ord", call.given.get("p"))
    if isinstance(order, int | float) and order < 0:
        return _with_fill(call, math.inf)
    return _with_fill(call, 0)


@_rule("prod", "cumprod", "all")
def _ones_change_nothing(call: _Call) -> Any:
    return _with_fill(call, 1)


@_rule(
    *("amax", "argmax", "logsumexp", "logcumsumexp", "softmax", "_softmax", "log_softmax", "_log_softmax"),
    *("special_softmax", "special_log_softmax"),
)
def _never_the_largest(call: _Call) -> Any:
    return _with_fill(call, _lowest(call))


@_rule("amin", "argmin")
def _never_the_smallest(call: _Call) -> Any:
    return _with_fill(call, -_lowest(call))


@_rule("max", "min")
def _extreme(call: _Call) -> Any:
    if len(call.node.all_input_nodes) == 2:
        return call.run()  # of two tensors, element by element
    return _with_fill(call, _lowest(call) if call.name == "max" else -_lowest(call))


def _lowest(call: _Call) -> float:
    value = call.value(_operand(call))
    return -math.inf if value.is_floating_point() else -torch.iinfo(value.dtype).max


def _living_share(call: _Call, value: Tensor, axes: Sequence[int]) -> tuple[Tensor, int]:
    """Return where ``value`` is dead on ``axes``, and how many elements each reduction over them still has."""
    flags = call.flags(_operand(call))
    mask = _mask(flags, [axis for axis in axes if axis in flags], value)
    count = math.prod(int((~flags[axis]).sum()) if axis in flags else value.shape[axis] for axis in axes)
    return mask, count


def _moments(value: Tensor, mask: Tensor, axes: Sequence[int], count: Tensor | int) -> tuple[Tensor, Tensor]:
    """Return mean and summed squared deviations over the living elements, with the reduced axes kept."""
    mean = value.masked_fill(mask, 0).sum(tuple(axes), keepdim=True) / count
    return mean, (value - mean).masked_fill(mask, 0).square().sum(tuple(axes), keepdim=True)


def _without(value: Tensor, axes: Sequence[int], keepdim: bool) -> Tensor:
    return value if keepdim else value.squeeze(tuple(axes))


@_rule("mean", "var", "std", "var_mean", "std_mean")
def _moment(call: _Call) -> Any:
    value = call.value(_operand(call))
    axes = _reduced(call, value.dim())
    mask, count = _living_share(call, value, axes)
    mean, squares = _moments(value, mask, axes, count)
    keepdim = bool(call.given.get("keepdim", False))
    if call.name == "mean":
        return _without(mean, axes, keepdim)
    correction = call.given.get("correction")
    if correction is None:
        correction = 1 if call.given.get("unbiased", True) else 0
    spread = squares / max(count - correction, 0)
    spread = spread.sqrt() if call.name.startswith("std") else spread
    spread = _without(spread, axes, keepdim)
    return (spread, _without(mean, axes, keepdim)) if call.name.endswith("_mean") else spread


# --------------------------------------------------------------------- normalisations


@_rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def _layer_norm(call: _Call) -> Any:
    value = call.value(call.given["input"])
    axes = list(range(value.dim() - len(call.given["normalized_shape"]), value.dim()))
    mask, count = _living_share(call, value, axes)
    eps = call.given["eps"] if call.given["eps"] is not None else torch.finfo(value.dtype).eps
    if "rms" in call.name:
        squares = value.masked_fill(mask, 0).square().sum(tuple(axes), keepdim=True)
        rest = scale = torch.rsqrt(squares / count + eps)
        result = value * scale
    else:
        mean, squares = _moments(value, mask, axes, count)
        scale, rest = torch.rsqrt(squares / count + eps), mean
        result = (value - mean) * scale
    result = _affine(call, result, [])
    if call.name == "native_layer_norm":
        return result, rest, scale
    return (result, rest) if call.name == "_fused_rms_norm" else result


def _affine(call: _Call, value: Tensor, trailing: list[int]) -> Tensor:
    weight, bias = call.value(call.given.get("weight")), call.value(call.given.get("bias"))
    if weight is not None:
        value = value * weight.reshape(*weight.shape, *trailing)
    return value if bias is None else value + bias.reshape(*bias.shape, *trailing)


@_rule("group_norm")
def _group_norm(call: _Call) -> Any:
    value = call.value(call.given["input"])
    groups, flags = int(call.given["num_groups"]), call.flags(call.given["input"])
    dead = flags.get(1, torch.zeros(value.shape[1], dtype=torch.bool)).to(value.device).view(groups, -1)
    parts = value.reshape(value.shape[0], groups, dead.shape[1], -1)
    count = ((~dead).sum(1) * parts.shape[3]).clamp(min=1).view(1, groups, 1, 1)  # a dead group divides by one
    mean, squares = _moments(parts, dead[None, :, :, None], (2, 3), count)
    result = ((parts - mean) * torch.rsqrt(squares / count + call.given["eps"])).reshape(value.shape)
    return _affine(call, result, [1] * (value.dim() - 2))


@_rule("median", "aminmax", "sort", "argsort", "topk", "multinomial", "unique", "nonzero", "bincount")
def _no_masked_form(call: _Call) -> Any:
    flags = call.flags(_operand(call))
    rank = call.value(_operand(call)).dim()
    if set(flags) & set(_reduced(call, rank)):
        raise NotImplementedError(f"{call.node.target} over an axis that loses positions has no masked form")
    return call.run()


def masked_interpreter(
    graph: LabelledGraph, removed: Mapping[str, Sequence[int] | IntArray], tensors: Mapping[str, Tensor]
) -> MaskedInterpreter:
    """Return the interpreter of a labelled graph without some of its units.

    Args:
        graph: Of the original, from the finder.
        removed: Positions of the removed units by group name.
        tensors: Parameters and buffers by the names of ``graph.tensor_names``.
    """
    units = graph.dead_units(removed)
    known: dict[fx.Node, Flags] = {}

    def dead(node: fx.Node) -> Flags:
        if node not in known:
            results = graph.dead_axes(node, units)
            axes = results[0] if len(results) == 1 else {}
            known[node] = {axis: torch.from_numpy(np.ascontiguousarray(gone)) for axis, gone in axes.items()}
        return known[node]

    return MaskedInterpreter(graph.graph_module, graph.tensor_names, graph.constants, dead, tensors)
