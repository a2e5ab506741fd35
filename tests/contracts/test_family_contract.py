"""The shipped contract of a family, attached to every family of the library."""

from __future__ import annotations

import functools

import pytest
from mobile_samples import small_family

from archsmith.families import family_table
from archsmith.families.bignas import bignas_family
from archsmith.families.cells import open_family
from archsmith.families.darts import darts_family
from archsmith.families.darts import open_family as open_darts_family
from archsmith.families.densenet import open_family as open_dense_family
from archsmith.families.flexibert import open_family as open_text_family
from archsmith.families.hypercuboid import hypercuboid_family
from archsmith.families.mobile_chain import chain_family
from archsmith.families.modules import open_family as open_module_family
from archsmith.families.nasnet import nasnet_family
from archsmith.families.plain import open_family as open_plain_family
from archsmith.testing.families import FamilyContract, measured_costs

ATTACHED = {
    "bignas",
    "darts",
    "deeparchitect",
    "densenet",
    "flexibert",
    "hypercuboid",
    "mobile",
    "mobile-chain",
    "nas-bench-201",
    "nasnet",
    "ofa-mobile",  # tests/families/test_ofa_mobile.py
    "plain",
    "sharpdarts",
    "tdnn",  # tests/families/test_tdnn_family.py
}


@functools.cache
def costs_of_largest(family):
    return measured_costs(family, family.largest())


class TestMobileFamily(FamilyContract):
    @pytest.fixture
    def family(self):
        return small_family()

    def predicted_costs(self, family, architecture):
        largest = family.largest()
        atoms = family.atoms(family.build(largest))
        living = family.atoms(family.build(architecture))
        gone = {block.name for block in atoms.blocks} - {b.name for b in living.blocks if b.groups}
        costs = dict(costs_of_largest(family))
        for cost in costs:
            costs[cost] -= sum(group.cost[cost] * group.size for group in atoms)
            costs[cost] += sum(group.cost[cost] * group.size for group in living)
            costs[cost] -= sum(block.cost.get(cost, 0) for block in atoms.blocks if block.name in gone)
        return costs


class TestChainFamily(FamilyContract):
    @pytest.fixture
    def family(self):
        small = {"widths": (8, 12), "cells": (2, 2), "strides": (1, 2), "last_channels": 24}
        return chain_family("tiny", image=(3, 8, 12), num_classes=5, dropout=0.1, **small)


class TestBigNasFamily(FamilyContract):
    @pytest.fixture
    def family(self):
        # Odd sides, so that pooled shortcuts meet incomplete windows.
        return bignas_family("tiny", image=(3, 9, 12), num_classes=5)


class TestNasBench201Family(FamilyContract):
    @pytest.fixture
    def family(self):
        return open_family("nas-bench-201", image=(3, 8, 12), num_classes=5, channels=4, cells=2)


class TestNasnetFamily(FamilyContract):
    @pytest.fixture
    def family(self):
        # Two blocks: the same rules as five, and a quarter of the time.
        return nasnet_family("search", image=(3, 8, 12), num_classes=5, filters=4, repeats=1, blocks=2)


class TestDartsFamily(FamilyContract):
    @pytest.fixture
    def family(self):
        return darts_family(image=(3, 8, 12), num_classes=5, channels=4, cells=3, nodes=2)


class TestSharpDartsFamily(FamilyContract):
    @pytest.fixture
    def family(self):
        # Odd sides, and narrow choke convolutions, so that sizes differ as they do at full width.
        cells = {"channels": 4, "cells": 3, "nodes": 2, "choke": 2}
        return open_darts_family("sharpdarts", image=(3, 7, 10), num_classes=5, **cells)


class TestHyperCuboidFamily(FamilyContract):
    @pytest.fixture
    def family(self):
        operations = ("max_pool_3x3", "sep_conv_3x3", "dil_flood_conv_3x3")
        return hypercuboid_family(
            image=(3, 7, 10), num_classes=5, widths=(4, 6, 12), stages=2, filters=8, operations=operations
        )


class TestModuleFamily(FamilyContract):
    @pytest.fixture
    def family(self):
        return open_module_family("deeparchitect", image=(3, 5, 6), num_classes=5, space="deepconv", divisor=16)


class TestPlainFamily(FamilyContract):
    @pytest.fixture
    def family(self):
        return open_plain_family("plain", image=(3, 9, 12), num_classes=5, depth=3, longest=12)


class TestDenseFamily(FamilyContract):
    @pytest.fixture
    def family(self):
        return open_dense_family("densenet", image=(3, 9, 12), num_classes=5, growths=(4, 6, 12), depth=3, longest=9)


class TestFlexiBertFamily(FamilyContract):
    @pytest.fixture
    def family(self):
        small = {"hidden": (8, 12), "sizes": (6, 10), "heads": (2, 4), "embedding": 8, "vocabulary": 40}
        return open_text_family("flexibert", image=(1, 1, 9), num_classes=5, **small)


def test_every_family_is_attached():
    assert {row["name"] for row in family_table()} == ATTACHED
