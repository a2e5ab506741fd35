"""Which storages are alive when, and the most memory that they need at once.

The rule is that of a perfect caller: a storage is allocated by the operator that makes it and freed after the last
operator that reads it or any view of it. While an operator runs, what it reads and what it makes are both alive.
Scratch memory inside an operator and the allocator's rounding are not part of the graph, hence not of the number.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from archsmith.graph.ir import Graph


@dataclass(frozen=True)
class Timeline:
    """Memory over the execution of a graph.

    Args:
        live_bytes: Per node of the graph, in order, the bytes alive while it runs.
        spans: Storage to (first node, last node) during which it is alive, both included, as indices of nodes.
    """

    live_bytes: tuple[int, ...]
    spans: dict[int, tuple[int, int]]


@dataclass(frozen=True)
class Peak:
    """The moment of greatest need.

    Args:
        bytes: Bytes of all activations alive at that moment.
        node: Name of the first node at which they are needed.
        operator: Its operator; empty when the inputs or the outputs alone are the peak.
        module: Qualified name of the submodule that issued it.
    """

    bytes: int
    node: str
    operator: str
    module: str


def liveness(graph: Graph) -> Timeline:
    """Return when each activation storage of ``graph`` is alive.

    Inputs are alive from the very start until their last reader (an unread one only at the start), outputs until the
    end, because the output node reads them. Parameters, buffers and constants, and their views, are not counted.
    """
    state = graph.state
    spans: dict[int, tuple[int, int]] = {}
    for index, node in enumerate(graph.nodes):
        for storage in (*node.storages, *node.reads):
            if storage not in state:
                born = 0 if node.kind == "input" else index
                spans[storage] = (spans.get(storage, (born, born))[0], index)

    # Bytes change when a storage is born and after it died, so a running sum over the changes is the whole timeline.
    change = [0] * (len(graph.nodes) + 1)
    for storage, (born, died) in spans.items():
        change[born] += graph.storage_bytes[storage]
        change[died + 1] -= graph.storage_bytes[storage]
    return Timeline(tuple(accumulate(change[:-1])), spans)


def peak_activation(graph: Graph) -> Peak:
    """Return the greatest memory, in bytes, that the activations of ``graph`` need at once, and where."""
    live = liveness(graph).live_bytes
    if not live:
        return Peak(0, "", "", "")
    index = max(range(len(live)), key=live.__getitem__)
    node = graph.nodes[index]
    return Peak(live[index], node.name, node.operator, node.module)
