"""The NAS-Bench-101 space: counts, isomorphism, the benchmark's hash, completable walks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import permutations, product

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.families.graph_cells import Cell, GraphCellSpace, graph_hash, nas_bench_101_space
from archsmith.space import Architecture, Value, first_allowed


def small() -> GraphCellSpace:
    return GraphCellSpace("small", vertices=5, edges=5, operations=("conv", "pool"))


def brute_force(vertices: int, edges: int, operations: int) -> list[Cell]:
    """Every cell, by trying all sets of edges and following them from both ends."""
    pairs = [(i, j) for i in range(vertices) for j in range(i + 1, vertices)]
    found = []
    for flags in product((False, True), repeat=len(pairs)):
        chosen = tuple(pair for pair, flag in zip(pairs, flags, strict=True) if flag)
        forwards, backwards = {0}, {vertices - 1}
        for _ in range(vertices):
            forwards |= {j for i, j in chosen if i in forwards}
            backwards |= {i for i, j in chosen if j in backwards}
        if len(chosen) <= edges and len(forwards & backwards) == vertices:
            found += [Cell(vertices, chosen, ops) for ops in product(range(operations), repeat=vertices - 2)]
    return found


def isomorphic(first: Cell, second: Cell) -> bool:
    if first.vertices != second.vertices or len(first.edges) != len(second.edges):
        return False
    for order in permutations(range(1, first.vertices - 1)):
        new = (0, *order, first.vertices - 1)
        edges = {(new[i], new[j]) for i, j in first.edges}
        same = all(first.operations[v - 1] == second.operations[new[v] - 1] for v in range(1, first.vertices - 1))
        if edges == set(second.edges) and same:
            return True
    return False


def test_the_cells_are_those_of_brute_force() -> None:
    space = small()
    everything = [space.cell(architecture) for architecture in space.enumerate()]
    expected = [cell for count in range(2, 6) for cell in brute_force(count, 5, 2)]
    assert space.size == len(everything) == len(expected)
    assert set(everything) == set(expected)


def test_digests_are_isomorphism() -> None:
    space = small()
    groups = defaultdict(list)
    for architecture in space.enumerate():
        groups[architecture.network_digest].append(space.cell(architecture))
    classes = list(groups.values())
    assert len(classes) < space.size
    for members in classes:
        assert all(isomorphic(members[0], other) for other in members)
        assert len({graph_hash(member) for member in members}) == 1
    heads = [members[0] for members in classes if members[0].vertices >= 4]
    for position, first in enumerate(heads):
        assert not any(isomorphic(first, second) for second in heads[:position])


def test_the_published_number_of_networks() -> None:
    space = nas_bench_101_space()
    assert len(np.unique(space.classes)) == 423_624
    assert space.size == len(space.classes) == 1_293_208


def test_numbers_and_cells_belong_together() -> None:
    space = nas_bench_101_space()
    for index in [0, 1, 2, 5, space.size - 1, *np.random.default_rng(0).integers(space.size, size=40).tolist()]:
        architecture = space.at(index)
        assert space.index(architecture) == index
        assert space.of_cell(space.cell(architecture)) == architecture
        twin = space.at(space.class_of(index))
        assert isomorphic(space.cell(architecture), space.cell(twin))
        assert twin.network_digest == architecture.network_digest
        assert graph_hash(space.cell(twin)) == graph_hash(space.cell(architecture))


def test_every_choice_that_is_offered_can_be_completed() -> None:
    """First or last allowed option everywhere: no dead end, and the extremes are what they should be."""
    space = nas_bench_101_space()

    def last(path: str, options: Sequence[Value], mask: np.ndarray | None, group: str) -> Value:
        return options[len(options) - 1 if mask is None else int(np.flatnonzero(mask)[-1])]

    most, least = space.walk(last), space.walk(first_allowed)  # type: ignore[arg-type]
    assert len(space.cell(most).edges) == 9 and space.cell(most).vertices == 7
    assert space.cell(least) == Cell(2, ((0, 1),), ())


def test_a_cell_is_labelled_uniformly() -> None:
    space = nas_bench_101_space()
    drawn = [space.cell(space.sample(np.random.default_rng(seed))).vertices for seed in range(2000)]
    share = len(space.classes[-4793 * 243 :]) / space.size
    assert np.mean(np.array(drawn) == 7) == pytest.approx(share, abs=4 * (share * (1 - share) / 2000) ** 0.5)


@pytest.mark.parametrize(
    ("cell", "match"),
    [
        (Cell(3, ((0, 2),), (0,)), r"edge/0-1'\]: got False; .*constraints rule it out"),
        (Cell(4, ((0, 1), (0, 2), (1, 3)), (0, 1)), r"edge/2-3'\]: got False"),
        (Cell(3, ((0, 1), (1, 2)), (3,)), r"cell\.operations: got \(3,\); allowed: codes below 3"),
        (Cell(8, ((0, 7),), (0,) * 6), r"vertices'\]: got 8"),
        (Cell(7, tuple((i, j) for i in range(7) for j in range(i + 1, 7)), (0,) * 5), r"edge/\d-\d'\]: got True"),
    ],
)
def test_what_is_no_cell(cell: Cell, match: str) -> None:
    with pytest.raises(UserError, match=match):
        nas_bench_101_space().of_cell(cell)


def test_settings_out_of_bounds() -> None:
    with pytest.raises(UserError, match="vertices: got 8; allowed: an integer from 2 to 7"):
        GraphCellSpace("x", vertices=8, edges=9, operations=("a",))
    with pytest.raises(UserError, match="edges, operations: got"):
        GraphCellSpace("x", vertices=4, edges=0, operations=("a",))


def test_an_index_of_something_else_is_a_key_error() -> None:
    space = nas_bench_101_space()
    good = dict(space.at(5))
    for wrong in ({**good, "edge/0-1": False}, {**good, "op/1": "conv9x9"}, {**good, "more": 1}, {"vertices": 9}):
        with pytest.raises(KeyError):
            space.index(Architecture(wrong, space=space.name))
