"""The DARTS space: two cells of four nodes with two incoming edges each, without the networks and without torch.

Nodes of a cell are numbered: 0 is the output of the cell before the previous one, 1 the output of the previous cell,
2, 3, ... are the cell's own. Before anything is chosen, own node i (from 0) has an edge from each of the i + 2 nodes in
front of it; edges are numbered node by node, source by source: 14 for four nodes.

Source: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", arXiv 1806.09055.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeAlias

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Categorical, Given, Has, ProductSpace, Space, Subset, Value

DARTS_OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""Candidates of an edge of the search network, in the paper's order; a finished cell never has ``none``."""

EXTRA_OPERATIONS = ("noise",)
"""Candidates of restricted spaces alone."""

SHARP_OPERATIONS = (
    "none",
    "max_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "dil_conv_3x3",
    "flood_conv_3x3",
    "dil_flood_conv_3x3",
    "choke_conv_3x3",
    "dil_choke_conv_3x3",
)
"""Candidates of sharpDARTS (arXiv 1903.09900), its set PRIMITIVES: narrow and wide middles in place of 5x5 kernels."""

SHARPER_OPERATIONS = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "sep_conv_7x7",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "flood_conv_3x3",
    "flood_conv_5x5",
    "dil_flood_conv_3x3",
)
"""Its larger set, SHARPER_PRIMITIVES."""

OPERATION_SETS = {"darts": DARTS_OPERATIONS, "sharp": SHARP_OPERATIONS, "sharper": SHARPER_OPERATIONS}
"""Published sets of candidates by name; sharpDARTS searched all three, with its own convolutions behind them."""

CELLS = ("normal", "reduce")

EdgeOperations: TypeAlias = "tuple[tuple[tuple[str, ...], ...], tuple[tuple[str, ...], ...]]"
"""Candidates of each edge of a normal and of a reduction cell."""

NODES = 4
"""Own nodes of a cell."""

Edge: TypeAlias = tuple[str, int]
"""Operation and the node that it reads."""


@dataclass(frozen=True)
class Genotype:
    """Both cells of a network.

    Attributes:
        normal: Operation and source of the two edges of each own node, node by node. Of a node's two edges the stronger
            one stands first where a search says so; their order changes no function.
        reduce: The same for the cell that halves the resolution.
        normal_concat: Nodes whose concatenation is the output of a normal cell.
        reduce_concat: The same of a reduction cell.
    """

    normal: tuple[Edge, ...]
    reduce: tuple[Edge, ...]
    normal_concat: tuple[int, ...] = (2, 3, 4, 5)
    reduce_concat: tuple[int, ...] = (2, 3, 4, 5)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Genotype:
        """Return the genotype that ``to_json`` wrote."""
        normal, reduce = (tuple((str(name), int(source)) for name, source in data[cell]) for cell in CELLS)
        outputs, halved_outputs = (tuple(int(node) for node in data[f"{cell}_concat"]) for cell in CELLS)
        return cls(normal, reduce, outputs, halved_outputs)

    def to_json(self) -> dict[str, Any]:
        """Return the genotype as plain JSON values."""
        cells = {cell: [list(edge) for edge in getattr(self, cell)] for cell in CELLS}
        return {**cells, **{f"{cell}_concat": list(getattr(self, f"{cell}_concat")) for cell in CELLS}}


def edges_of(nodes: int = NODES) -> tuple[tuple[int, int], ...]:
    """Return (source, target) of every edge of a cell with this many own nodes, in the order of the edges' numbers."""
    return tuple((source, target) for target in range(2, nodes + 2) for source in range(target))


