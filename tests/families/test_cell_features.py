"""Features of cells: closed forms, what they must not see, and graph networks' inputs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.families.cell_features import (
    NB201_FEATURE_GROUPS,
    cell_words,
    graph_cell_features,
    live_operations,
    nas_bench_201_codes,
    nas_bench_201_features,
    nas_bench_201_graph,
    path_encoding,
    vertex_words,
    word_counts,
    word_shape,
)
from archsmith.families.cell_spaces import NB201_EDGES, NB201_OPERATIONS, nas_bench_201_space
from archsmith.predictors import graph_features


def cell(*codes):
    """Return a cell from codes of edges 01, 02, 12, 03, 13, 23: 0 none, 1 skip, 2 1x1, 3 3x3, 4 pool."""
    return {f"edge/{s}-{t}": NB201_OPERATIONS[c] for (s, t), c in zip(NB201_EDGES, codes, strict=True)}


def test_words_by_hand():
    # paths: 03 = skip; 01-13 = 3x3, 1x1; 02-23 = pool, skip; 01-12-23 = 3x3, none: no path
    assert cell_words((3, 4, 0, 1, 2, 1)) == [(), (1, 0), (2,)]
    assert cell_words((3, 4, 3, 0, 2, 2)) == [(1, 0), (2, 0), (1, 1, 0)]
    assert cell_words((0, 0, 0, 0, 0, 0)) == []


def test_live_operations_by_hand():
    # nothing enters node 1, so its edges are dead; 02-23 lives
    assert live_operations((0, 3, 2, 0, 3, 4)) == (0, 3, 0, 0, 0, 4)
    # nothing leaves node 2
    assert live_operations((3, 3, 3, 1, 2, 0)) == (3, 0, 0, 1, 2, 0)
    assert live_operations((2, 3, 4, 1, 2, 3)) == (2, 3, 4, 1, 2, 3)


def test_word_counts_and_shape_by_hand():
    row = word_counts([(), (1, 0), (1, 0), (2,)], operations=3, longest=3)
    assert row.shape == (40,) and row.sum() == 4
    # places: () 0; (0) (1) (2) 1-3; (0,0) ... (2,2) 4-12, (1,0) the fourth of these
    assert row[0] == 1 and row[3] == 1 and row[4 + 3] == 2
    shape = word_shape([(), (1, 0), (1, 1, 0)], operations=3)
    np.testing.assert_allclose(shape, [1, 2, 0, 3, 3, 0, 5 / 3])
    np.testing.assert_array_equal(word_shape([], operations=3), np.zeros(7))


def test_path_encoding_marks_paths_as_they_are_written():
    row = path_encoding(cell(3, 4, 0, 1, 2, 1))
    # letters: 0 skip, 1 1x1, 2 3x3, 3 pool; places: 4 of one letter, 16 of two, 64 of three
    expected = {0, 4 + 2 * 4 + 1, 4 + 3 * 4 + 0}
    assert row.shape == (84,) and set(np.flatnonzero(row)) == expected and set(row) == {0.0, 1.0}
    assert path_encoding(cell(0, 0, 0, 0, 0, 0)).sum() == 0
    same_twice = path_encoding(cell(3, 3, 0, 0, 2, 2))  # two paths 3x3, 1x1
    assert same_twice.sum() == 1


def test_features_do_not_see_dead_edges():
    for dead in range(5):
        np.testing.assert_array_equal(
            nas_bench_201_features(cell(0, 3, dead, 1, dead, 2)), nas_bench_201_features(cell(0, 3, 0, 1, 0, 2))
        )


def test_features_have_their_groups_and_tell_networks_apart():
    space = nas_bench_201_space()
    rng = np.random.default_rng(0)
    cells = [space.sample(rng) for _ in range(300)]
    rows = np.stack([nas_bench_201_features(each) for each in cells])
    assert rows.shape == (300, sum(NB201_FEATURE_GROUPS)) and np.isfinite(rows).all()
    live = {live_operations(nas_bench_201_codes(each)) for each in cells}
    assert len(np.unique(rows, axis=0)) == len(live)
    hot = rows[:, :30].reshape(-1, 6, 5)
    assert (hot.sum(2) == 1).all()
    np.testing.assert_array_equal(rows[:, -5:], hot.sum(1))  # how many live edges have each operation


def test_graph_of_a_cell():
    adjacency, codes = nas_bench_201_graph(cell(3, 4, 0, 1, 2, 1))
    assert codes.tolist() == [5, 3, 4, 0, 1, 2, 1, 6]
    edges = {(int(i), int(j)) for i, j in np.argwhere(adjacency)}
    # vertices 1 to 6 are the edges 01, 02, 12, 03, 13, 23
    assert edges == {(0, 1), (0, 2), (0, 4), (1, 3), (1, 5), (2, 6), (3, 6), (4, 7), (5, 7), (6, 7)}
    assert graph_features(adjacency, codes, vertices=8, operations=7).shape == (28 + 56,)


def test_vertex_words_equal_enumeration_and_forget_the_numbering():
    rng = np.random.default_rng(1)
    for _ in range(20):
        adjacency = np.triu(rng.random((6, 6)) < 0.6, 1)
        operations = rng.integers(0, 3, 4).tolist()
        literal = []
        for inner in itertools.chain.from_iterable(itertools.combinations(range(1, 5), n) for n in range(5)):
            route = (0, *inner, 5)
            if all(adjacency[a, b] for a, b in itertools.pairwise(route)):
                literal.append(tuple(operations[v - 1] for v in inner))
        assert sorted(vertex_words(adjacency, operations)) == sorted(literal)
    chain = np.zeros((4, 4), bool)
    chain[0, 1] = chain[0, 2] = chain[1, 3] = chain[2, 3] = True
    first = graph_cell_features(chain, [0, 2], kinds=3, longest=5)
    np.testing.assert_array_equal(first, graph_cell_features(chain, [2, 0], kinds=3, longest=5))
    assert first.shape == (364 + 11,)


def test_bad_input_is_named():
    with pytest.raises(UserError, match=r"cell: got .*; allowed: six edges with one of"):
        nas_bench_201_features({"edge/0-1": "none"})
    with pytest.raises(UserError, match="cell: got"):
        path_encoding(cell(0, 0, 0, 0, 0, 0) | {"edge/0-1": "conv"})
    with pytest.raises(UserError, match=r"words: got \(0, 3\); allowed: up to 3 numbers from 0 to 2"):
        word_counts([(0, 3)], operations=3, longest=3)
    with pytest.raises(UserError, match=r"adjacency: got shape \(3, 3\) with 2 operations"):
        vertex_words(np.zeros((3, 3)), [0, 0])
    with pytest.raises(UserError, match="allowed: edges from a vertex to a later one"):
        vertex_words(np.ones((3, 3)), [0])
