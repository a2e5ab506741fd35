"""The NAS-Bench-201 space: published counts, strings, canonical forms, costs in closed form."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.families.cell_spaces import (
    NB201_EDGES,
    NB201_OPERATIONS,
    NB201_PATHS,
    cell_from_string,
    cell_string,
    functional_form,
    is_constant,
    nas_bench_201_space,
    network_counts,
    structure_string,
)
from archsmith.space import Architecture

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "nas-bench-201.json").read_text())
SHAPES = {"cifar10": (10, 32), "cifar100": (100, 32), "imagenet16_120": (120, 16)}


@pytest.fixture(scope="module")
def cells() -> list[Architecture]:
    return list(nas_bench_201_space().enumerate())


def test_the_published_counts(cells: list[Architecture]) -> None:
    expected = {name: case["expected"] for name, case in GOLDEN["space"].items()}
    assert len(set(cells)) == nas_bench_201_space().size == expected["size"]
    assert len(set(map(structure_string, cells))) == expected["unique_strings_zero_and_skip"]
    assert len({structure_string(cell, zero=False) for cell in cells}) == expected["unique_strings_skip_only"]
    assert len({structure_string(c, zero=False, skip=False) for c in cells}) == expected["unique_strings_plain"]
    assert len(set(map(functional_form, cells))) == expected["functional_classes"]
    assert sum(map(is_constant, cells)) == expected["constant_output_cells"]


def test_the_forms_grow_coarser(cells: list[Architecture]) -> None:
    forms = defaultdict(set)
    for cell in cells:
        forms[structure_string(cell)].add(functional_form(cell))
    assert max(map(len, forms.values())) == 1


def test_network_digests_are_the_published_classes(cells: list[Architecture]) -> None:
    assert len({cell.network_digest for cell in cells[::5]}) == len({structure_string(cell) for cell in cells[::5]})
    twins = [
        "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|skip_connect~2|",
        "|none~0|+|nor_conv_3x3~0|none~1|+|none~0|none~1|skip_connect~2|",
    ]
    first, second = map(cell_from_string, twins)
    assert structure_string(first).count("(0)@nor_conv_3x3") == 1
    assert first.digest != second.digest
    again = Architecture.from_json(first.to_json())
    assert again.network_digest == first.network_digest


def computed(form: object, x: float, weights: dict[str, float]) -> float:
    """The cell on one number, its operations being maps without constants: literal, from the functional form."""
    assert isinstance(form, tuple)
    return sum(times * (x if op == "input" else weights[op] * abs(computed(inner, x, weights)) ** 1.5)
               for op, inner, times in form)  # fmt: skip


def test_functional_forms_compute_what_the_cell_computes(cells: list[Architecture]) -> None:
    """x_j = sum op(x_i), with op(x) = w |x|^1.5 for the three layers: zero stays zero and nothing else collides."""
    weights = {"nor_conv_1x1": 0.7, "nor_conv_3x3": 1.3, "avg_pool_3x3": 0.4}
    values: dict[object, float] = {}
    for cell in cells[::11]:
        nodes = [0.9]
        for target in (1, 2, 3):
            total = 0.0
            for source in range(target):
                op, x = str(cell[f"edge/{source}-{target}"]), nodes[source]
                total += 0.0 if op == "none" else x if op == "skip_connect" else weights[op] * abs(x) ** 1.5
            nodes.append(total)
        form = functional_form(cell)
        assert computed(form, 0.9, weights) == pytest.approx(nodes[3], abs=1e-12)
        assert is_constant(cell) == (nodes[3] == 0)
        assert values.setdefault(form, nodes[3]) == pytest.approx(nodes[3], abs=1e-12)


def test_strings_name_source_and_operation() -> None:
    text = "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|none~2|"
    cell = cell_from_string(text)
    assert dict(cell) == {
        "edge/0-1": "avg_pool_3x3", "edge/0-2": "nor_conv_1x1", "edge/1-2": "skip_connect",
        "edge/0-3": "nor_conv_1x1", "edge/1-3": "skip_connect", "edge/2-3": "none",
    }  # fmt: skip
    assert cell_string(cell) == text
    space = nas_bench_201_space()
    for seed in range(50):
        drawn = space.sample(np.random.default_rng(seed))
        assert cell_from_string(cell_string(drawn)) == drawn


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("|none~0|+|none~0|none~1|", r"cell: got '\|none~0\|\+"),
        ("|none~0|+|none~1|none~0|+|none~0|none~1|none~2|", "cell: got"),
        ("|none~0|+|none~0|none~1|+|none~0|none~1|conv_7x7~2|", r"architecture\['edge/2-3'\]: got 'conv_7x7'"),
        (3, "cell: got 3"),
    ],
)
def test_other_texts_are_refused(text: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        cell_from_string(text)


def test_counts_equal_the_reference_networks() -> None:
    assert len(GOLDEN["params_flops"]) == 82
    for text, row in GOLDEN["params_flops"].items():
        for dataset, (classes, size) in SHAPES.items():
            counts = network_counts(cell_from_string(text), classes=classes, size=size)
            assert counts["params"] == row[dataset]["params"]
            assert counts["macs_paper"] == row[dataset]["flops"] == counts["macs"] + classes


def test_an_edge_adds_its_cost() -> None:
    none = Architecture(dict.fromkeys(NB201_PATHS, "none"), space="nas-bench-201")
    base = network_counts(none)
    expected = GOLDEN["cost"]["base"]["expected"]
    assert (base["params"], base["macs_paper"]) == (expected["params"], expected["flops"])
    for operation in NB201_OPERATIONS:
        added = GOLDEN["cost"]["per_edge"]["expected"].get(operation, {"params": 0, "flops": 0})
        for path in NB201_PATHS:
            counts = network_counts({**none, path: operation})
            assert counts["params"] - base["params"] == added["params"]
            assert counts["macs"] - base["macs"] == added["flops"]


def test_the_edges_are_those_of_a_dense_graph() -> None:
    assert Counter(target for _, target in NB201_EDGES) == {1: 1, 2: 2, 3: 3}
    assert all(source < target for source, target in NB201_EDGES)
