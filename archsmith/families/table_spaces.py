"""Small spaces that exist as benchmark tables: NAS-Bench-Macro, NAS-Bench-Graph, FBNet, Once-for-All, and plain rows.

They hold what a search over the table needs; free of torch.

Sources: NAS-Bench-Macro, arXiv 2103.11922; NAS-Bench-Graph, arXiv 2206.09166; FBNet, arXiv 1812.03443; Once-for-All,
arXiv 1908.09791.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from archsmith.families.ofa_mobile_space import ofa_mobile_space
from archsmith.space import Categorical, Count, Predicate, ProductSpace, Value

MACRO_LAYERS = 8

MACRO_OPERATIONS = ("identity", "mbconv_k3_e3", "mbconv_k5_e6")
"""Operations of a layer, in the order of the table's digits 0 to 2."""

GRAPH_LINKS = ("0000", "0001", "0011", "0012", "0013", "0111", "0112", "0122", "0123")
"""Patterns of a graph network: digit k is the source of node k + 1, 0 being the input."""

GRAPH_OPERATIONS = ("gat", "gcn", "gin", "cheb", "sage", "arma", "graph", "fc", "skip")
"""Operations of a node, in the order of the table's digits."""

PROTEIN_OPERATIONS = ("gcn", "sage", "arma", "fc", "skip")
"""The fewer operations of the data set "proteins"."""

FBNET_LAYERS = 22

FBNET_OPERATIONS = ("k3_e1", "k3_e1_g2", "k3_e3", "k3_e6", "k5_e1", "k5_e1_g2", "k5_e3", "k5_e6", "skip")
"""Operations of a layer, in the order of the table's codes: kernel, expansion, groups."""

Tree: TypeAlias = "tuple[tuple[str, Tree], ...]"


def nas_bench_macro_space() -> ProductSpace:
    """Return the 3^8 = 6,561 networks of eight layers: ``layer/<i>`` chooses an operation."""
    layers = {f"layer/{i}": Categorical(MACRO_OPERATIONS, group="layer") for i in range(MACRO_LAYERS)}
    return ProductSpace("nas-bench-macro", layers)


def nas_bench_graph_space(
    operations: tuple[str, ...] = GRAPH_OPERATIONS, *, name: str = "nas-bench-graph"
) -> ProductSpace:
    """Return the graph networks: ``links`` chooses a pattern, ``op/1`` to ``op/4`` the operations of its nodes.

    What ends nowhere is put side by side and goes to the output. Networks that hand the *input* itself to the output (a
    skip from the input that nothing follows) are not part of the benchmark, nor of this space. ``network_digest`` goes
    by ``graph_tree``: 26,206 networks (2,021 of the operations for proteins), as many as the benchmark trained.

    Args:
        operations: Operations of a node; "skip" is the identity.
        name: Name of the space.
    """
    elements = {"links": Categorical(GRAPH_LINKS, group="links")}
    elements |= {f"op/{node}": Categorical(operations, group="op") for node in (1, 2, 3, 4)}
    rule = Predicate("the input itself does not reach the output", _keeps_its_input)
    return ProductSpace(name, elements, constraints=[rule], canonical=graph_tree)


def _keeps_its_input(network: Mapping[str, Value]) -> bool:
    return all(operation != "input" for operation, _ in graph_tree(network))


def nas_bench_graph_proteins_space() -> ProductSpace:
    """Return the smaller space of the data set "proteins"."""
    return nas_bench_graph_space(PROTEIN_OPERATIONS, name="nas-bench-graph-proteins")


def graph_tree(network: Mapping[str, Value]) -> Tree:
    """Return the network as a tree of operations from the input on, equal for equal networks.

    A node is (operation, what follows it, sorted). A skip passes on what it gets: what follows it follows its source.
    If nothing does, its source is one of the outputs: the node ("input", ()) beside whatever else follows, and nothing
    at all where the source ends there anyway.
    """
    after: dict[int, list[int]] = {node: [] for node in range(5)}
    for node, source in enumerate(str(network["links"]), 1):
        after[int(source)].append(node)

    def following(node: int) -> Tree:
        found: list[tuple[str, Tree]] = []
        for each in after[node]:
            below = following(each)
            if network[f"op/{each}"] == "skip":
                found += below or [("input", ())]
            else:
                found.append((str(network[f"op/{each}"]), below))
        return () if node and found == [("input", ())] else tuple(sorted(found))

    return following(0)


def fbnet_space() -> ProductSpace:
    """Return the FBNet networks: ``layer/<i>`` chooses one of nine operations, 9^22 in all."""
    layers = {f"layer/{i}": Categorical(FBNET_OPERATIONS, group="layer") for i in range(FBNET_LAYERS)}
    return ProductSpace("fbnet", layers)


def ofa_mobilenet_space() -> ProductSpace:
    """Return Once-for-All's MobileNetV3 sub-networks: depth per stage, kernel and expansion per layer, resolution.

    ``stage/<s>/depth`` of five stages; ``stage/<s>/<l>/kernel`` and ``stage/<s>/<l>/expand`` of the layers that the
    depth leaves; ``resolution`` of the image.
    """
    return ofa_mobile_space(range(128, 225, 4), name="ofa-mobilenet-v3")


def row_space(name: str, rows: int) -> ProductSpace:
    """Return a space whose only decision is ``row``: for tables that name networks without saying how they are built.

    Args:
        name: Name of the space.
        rows: Number of rows.
    """
    return ProductSpace(name, {"row": Count(0, rows - 1)})