def darts_space(
    nodes: int = NODES,
    operations: Sequence[str] = DARTS_OPERATIONS,
    edge_operations: EdgeOperations | None = None,
    *,
    name: str = "darts",
) -> ProductSpace:
    """Return the space of cell pairs.

    For each cell and own node i: ``<cell>/<i>/inputs``, two of the i + 2 nodes in front of it; ``<cell>/<i>/first_op``
    and ``second_op``, the operations on the edge from the lower and from the higher of the two. Where edges have
    candidates of their own, in place of these ``<cell>/<i>/op_from_<j>`` for each j of the two.

    Args:
        nodes: Own nodes of a cell, from 1. Four give 1,037,664,180 cells.
        operations: Candidates; ``none`` is left out.
        edge_operations: Candidates of each edge, in place of ``operations``.
        name: Of the space, for four nodes; other numbers are added to it.

    Raises:
        UserError: ``nodes`` is not a positive integer, or another number of edges.
    """
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1:
        raise UserError("nodes", nodes, allowed="an integer from 1")
    if edge_operations is not None:
        return _space_of_edges(nodes, edge_operations)
    options = tuple(operation for operation in operations if operation != "none")
    elements: dict[str, Categorical | Subset] = {}
    for cell in CELLS:
        for node in range(nodes):
            elements[f"{cell}/{node}/inputs"] = Subset(tuple(range(node + 2)), 2, 2, group="inputs")
            elements[f"{cell}/{node}/first_op"] = Categorical(options, group="operation")
            elements[f"{cell}/{node}/second_op"] = Categorical(options, group="operation")
    return ProductSpace(name if nodes == NODES else f"{name}-{nodes}", elements)


def _space_of_edges(nodes: int, edge_operations: EdgeOperations) -> ProductSpace:
    """Return the space whose edges have candidates of their own."""
    edges = edges_of(nodes)
    if len(edge_operations) != len(CELLS) or any(len(of_cell) != len(edges) for of_cell in edge_operations):
        raise UserError("edge_operations", edge_operations, allowed=f"candidates of {len(edges)} edges of both cells")
    elements: dict[str, Subset | Given] = {}
    for cell, of_cell in zip(CELLS, edge_operations, strict=True):
        for node in range(nodes):
            inputs = f"{cell}/{node}/inputs"
            elements[inputs] = Subset(tuple(range(node + 2)), 2, 2, group="inputs")
            for (source, target), names in zip(edges, of_cell, strict=True):
                if target == node + 2:
                    options = tuple(name for name in names if name != "none")
                    choice = Categorical(options, group=f"operation {cell} {source}-{target}")
                    elements[f"{cell}/{node}/op_from_{source}"] = Given(Has(inputs, source), choice)
    return ProductSpace("darts-edges", elements)


