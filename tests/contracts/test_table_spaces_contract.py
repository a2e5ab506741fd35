"""The shipped contract of a space, attached to the spaces of the benchmark tables."""

from __future__ import annotations

import pytest

from archsmith.families.cell_spaces import nas_bench_201_space
from archsmith.families.graph_cells import GraphCellSpace, nas_bench_101_space
from archsmith.families.table_spaces import (
    fbnet_space,
    nas_bench_graph_proteins_space,
    nas_bench_graph_space,
    nas_bench_macro_space,
    ofa_mobilenet_space,
    row_space,
)
from archsmith.space import Space
from archsmith.testing.space import SpaceContract


class TestNasBench201(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return nas_bench_201_space()


class TestNasBench101(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return nas_bench_101_space()


class TestSmallGraphCells(SpaceContract):
    """Small enough to be enumerated and to see that sampling is uniform."""

    uniform = True
    single_changes = False  # on two vertices there is nothing to change but their number

    @pytest.fixture
    def space(self) -> Space:
        return GraphCellSpace("small", vertices=5, edges=5, operations=("conv",))


class TestNasBenchMacro(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return nas_bench_macro_space()


class TestNasBenchGraph(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return nas_bench_graph_space()


class TestNasBenchGraphProteins(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return nas_bench_graph_proteins_space()


class TestRows(SpaceContract):
    uniform = True

    @pytest.fixture
    def space(self) -> Space:
        return row_space("rows", 40)


class TestFbnet(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return fbnet_space()


class TestOnceForAll(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return ofa_mobilenet_space()
