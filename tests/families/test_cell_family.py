"""NAS-Bench-201 networks: exact costs of the table, seeds, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cell_samples import NB201_FACTS, cell_of, cells_of_table, nas_bench_201_columns, operations_of

from archsmith.core.errors import UserError
from archsmith.families.cells import EDGE_PATHS, NasBench201Family, open_family, published_flops

DATASETS = {
    "cifar10": NasBench201Family(image=(3, 32, 32), num_classes=10),
    "cifar100": NasBench201Family(image=(3, 32, 32), num_classes=100),
    "ImageNet16-120": NasBench201Family(image=(3, 16, 16), num_classes=120),
}
COUNTED = {name: fact for name, fact in NB201_FACTS["cases"].items() if name.startswith("params_flops/")}


def built_costs(family, architecture):
    with torch.device("meta"):
        network = family.build(architecture)
    return [sum(p.numel() for p in network.parameters()), published_flops(network, family.image)]


def closed_form(family, architecture):
    costs = family.exact_costs(architecture)
    return [costs["params"], costs["macs"] + family.num_classes]


def test_there_are_82_facts():
    assert len(COUNTED) == 82


@pytest.mark.parametrize("dataset", DATASETS)
def test_closed_form_costs_are_the_published_ones(dataset):
    for fact in COUNTED.values():
        assert closed_form(DATASETS[dataset], cell_of(operations_of(fact["arch"]))) == fact[dataset]


@pytest.mark.parametrize("dataset", DATASETS)
def test_counted_costs_are_the_published_ones(dataset):
    # Costs depend on the numbers of convolutions only; of the 82 cells the first of each pair of numbers is built.
    kinds = {}
    for fact in COUNTED.values():
        operations = operations_of(fact["arch"])
        kinds.setdefault((operations.count("nor_conv_1x1"), operations.count("nor_conv_3x3")), fact)
    for fact in list(kinds.values())[::8]:
        assert built_costs(DATASETS[dataset], cell_of(operations_of(fact["arch"]))) == fact[dataset]


@pytest.mark.slow
@pytest.mark.parametrize("dataset", DATASETS)
def test_counted_costs_are_the_published_ones_for_all_facts(dataset):
    for fact in COUNTED.values():
        assert built_costs(DATASETS[dataset], cell_of(operations_of(fact["arch"]))) == fact[dataset]


def test_what_an_edge_adds():
    family = DATASETS["cifar10"]
    nothing = cell_of(("none",) * 6)
    base = built_costs(family, nothing)
    assert base == [NB201_FACTS["cases"]["cost/base"][name] for name in ("params", "flops")]
    for operation, added in NB201_FACTS["cases"]["cost/per_edge"].items():
        for position in range(6):
            operations = ["none"] * 6
            operations[position] = operation
            costs = closed_form(family, cell_of(tuple(operations)))
            assert [costs[0] - base[0], costs[1] - base[1]] == [added["params"], added["flops"]]


def test_costs_of_the_complete_table():
    columns = nas_bench_201_columns()
    family = DATASETS["cifar10"]
    rows = np.random.default_rng(0).choice(len(columns["ops"]), 500, replace=False)
    for row, cell in zip(rows, cells_of_table(columns["ops"][rows]), strict=True):
        expected = [int(columns["params_cifar10"][row]), int(columns["flops_cifar10"][row])]
        assert closed_form(family, cell) == expected


def test_operations_are_read_by_target_and_source():
    text = "|none~0|+|skip_connect~0|nor_conv_1x1~1|+|nor_conv_3x3~0|avg_pool_3x3~1|none~2|"
    architecture = cell_of(operations_of(text))
    assert architecture["edge/1-2"] == "nor_conv_1x1"
    assert architecture["edge/0-3"] == "nor_conv_3x3"
    network = NasBench201Family(image=(3, 8, 8), num_classes=2, channels=2, cells=1).build(architecture)
    assert network.operations == tuple(architecture[path] for path in EDGE_PATHS)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"image": (3, 30, 32)}, "image size: got 30x32; allowed: sides that are multiples of 4"),
        ({"channels": 0}, "family.channels: got 0; allowed: an integer of at least 1"),
        ({"cells": 1.5}, "family.cells: got 1.5"),
    ],
)
def test_sizes_that_do_not_work_are_refused(settings, text):
    with pytest.raises(UserError, match=text):
        open_family("nas-bench-201", **({"image": (3, 32, 32), "num_classes": 10} | settings))


def test_another_name_is_refused():
    with pytest.raises(UserError, match="family: got 'darts'; allowed: nas-bench-201"):
        open_family("darts", image=(3, 32, 32), num_classes=10)


def test_building_with_a_seed_leaves_the_global_generator_alone():
    family = NasBench201Family(image=(3, 8, 8), num_classes=2, channels=2, cells=1)
    before = torch.random.get_rng_state()
    family.build(family.largest(), seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    family.build(family.largest())
    assert not torch.equal(torch.random.get_rng_state(), before)
