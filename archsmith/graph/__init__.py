"""Modules as graphs: export of an ``nn.Module`` and what can be read off the graph without computing anything.

- ``export_graph(module, inputs)``: the operators in execution order, with the storages they make, read and share
- ``liveness(graph)``, ``peak_activation(graph)``: which tensors are alive when, and the most memory they need at once
- ``evaluating(module)``: evaluation mode for a while, every submodule's own flag restored
"""

from archsmith.graph.export import Inputs, as_inputs, attributes_kept, evaluating, export_graph, quiet_tracing
from archsmith.graph.ir import Graph, Node, Value
from archsmith.graph.liveness import Peak, Timeline, liveness, peak_activation

__all__ = [
    "Graph",
    "Inputs",
    "Node",
    "Peak",
    "Timeline",
    "Value",
    "as_inputs",
    "attributes_kept",
    "evaluating",
    "export_graph",
    "liveness",
    "peak_activation",
    "quiet_tracing",
]