def genotype_of(decisions: Mapping[str, Any]) -> Genotype:
    """Return the cells of an architecture (or of a plain mapping of its decisions), edges in the order of sources."""
    cells: dict[str, tuple[Edge, ...]] = {}
    for cell in CELLS:
        edges: list[Edge] = []
        for node in count():
            if f"{cell}/{node}/inputs" not in decisions:
                break
            first, second = decisions[f"{cell}/{node}/inputs"]
            for source, place in ((first, "first_op"), (second, "second_op")):
                own = f"{cell}/{node}/op_from_{source}"  # where edges have candidates of their own
                name = decisions[own] if own in decisions else decisions[f"{cell}/{node}/{place}"]
                edges.append((str(name), int(source)))
        cells[cell] = tuple(edges)
    concat = tuple(range(2, 2 + len(cells["normal"]) // 2))
    return Genotype(**cells, normal_concat=concat, reduce_concat=concat)


def architecture_of(genotype: Genotype, space: Space | None = None) -> Architecture:
    """Return the genotype as a point of its space; the order of a node's two edges is lost, it changes nothing.

    Args:
        genotype: Two cells.
        space: One of ``darts_space``; that of all DARTS operations with as many nodes if None.

    Raises:
        UserError: The cells differ in size, do not output all their own nodes, or hold an edge that no cell of the
            space has (cells found elsewhere may use a node twice; ``DartsNetwork`` still builds them).
    """
    nodes = len(genotype.normal) // 2
    every = tuple(range(2, nodes + 2))
    if len(genotype.reduce) != len(genotype.normal) or {genotype.normal_concat, genotype.reduce_concat} != {every}:
        raise UserError("genotype", genotype, allowed="two cells of equally many nodes that output all of them")
    space = darts_space(nodes) if space is None else space
    by_edge = isinstance(space, ProductSpace) and f"{CELLS[0]}/0/op_from_0" in space.paths
    decisions: dict[str, Value] = {}
    for cell in CELLS:
        edges: tuple[Edge, ...] = getattr(genotype, cell)
        for node in range(nodes):
            (first_op, first), (second_op, second) = sorted(edges[2 * node : 2 * node + 2], key=lambda edge: edge[1])
            decisions[f"{cell}/{node}/inputs"] = (first, second)
            decisions[f"{cell}/{node}/op_from_{first}" if by_edge else f"{cell}/{node}/first_op"] = first_op
            decisions[f"{cell}/{node}/op_from_{second}" if by_edge else f"{cell}/{node}/second_op"] = second_op
    return space.validate(decisions)


DARTS_V1 = Genotype(
    normal=(
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0),
        ("skip_connect", 0),
        ("sep_conv_3x3", 1),
        ("skip_connect", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0),
        ("skip_connect", 2),
    ),
    reduce=(
        ("max_pool_3x3", 0),
        ("max_pool_3x3", 1),
        ("skip_connect", 2),
        ("max_pool_3x3", 0),
        ("max_pool_3x3", 0),
        ("skip_connect", 2),
        ("skip_connect", 2),
        ("avg_pool_3x3", 0),
    ),
)
"""The published cells of the first-order search."""

DARTS_V2 = Genotype(
    normal=(
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0),
        ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 1),
        ("skip_connect", 0),
        ("skip_connect", 0),
        ("dil_conv_3x3", 2),
    ),
    reduce=(
        ("max_pool_3x3", 0),
        ("max_pool_3x3", 1),
        ("skip_connect", 2),
        ("max_pool_3x3", 1),
        ("max_pool_3x3", 0),
        ("skip_connect", 2),
        ("skip_connect", 2),
        ("max_pool_3x3", 1),
    ),
)
"""The published cells of the second-order search."""


_SHORT = {
    "max": "max_pool_3x3",
    "avg": "avg_pool_3x3",
    "skip": "skip_connect",
    "sep3": "sep_conv_3x3",
    "dil3": "dil_conv_3x3",
    "dil5": "dil_conv_5x5",
}


def _pairs(text: str) -> tuple[tuple[str, ...], ...]:
    """Return the candidates of edges written "skip/dil3 ..."."""
    return tuple(tuple(_SHORT[name] for name in edge.split("/")) for edge in text.split())


RESTRICTED: dict[str, dict[str, Any]] = {
    "s1": {
        "edge_operations": (
            _pairs(
                "skip/dil3 skip/dil5 skip/dil5 skip/sep3 skip/dil3 max/skip skip/sep3 "
                "skip/sep3 skip/dil3 skip/sep3 max/skip skip/dil3 dil3/dil5 dil3/dil5"
            ),
            _pairs(
                "max/avg max/dil3 max/avg max/avg skip/dil5 max/avg max/sep3 "
                "skip/dil3 skip/dil5 max/avg max/avg skip/dil5 skip/dil5 skip/dil5"
            ),
        )
    },
    "s2": {"operations": ("skip_connect", "sep_conv_3x3")},
    "s3": {"operations": ("none", "skip_connect", "sep_conv_3x3")},
    "s4": {"operations": ("noise", "sep_conv_3x3")},
    "s5": {"operations": DARTS_OPERATIONS[1:]},
}
"""Spaces in which DARTS fails (Zela et al., "Understanding and Robustifying Differentiable Architecture Search", arXiv
1909.09656): two operations on every edge that differ from edge to edge; skip and convolution; these and none; noise and
convolution. "s5" is the space of DARTS without ``none`` (arXiv 2108.04392)."""
