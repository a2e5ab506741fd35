"""The perceptron and the graph network."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from archsmith.core.errors import UserError
from archsmith.predictors import GraphNetwork, Mlp, graph_features


def test_perceptron_bends_and_says_how_well():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (120, 2))
    y = x[:, 0] * x[:, 1]
    model = Mlp(hidden=(32,), epochs=100, folds=2)
    model.fit(x, y)
    found = model.predict(x)
    assert np.abs(found.mean - y).mean() < 0.1 * np.abs(y).mean()
    assert np.ptp(found.std) == 0 and 0 < found.std[0] < y.std()
    alone = Mlp(hidden=(32,), epochs=5, folds=0)
    alone.fit(x, y)
    assert (alone.predict(x).std == 0).all()


def test_graph_features_are_the_triangle_and_the_operations():
    chain = np.array([[0, 1, 0], [0, 0, 1], [0, 0, 0]], bool)
    found = graph_features(chain, [0, 2, 1], vertices=4, operations=3)
    triangle = [1, 0, 0, 1, 0, 0]  # 01, 02, 03, 12, 13, 23
    np.testing.assert_array_equal(found, [*triangle, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0])


def _random_graphs(n, vertices=5, operations=3, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (np.triu(rng.random((vertices, vertices)) < 0.5, 1), rng.integers(0, operations, vertices)) for _ in range(n)
    ]


def _longest(adjacency):
    reach = np.zeros(len(adjacency))
    for j in range(len(adjacency)):
        reach[j] = max((reach[i] + 1 for i in range(j) if adjacency[i, j]), default=0)
    return reach.max()


def test_graph_network_does_not_see_the_numbering_of_vertices_and_learns_from_edges():
    graphs = _random_graphs(150)
    rows = np.stack([graph_features(a, c, vertices=5, operations=3) for a, c in graphs])
    depth = np.array([_longest(a) for a, _ in graphs])
    model = GraphNetwork(vertices=5, operations=3, hidden=32, epochs=60)
    model.fit(rows[:110], depth[:110])
    error = ((model.predict(rows[110:]).mean - depth[110:]) ** 2).mean()
    assert error < 0.5 * depth[110:].var()  # the operations say nothing about depth
    # vertices 1 and 2 of a graph without an edge between them may change places
    adjacency = np.array([[0, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 0, 0]], bool)
    order = [0, 2, 1, 3]
    codes = np.array([0, 1, 2, 0])
    swapped = graph_features(adjacency[np.ix_(order, order)], codes[order], vertices=5, operations=3)
    pair = np.stack([graph_features(adjacency, codes, vertices=5, operations=3), swapped])
    assert (pair[0] != pair[1]).any()
    means = model.predict(pair).mean
    assert means[0] == pytest.approx(means[1], rel=1e-5)


def test_graph_network_leaves_torchs_stream_alone():
    graphs = _random_graphs(10)
    rows = np.stack([graph_features(a, c, vertices=5, operations=3) for a, c in graphs])
    before = torch.get_rng_state()
    model = GraphNetwork(vertices=5, operations=3, hidden=8, epochs=2)
    model.fit(rows, np.arange(10.0))
    assert torch.equal(before, torch.get_rng_state())


def test_bad_input_is_named():
    with pytest.raises(UserError, match="epochs: got 0"):
        Mlp(epochs=0)
    with pytest.raises(UserError, match="folds: got 1; allowed: a number from 2"):
        Mlp(folds=1)
    with pytest.raises(UserError, match="hidden: got 0"):
        GraphNetwork(vertices=3, operations=2, hidden=0)
    with pytest.raises(UserError, match=r"features: got shape \(2, 5\); allowed: shape \(N, 9\)"):
        GraphNetwork(vertices=3, operations=2).fit(np.ones((2, 5)), np.arange(2.0))
    with pytest.raises(UserError, match="allowed: edges from a vertex to a later one"):
        graph_features(np.eye(2), [0, 0], vertices=2, operations=1)
    with pytest.raises(UserError, match="allowed: up to 2 vertices"):
        graph_features(np.zeros((3, 3)), [0, 0, 0], vertices=2, operations=1)
    with pytest.raises(UserError, match="allowed: numbers from 0 to 1"):
        graph_features(np.zeros((2, 2)), [0, 2], vertices=2, operations=2)
