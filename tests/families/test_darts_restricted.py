"""Spaces S1 to S5: candidates of each edge, the operation noise, counts of the published supernets and networks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from darts_recipe import alpha, image, matches, weighted_

from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.families.cells import NasBench201Family
from archsmith.families.darts import DartsFamily, darts_family, family_from_json
from archsmith.families.darts_space import RESTRICTED, Genotype, architecture_of, edges_of, genotype_of
from archsmith.layers.darts import DenseLayers, Noise, make_primitive
from archsmith.space import Architecture
from archsmith.supernet.mixed import MixedOp

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "darts-pt.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["cases"]}
NAMES = ("s1", "s2", "s3", "s4", "s5")


def restricted(name, **changes):
    settings = {"image": (3, 8, 8), "num_classes": 5, "channels": 4, "cells": 3, **changes}
    return darts_family(restricted=name, **settings)


@pytest.mark.parametrize(
    "space", [pytest.param("s1", marks=pytest.mark.slow), "s2", pytest.param("s5", marks=pytest.mark.slow)]
)
def test_supernets_have_the_published_sizes(space):
    case = CASES[f"count:supernet:{space}:C16:L8"]["expected"]
    family = restricted(space, image=(3, 32, 32), num_classes=10, channels=16, cells=8)
    supernet = family.supernet(seed=0)
    assert sum(weight.numel() for weight in supernet.weights().values()) == case["params"]
    assert list(supernet.logits["normal"].shape) == list(supernet.logits["reduce"].shape) == case["alpha_shape"]
    assert all_macs(supernet, (3, 32, 32)) == case["macs"]


def test_the_benchmarks_supernet_has_the_published_size():
    case = CASES["count:nasbench201_supernet"]["expected"]
    supernet = NasBench201Family(image=(3, 32, 32), num_classes=10).relaxed(seed=0)
    assert sum(weight.numel() for weight in supernet.weights().values()) == case["params"]
    assert all_macs(supernet, (3, 32, 32)) == case["macs"]


def all_macs(supernet, shape):
    """Return the MACs of one call with all operations on every edge."""

    class Everything(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = supernet.network

        def forward(self, x):
            return self.network(x, {group: torch.ones_like(logits) for group, logits in supernet.logits.items()})

    return count(Everything().eval(), torch.zeros(1, *shape)).macs


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("count:eval:")])
def test_published_cells_have_the_published_sizes(name):
    case = CASES[name]
    cells = {
        cell: tuple((op, source) for op, source in case["input"]["genotype"][cell]) for cell in ("normal", "reduce")
    }
    family = DartsFamily(image=(3, 32, 32), num_classes=10, channels=36, cells=20)
    costs = family.exact_costs(architecture_of(Genotype(**cells)))
    assert (costs["params"], costs["macs"]) == (case["expected"]["params"], case["expected"]["macs"])
    assert costs["params"] / 1e6 == pytest.approx(case["expected"]["published_params_M"], abs=0.01)


@pytest.mark.parametrize("masked", [None, 2])
def test_a_masked_operation_leaves_the_others_as_they_are(masked):
    case = CASES["mixedop_s5:C4:full" if masked is None else f"mixedop_s5:C4:mask{masked}"]
    operation = weighted_(
        MixedOp({name: make_primitive(name, 4, 1, False, DenseLayers(), True) for name in case["input"]["primitives"]})
    )
    full = alpha(1, 7)[0].softmax(0)
    weights = full.clone()
    if masked is not None:
        weights[masked] = 0.0
    assert torch.allclose(weights, torch.tensor(case["expected"]["weights"], dtype=torch.float64), atol=1e-10)
    x = image(2, 4, 8, 8)
    with torch.no_grad():
        out = operation(x, weights)
        matches(out, case["expected"]["out"])
        if masked is not None:
            removed = full[masked] * list(operation.candidates.values())[masked](x)
            assert torch.allclose(out, operation(x, full) - removed, rtol=0, atol=1e-10)
            assert torch.allclose(out, operation(x, weights.tolist()), rtol=0, atol=1e-12)


def test_s1_is_the_published_table():
    normal, reduce = RESTRICTED["s1"]["edge_operations"]
    assert len(normal) == len(reduce) == 14 and all(len(edge) == 2 for edge in (*normal, *reduce))
    assert normal[5] == ("max_pool_3x3", "skip_connect") and normal[13] == ("dil_conv_3x3", "dil_conv_5x5")
    assert reduce[6] == ("max_pool_3x3", "sep_conv_3x3") and reduce[0] == ("max_pool_3x3", "avg_pool_3x3")


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_candidates_of_their_edges_alone_and_come_back(name):
    family = restricted(name)
    supernet = family.supernet(seed=0)
    rng = np.random.default_rng(0)
    for number in range(10):
        point = family.space.sample(rng)
        genotype = genotype_of(point)
        for cell in ("normal", "reduce"):
            for place, (operation, source) in enumerate(getattr(genotype, cell)):
                edge = edges_of(4).index((source, place // 2 + 2))
                assert operation in supernet.options[cell][edge] and operation != "none"
        assert architecture_of(genotype, family.space) == point
        assert Architecture.from_json(json.dumps(point.to_json())) == point
        if number < 2:
            network = family.build(point, seed=0)
            assert family.architecture_of(network) == point
            x = torch.rand(2, 3, 8, 8)
            assert network.eval()(x).shape == (2, 5) and torch.equal(network(x), network(x))
    assert family_from_json(json.loads(json.dumps(family.to_json()))) == family
    assert family.space.validate(supernet.derive())


def test_the_size_of_s1_counts_pairs_of_edges_and_their_candidates():
    assert restricted("s1").space.size == ((2 * 2) ** 4 * 1 * 3 * 6 * 10) ** 2
    assert restricted("s2").space.size == restricted("s3").space.size == restricted("s4").space.size
    assert restricted("s5").space.size == 1_037_664_180**2


def test_a_point_with_an_operation_of_another_edge_is_refused():
    family = restricted("s1")
    point = dict(family.smallest().decisions)
    (first, _) = point["normal/0/inputs"]
    point[f"normal/0/op_from_{first}"] = "max_pool_3x3"
    with pytest.raises(UserError, match="op_from_0"):
        family.space.validate(point)


def test_the_extremes_of_s1():
    family = restricted("s1")
    large, small = family.exact_costs(family.largest()), family.exact_costs(family.smallest())
    rng = np.random.default_rng(1)
    for _ in range(10):
        macs = family.exact_costs(family.space.sample(rng))["macs"]
        assert small["macs"] <= macs <= large["macs"]


def test_noise_ignores_its_input_and_is_still_in_a_finished_network():
    noise = Noise(2).train()
    torch.manual_seed(0)
    first = noise(torch.zeros(2, 3, 64, 64))
    torch.manual_seed(0)
    assert torch.equal(first, noise(torch.full((2, 3, 64, 64), 7.0)))
    assert first.shape == (2, 3, 32, 32) and float(first.std()) == pytest.approx(1.0, rel=0.05)
    assert not noise.eval()(torch.ones(1, 3, 4, 4)).any()
    assert Noise(1, always=True).eval()(torch.zeros(1, 3, 4, 4)).any()
    cell = restricted("s4").supernet(seed=0).eval()
    mixing = cell.one_hot(dict.fromkeys(("normal", "reduce"), ["noise"] * 14))
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert not torch.equal(cell(x, mixing), cell(x, mixing))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"restricted": "s6"}, "family.restricted: got 's6'; allowed: s1, s2, s3, s4, s5"),
        ({"edge_operations": [[["none"]] * 14] * 2}, "family.operations: got .'none',."),
        ({"edge_operations": [[["skip_connect"]] * 13] * 2}, "candidates of 14 edges"),
        ({"operations": ["noisy"]}, "family.operations: got .'noisy',."),
    ],
)
def test_wrong_restrictions_are_refused(changes, text):
    with pytest.raises(UserError, match=text):
        darts_family(image=(3, 8, 8), num_classes=5, channels=4, cells=3, **changes)
