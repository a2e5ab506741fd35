import json
import math

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.families.darts_space import (
    DARTS_V1,
    DARTS_V2,
    Genotype,
    architecture_of,
    darts_space,
    edges_of,
    genotype_of,
)
from archsmith.space import Architecture


def test_edges_are_numbered_node_by_node():
    edges = edges_of(4)
    assert len(edges) == 14
    assert edges[:5] == ((0, 2), (1, 2), (0, 3), (1, 3), (2, 3)) and edges[-1] == (4, 5)


def test_the_size_is_the_published_one():
    per_cell = 1_037_664_180
    assert math.prod(math.comb(i + 1, 2) * 7**2 for i in range(1, 5)) == per_cell
    assert darts_space().size == per_cell**2


def test_genotypes_come_back_up_to_the_order_of_a_nodes_edges():
    for genotype in (DARTS_V1, DARTS_V2):
        point = architecture_of(genotype)
        again = genotype_of(point)
        for cell in ("normal", "reduce"):
            ours, theirs = getattr(again, cell), getattr(genotype, cell)
            for node in range(4):
                assert sorted(ours[2 * node : 2 * node + 2]) == sorted(theirs[2 * node : 2 * node + 2])
        assert architecture_of(again) == point
        assert Architecture.from_json(json.dumps(point.to_json())) == point
        assert Genotype.from_json(json.loads(json.dumps(genotype.to_json()))) == genotype


def test_sampled_points_are_genotypes():
    space = darts_space(2)
    for seed in range(20):
        point = space.sample(np.random.default_rng(seed))
        genotype = genotype_of(point)
        assert architecture_of(genotype) == point
        assert all(name != "none" for name, _ in (*genotype.normal, *genotype.reduce))
        assert genotype.normal_concat == (2, 3)


def test_cells_of_other_spaces_are_no_points():
    twice = Genotype(normal=(("sep_conv_3x3", 0),) * 2, reduce=(("sep_conv_3x3", 0),) * 2)
    with pytest.raises(UserError, match="output all of them"):
        architecture_of(twice)
    with pytest.raises(UserError, match="normal/0/inputs"):
        architecture_of(Genotype(twice.normal, twice.reduce, (2,), (2,)))
    with pytest.raises(UserError, match="sep_conv_7x7"):
        edges = (("sep_conv_7x7", 0), ("skip_connect", 1))
        architecture_of(Genotype(edges, edges, (2,), (2,)))
    with pytest.raises(UserError, match="nodes: got 0"):
        darts_space(0)
