"""A cut network, the slow and literal way: the ORIGINAL graph with dead positions zeroed at every consumer.

Operators that a removal changes by definition (normalisations, means, softmax, maxima over removed positions) run on
the living positions only and are put back in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from archsmith.atoms.find import FoundAtoms
from archsmith.atoms.propagate import arguments
from archsmith.atoms.rules.table import packet_name

REDUCTIONS = {
    "layer_norm", "rms_norm", "group_norm", "mean", "var", "std", "var_mean", "softmax", "log_softmax", "amax", "amin",
    "max", "min", "logsumexp", "prod", "cumprod", "native_layer_norm",
}  # fmt: skip


def masked_outputs(found: FoundAtoms, removed: Any, inputs: list[Tensor]) -> list[Tensor]:
    """Return the outputs of the original with the units masked, in double precision.

    Args:
        found: Units of the model, in evaluation mode.
        removed: Positions by group name.
        inputs: The flattened inputs.
    """
    graph = found.labelled
    dead = graph.dead_units(removed)
    tensors = dict(found.model.named_parameters(remove_duplicate=False))
    tensors.update(found.model.named_buffers(remove_duplicate=False))
    feed = dict(zip(graph.input_names, inputs, strict=True))

    def living(node: Any, value: Tensor, result: int = 0) -> Tensor:
        axes = graph.dead_axes(node, dead)
        for axis, flags in (axes[result] if result < len(axes) else {}).items():
            value = value.index_select(axis, torch.from_numpy((~flags).nonzero()[0]))
        return value

    def zeroed(node: Any, value: Tensor, result: int = 0) -> Tensor:
        """Zero dead positions in place: views and what they are views of stay one."""
        axes = graph.dead_axes(node, dead)
        for axis, flags in (axes[result] if result < len(axes) else {}).items():
            mask = torch.from_numpy(flags).view([-1 if i == axis else 1 for i in range(value.dim())])
            value = value.masked_fill(mask, 0) if 0 in value.stride() else value.masked_fill_(mask, 0)
        return value

    def put_back(node: Any, value: Tensor, result: int = 0) -> Tensor:
        axes = graph.dead_axes(node, dead)
        for axis, flags in (axes[result] if result < len(axes) else {}).items():
            size = list(value.shape)
            size[axis] = len(flags)
            where = torch.from_numpy((~flags).nonzero()[0])
            value = value.new_zeros(size).index_copy(axis, where, value)
        return value

    class Masked(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if n.op == "placeholder":
                name = graph.tensor_names.get(n.name)
                value = tensors[name] if name is not None else feed.get(n.name, graph.constants.get(n.name))
                if not isinstance(value, Tensor):
                    return value
                value = value.double() if value.is_floating_point() else value
                return zeroed(n, value.clone())
            if n.op != "call_function":
                return super().run_node(n)
            reduces = isinstance(n.target, torch._ops.OpOverload) and packet_name(n) in REDUCTIONS
            if reduces:
                value = self._on_living(n)
            else:
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                value = n.target(*_doubles(args), **_doubles(kwargs))
            if isinstance(value, Tensor):
                return value if reduces else zeroed(n, value)
            if isinstance(value, list | tuple) and not reduces:
                return [zeroed(n, v, i) if isinstance(v, Tensor) else v for i, v in enumerate(value)]
            return value

        def _on_living(self, n: fx.Node) -> Any:
            given = dict(arguments(n))
            for name, value in given.items():
                if isinstance(value, fx.Node):
                    given[name] = living(value, self.env[value])
            expected = {(e.argument, e.position): e for e in graph.propagation.expected if e.node is n}
            for (name, position), e in expected.items():
                count = int((~graph.labels.dead(e.labels, dead)).sum())
                if position is None:
                    given[name] = count
                else:
                    given[name] = [count if i == position else x for i, x in enumerate(given[name])]
            schema = n.target._schema.arguments
            positional = [given[a.name] for a in schema if not a.kwarg_only]
            keywords = {a.name: given[a.name] for a in schema if a.kwarg_only}
            value = n.target(*_doubles(positional), **_doubles(keywords))
            if isinstance(value, Tensor):
                return put_back(n, value)
            return [put_back(n, v, i) for i, v in enumerate(value)]

    with torch.no_grad():
        outputs = Masked(found.labelled.graph_module).run(*([None] * _placeholders(graph.graph_module)))
    return [o for o in outputs if isinstance(o, Tensor)]


def _placeholders(graph_module: fx.GraphModule) -> int:
    return sum(node.op == "placeholder" for node in graph_module.graph.nodes)


def _doubles(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    if isinstance(value, dict):
        return {k: _doubles(v) for k, v in value.items()}
    return type(value)(_doubles(v) for v in value) if isinstance(value, list | tuple) else value
