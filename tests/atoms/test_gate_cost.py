import json
from pathlib import Path

import pytest
import torch
from hand_units import IMAGE, Branches, along, branches_groups
from torch import nn

from archsmith.atoms.gate_cost import Device, GateCost
from archsmith.atoms.unit_costs import UnitCosts
from archsmith.atoms.units import UnitGroup
from archsmith.core.errors import UserError
from archsmith.cost import count

CASES = json.loads((Path(__file__).parents[1] / "golden" / "figs.json").read_text())["cases"]
ALIVE = {"conv1": 7, "conv2": 11, "conv3": 10, "conv4": 17}


class TwoBranches(nn.Module):
    """The network of the reference's unit test: two branches, a concatenation, two heads."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 13, (7, 5), padding=(3, 2))
        self.conv2 = nn.Conv2d(3, 23, 1)
        self.conv3 = nn.Conv2d(36, 29, 3, stride=2, padding=1)
        self.conv4 = nn.Conv2d(36, 31, 1)

    def forward(self, x):
        y = torch.cat([self.conv1(x), self.conv2(x)], 1)
        return self.conv3(y), self.conv4(y)


def two_branches():
    def reads(size, offset):
        return (along("conv3.weight", 1, size, offset=offset), along("conv4.weight", 1, size, offset=offset))

    groups = [
        UnitGroup("conv1", 13, (along("conv1.weight", 0, 13), *reads(13, 0))),
        UnitGroup("conv2", 23, (along("conv2.weight", 0, 23), *reads(23, 13))),
        UnitGroup("conv3", 29, (along("conv3.weight", 0, 29),)),
        UnitGroup("conv4", 31, (along("conv4.weight", 0, 31),)),
    ]
    return UnitCosts(TwoBranches(), torch.zeros(1, 3, 17, 19), groups)


def test_cost_of_two_branches_and_a_concatenation():
    expected = CASES["flop_cost_two_branch_concat"]["expected"]
    cost = GateCost(two_branches())
    assert [round(c) for c in cost.of_products(ALIVE)] == list(expected["cost"].values())
    assert cost.of_products(ALIVE) == pytest.approx(list(expected["cost"].values()), rel=1e-12)
    assert cost.value(ALIVE) == pytest.approx(expected["total"], rel=1e-12)


def test_regulariser_in_probability_form():
    expected = CASES["flop_regularizer_probability_form"]["expected"]
    costs = two_branches()
    cost = GateCost(costs)
    probabilities = {
        name: torch.sigmoid(torch.tensor([10.0] * ALIVE[name] + [-10.0] * (size - ALIVE[name]), dtype=torch.float64))
        for name, size in zip(costs.names, costs.sizes, strict=True)
    }
    found = cost.regularisers_of_products(probabilities, ALIVE)
    assert found == pytest.approx(list(expected["per_op"].values()), abs=1e-6)
    assert float(cost.regulariser(probabilities, ALIVE)) == pytest.approx(expected["total"], abs=1e-6)


def test_depthwise_terms():
    case = CASES["depthwise_terms"]
    layer = nn.Conv2d(8, 8, 5, groups=8, bias=False)  # 2 FLOPs x 2 positions x 25 elements = 100
    group = UnitGroup("c", 8, (along("weight", 0, 8),))
    cost = GateCost(UnitCosts(layer, torch.zeros(1, 8, 5, 6), [group]))
    r = torch.full((8,), case["input"]["reg_in"] / 8, dtype=torch.float64)
    assert cost.value({"c": case["input"]["alive_out"]}) == pytest.approx(case["expected"]["cost"])
    assert float(cost.regulariser({"c": r}, {"c": 5})) == pytest.approx(case["expected"]["regulariser"])


def test_pressure_falls_when_the_neighbour_shrinks_and_counts_have_no_gradient():
    cost = GateCost(two_branches())
    assert cost.weights({**ALIVE, "conv3": 2})["conv1"] < cost.weights(ALIVE)["conv1"]
    assert cost.weights({**ALIVE, "conv1": 1})["conv1"] == cost.weights(ALIVE)["conv1"]
    mask = torch.full((13,), 0.5, requires_grad=True)
    cost.regulariser({"conv1": mask}, {**ALIVE, "conv1": mask > 0.1}).backward()
    torch.testing.assert_close(mask.grad, torch.full((13,), cost.weights({**ALIVE, "conv1": 13})["conv1"]))


def test_a_group_without_alive_units_still_feels_its_price():
    assert GateCost(two_branches()).weights({**ALIVE, "conv1": 0})["conv1"] > 0


def test_flops_are_twice_the_macs_of_the_built_network():
    costs = UnitCosts(Branches(), torch.zeros(IMAGE), branches_groups())
    built = count(Branches(5, 4, 2), torch.zeros(IMAGE))
    assert GateCost(costs).value({"c1": 5, "c2": 4, "c3": 2}) == pytest.approx(2 * built.macs)


def test_weights_and_activations():
    costs = UnitCosts(Branches(), torch.zeros(IMAGE), branches_groups())
    built = Branches(5, 4, 2)
    alive = {"c1": 5, "c2": 4, "c3": 2}
    matrices = sum(p.numel() for p in built.parameters() if p.dim() > 1)
    assert GateCost(costs, "params").value(alive) == pytest.approx(matrices)
    assert GateCost(costs, "activations").value(alive) == pytest.approx(64 * 5 + 64 * 5 + 16 * 4 + 16 * 2 + 10)
    assert GateCost(costs, "activations").weights(alive)["c2"] == pytest.approx(16)  # R_out alone


def test_latency_follows_the_side_that_dominates():
    costs = UnitCosts(
        nn.Conv2d(3, 8, 3, bias=False), torch.zeros(1, 3, 6, 6), [UnitGroup("c", 8, (along("weight", 0, 8),))]
    )
    slow_compute = GateCost(costs, "latency", Device(peak=1e3, bandwidth=1e12))
    assert slow_compute.value({"c": 4}) == pytest.approx(2 * 16 * 4 * 27 / 1e3)
    assert slow_compute.weights({"c": 4})["c"] == pytest.approx(2 * 16 * 27 / 1e3)
    slow_memory = GateCost(costs, "latency", Device(peak=1e12, bandwidth=1e3))
    assert slow_memory.value({"c": 4}) == pytest.approx(4 * (3 * 36 + 16 * 4 + 27 * 4) / 1e3)
    assert slow_memory.weights({"c": 4})["c"] == pytest.approx(4 * (16 + 27) / 1e3)
    assert GateCost(costs, "latency", "v100").value({"c": 4}) > 0


def test_bad_resources_are_refused():
    costs = two_branches()
    with pytest.raises(UserError, match="flops, params, activations, latency"):
        GateCost(costs, "energy")
    with pytest.raises(UserError, match="device: got None"):
        GateCost(costs, "latency")
    with pytest.raises(UserError, match="p100, v100"):
        GateCost(costs, "latency", "abacus")
