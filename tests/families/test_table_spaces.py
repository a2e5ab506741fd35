"""The small spaces of the other tables: sizes, and which graph networks are equal."""

from __future__ import annotations

import numpy as np
import pytest

from archsmith.families.table_spaces import (
    GRAPH_LINKS,
    GRAPH_OPERATIONS,
    fbnet_space,
    graph_tree,
    nas_bench_graph_proteins_space,
    nas_bench_graph_space,
    nas_bench_macro_space,
    ofa_mobilenet_space,
    row_space,
)


def test_sizes() -> None:
    assert nas_bench_macro_space().size == 6561
    assert fbnet_space().size == 9**22
    assert ofa_mobilenet_space().size == 25 * sum(9**depth for depth in (2, 3, 4)) ** 5
    assert row_space("rows", 12).size == 12


def test_the_published_numbers_of_graph_networks() -> None:
    proteins = list(nas_bench_graph_proteins_space().enumerate())
    assert nas_bench_graph_proteins_space().size == len(proteins)
    assert len({graph_tree(network) for network in proteins}) == 2021
    assert len({network.network_digest for network in proteins[::3]}) == len({graph_tree(n) for n in proteins[::3]})


@pytest.mark.slow
def test_the_published_number_of_the_larger_graph_space() -> None:
    assert len({graph_tree(network) for network in nas_bench_graph_space().enumerate()}) == 26206


def outputs(network: dict[str, str], features: np.ndarray) -> list[float]:
    """Run the network literally: each node an injective map of its source, skip the identity; sorted loose ends."""
    values = [features]
    links = network["links"]
    for node, source in enumerate(links, 1):
        op = network[f"op/{node}"]
        x = values[int(source)]
        values.append(x if op == "skip" else np.tanh((1 + GRAPH_OPERATIONS.index(op)) * x + 0.1 * len(op)))
    ends = [node for node in range(1, 5) if str(node) not in links]
    return sorted(float(values[node][0]) for node in ends)


def test_equal_trees_are_equal_outputs() -> None:
    """Counted with multiplicity except that a source which ends anyway says so once."""
    space = nas_bench_graph_space()
    seen: dict[object, list[float]] = {}
    rng = np.random.default_rng(0)
    features = np.array([0.37])
    for _ in range(3000):
        network = space.sample(rng)
        values = sorted(set(np.round(outputs({k: str(v) for k, v in network.items()}, features), 12).tolist()))
        assert seen.setdefault(graph_tree(network), values) == pytest.approx(values)


def test_networks_that_hand_on_their_input_are_not_there() -> None:
    space = nas_bench_graph_space()
    assert not space.contains({"links": "0000", "op/1": "gcn", "op/2": "gcn", "op/3": "gcn", "op/4": "skip"})
    assert space.contains({"links": "0001", "op/1": "gcn", "op/2": "gcn", "op/3": "gcn", "op/4": "skip"})
    assert space.contains({"links": "0123", "op/1": "skip", "op/2": "gcn", "op/3": "skip", "op/4": "skip"})
    assert GRAPH_LINKS[8] == "0123"
