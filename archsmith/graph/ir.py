"""The graph of a network: operators in execution order over storages.

A *storage* is one block of memory. Tensors that are views of each other, and the results of in-place operators, share
one; that is why memory questions are asked of storages, never of tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["input", "state", "call", "output"]


@dataclass(frozen=True)
class Value:
    """One tensor of the graph.

    Args:
        shape: Its sizes.
        dtype: Its element type without the ``torch.`` prefix, for example ``"float32"``.
        storage: Index of its storage in ``Graph.storage_bytes``.
    """

    shape: tuple[int, ...]
    dtype: str
    storage: int


@dataclass(frozen=True)
class Node:
    """One step of the execution.

    Args:
        name: Unique name.
        kind: ``input`` (an argument of the module), ``state`` (parameter, buffer or constant), ``call`` (an operator)
            or ``output`` (the last node; it reads what the module returns).
        operator: ``"aten.conv2d.default"`` and the like for a call, else empty.
        module: Qualified name of the submodule that issued the call; empty for the module itself and for other kinds.
        inputs: Names of the nodes it takes, each once, in the order of the arguments.
        reads: Storages it needs while it runs, each once.
        values: Tensors it hands on. A view or an in-place operator hands on a storage that exists already.
    """

    name: str
    kind: Kind
    operator: str = ""
    module: str = ""
    inputs: tuple[str, ...] = ()
    reads: tuple[int, ...] = ()
    values: tuple[Value, ...] = ()

    @property
    def storages(self) -> tuple[int, ...]:
        """Storages of its values, each once."""
        return tuple(dict.fromkeys(value.storage for value in self.values))


@dataclass(frozen=True)
class Graph:
    """Nodes in execution order (inputs and state first, the output last) and the size of every storage.

    Args:
        nodes: Steps of the execution.
        storage_bytes: Size in bytes per storage index. A view counts as its whole base, an expanded tensor as the
            little it really holds.
    """

    nodes: tuple[Node, ...]
    storage_bytes: tuple[int, ...]

    @property
    def state(self) -> frozenset[int]:
        """Storages of parameters, buffers and constants, whatever else may be a view of them."""
        return frozenset(s for node in self.nodes if node.kind == "state" for s in node.storages)

    @property
    def outputs(self) -> frozenset[int]:
        """Storages that the module returns."""
        return frozenset(s for node in self.nodes if node.kind == "output" for s in node.reads)
