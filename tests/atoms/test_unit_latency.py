import numpy as np
import pytest
import torch
from hand_units import IMAGE, Branches, branches_groups

from archsmith.atoms.unit_costs import UnitCosts
from archsmith.atoms.unit_latency import MARGIN, LatencyTable, plan_with_latency
from archsmith.core.errors import UserError

GROUPS = branches_groups()
COSTS = UnitCosts(Branches(), torch.zeros(IMAGE), GROUPS)
SCORES = {group.name: np.linspace(0, 1, group.size) for group in GROUPS}


def table(milliseconds, measured=None):
    """A table whose networks are the numbers of kept units, and the list of what was measured."""
    asked = []

    def shrunk(removed):
        kept = {group.name: group.size - len(removed.get(group.name, ())) for group in GROUPS}
        asked.append(kept)
        return kept

    return LatencyTable(shrunk, milliseconds, measured), asked


def stepped(kept):
    """Time in steps of four channels, as vector units make it."""
    return 1.0 + sum(-(-kept[name] // 4) for name in kept)


def test_the_measured_latency_keeps_the_margin_of_the_limit():
    lat, _ = table(stepped)
    plan = plan_with_latency(GROUPS, SCORES, COSTS, {"latency": 5.3}, lat)
    assert plan.costs["latency"] == stepped(plan.kept) <= MARGIN * 5.3


def test_latency_and_macs_hold_together():
    lat, _ = table(stepped)
    limits = {"latency": 6.5, "macs": 0.2 * COSTS.of()["macs"]}
    plan = plan_with_latency(GROUPS, SCORES, COSTS, limits, lat)
    assert plan.costs["macs"] <= limits["macs"] and stepped(plan.kept) <= 6.5


def test_what_was_measured_is_never_measured_again():
    lat, asked = table(stepped)
    first = plan_with_latency(GROUPS, SCORES, COSTS, {"latency": 5.3}, lat)
    assert len(asked) == len({tuple(kept.items()) for kept in asked}) == len(lat.measured)
    resumed, asked = table(lambda kept: pytest.fail("measured"), lat.measured)
    assert plan_with_latency(GROUPS, SCORES, COSTS, {"latency": 5.3}, resumed).kept == first.kept


def test_earlier_cuts_are_part_of_what_was_measured():
    lat, _ = table(stepped)
    lat.of({"c1": np.array([0, 1])})
    lat.removed = {"c1": 1}
    lat.of({"c1": np.array([0])})
    assert list(lat.measured) == ["c1=2"]


def test_noise_makes_no_group_free():
    lat, _ = table(lambda kept: 3.0)  # nothing that is cut saves any time
    slopes = lat.polynomial(GROUPS, COSTS)
    assert all(slopes[number,] > 0 for number in range(3))


def test_limits_out_of_reach_say_what_was_measured():
    lat, _ = table(lambda kept: 3.0)
    with pytest.raises(UserError, match="budget"):
        plan_with_latency(GROUPS, SCORES, COSTS, {"latency": 1.0}, lat)
