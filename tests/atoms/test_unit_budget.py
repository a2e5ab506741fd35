import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hand_units import IMAGE, Branches, along, branches_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from archsmith.atoms.plan import plan_cut
from archsmith.atoms.unit_budget import CutSchedule, chunks, plan_units
from archsmith.atoms.unit_costs import UnitCosts
from archsmith.atoms.units import UnitGroup
from archsmith.core.errors import UserError
from archsmith.cost import count

GROUPS = branches_groups()
MODEL = Branches()
COSTS = UnitCosts(MODEL, torch.zeros(IMAGE), GROUPS)


def scores_of(seed, groups=GROUPS):
    rng = np.random.default_rng(seed)
    return {group.name: rng.random(group.size) for group in groups}


def chain(*sizes, divisor=1, minimum=1, balance=()):
    """A chain of 1x1 convolutions with a group between each two."""
    layers = nn.Sequential(*(nn.Conv2d(a, b, 1, bias=False) for a, b in itertools.pairwise((3, *sizes, 5))))
    groups = [
        UnitGroup(
            f"g{i}",
            size,
            (along(f"{i}.weight", 0, size), along(f"{i + 1}.weight", 1, size)),
            divisor=divisor,
            minimum=minimum,
            balance=balance,
        )
        for i, size in enumerate(sizes)
    ]
    return layers, groups, UnitCosts(layers, torch.zeros(1, 3, 4, 4), groups)


@pytest.mark.parametrize("order", ["share_per_cost", "score_per_cost", "score"])
@settings(deadline=None, max_examples=30)
@given(share=st.floats(0.08, 0.99), seed=st.integers(0, 5), cost=st.sampled_from(["macs", "params"]))
def test_the_budget_always_holds_in_the_network_that_is_built(order, share, seed, cost):
    limit = share * COSTS.of()[cost]
    plan = plan_units(GROUPS, scores_of(seed), COSTS, {cost: limit}, order=order)
    built = count(Branches(*plan.kept.values()), torch.zeros(IMAGE))
    assert getattr(built, cost) <= limit
    assert {"macs": built.macs, "params": built.params} == plan.costs
    plan_cut(GROUPS, plan.removed, MODEL)


def test_several_limits_hold_together():
    limits = {"macs": 0.7 * COSTS.of()["macs"], "params": 0.3 * COSTS.of()["params"]}
    plan = plan_units(GROUPS, scores_of(0), COSTS, limits)
    assert all(plan.costs[name] <= limit for name, limit in limits.items())


def test_no_larger_network_of_the_same_order_would_fit():
    """What has room again was put back: no single unit that went fits any more."""
    limit = 0.6 * COSTS.of()["macs"]
    plan = plan_units(GROUPS, scores_of(1), COSTS, {"macs": limit})
    for name in plan.removed:
        assert COSTS.of({**plan.kept, name: plan.kept[name] + 1})["macs"] > limit


def test_within_a_group_the_smallest_scores_go():
    scores = scores_of(2)
    plan = plan_units(GROUPS, scores, COSTS, {"macs": 0.5 * COSTS.of()["macs"]})
    for name, units in plan.removed.items():
        stays = np.setdiff1d(np.arange(len(scores[name])), units)
        assert scores[name][units].max() < scores[name][stays].min()


def test_score_per_cost_prefers_what_saves_more():
    _, groups, costs = chain(8, 8)
    scores = {"g0": np.full(8, 1.0), "g1": np.full(8, 1.0)}
    limits = {"macs": 0.8 * costs.of()["macs"]}
    plan = plan_units(groups, scores, costs, limits, order="score_per_cost")
    assert set(plan.removed) == {"g1"}  # 8 + 5 products against 3 + 8
    assert set(plan_units(groups, scores, costs, limits, order="score").removed) == {"g0"}


def literal_plan(groups, scores, costs, limit, order):
    """The greedy rule as it is said: count the network anew for every unit that could go next."""
    kept = {group.name: group.size for group in groups}
    order_of = {name: np.argsort(values, kind="stable").tolist() for name, values in scores.items()}
    removed = []
    while (over := costs.of(kept)["macs"] - limit) > 0:
        best = None
        for group in groups:
            if kept[group.name] > 1:
                unit = order_of[group.name][group.size - kept[group.name]]
                saved = costs.of(kept)["macs"] - costs.of({**kept, group.name: kept[group.name] - 1})["macs"]
                gone = order_of[group.name][: group.size - kept[group.name]]
                worth = scores[group.name][unit]
                if order == "share_per_cost":
                    parts = scores[group.name] / scores[group.name].sum()
                    worth = (parts[gone].sum() + parts[unit]) ** 2 - parts[gone].sum() ** 2
                price = worth / min(1.0, saved / over)
                if best is None or price < best[0]:
                    best = (price, group.name)
        kept[best[1]] -= 1
        removed.append(best[1])
    for name in reversed(removed):
        if costs.of({**kept, name: kept[name] + 1})["macs"] <= limit:
            kept[name] += 1
    return kept


@pytest.mark.parametrize("order", ["share_per_cost", "score_per_cost"])
@pytest.mark.parametrize("seed", range(4))
def test_every_removal_is_priced_by_the_network_that_is_left(seed, order):
    _, groups, costs = chain(9, 7, 8)
    scores = scores_of(seed, groups)
    limit = 0.4 * costs.of()["macs"]
    plan = plan_units(groups, scores, costs, {"macs": limit}, order=order)
    assert plan.kept == literal_plan(groups, scores, costs, limit, order)


def test_no_group_collapses_because_its_units_cost_most():
    """With equal scores the dearest group would lose everything; here every further unit of it is dearer."""
    _, groups, costs = chain(24, 24, 24)
    equal = {group.name: np.full(24, 1.0) for group in groups}
    limits = {"macs": 0.5 * costs.of()["macs"]}
    collapsed = plan_units(groups, equal, costs, limits, order="score_per_cost").kept
    spread = plan_units(groups, equal, costs, limits).kept
    assert sorted(collapsed.values()) == [10, 24, 24]
    assert min(spread.values()) >= 12


@pytest.mark.parametrize("size", [12, 13])
def test_divisor_and_minimum(size):
    group = UnitGroup("g", size, (), divisor=4, minimum=3)
    lengths = np.cumsum([len(chunk) for chunk in chunks(group, np.arange(size, dtype=float))])
    assert [size - length for length in lengths] == ([8, 4] if size == 12 else [12, 8, 4])


def test_balance_takes_the_smallest_of_every_set():
    group = UnitGroup("g", 6, (), balance=((0, 1, 2), (3, 4, 5)), minimum=2)
    order = chunks(group, np.array([3.0, 1.0, 2.0, 9.0, 7.0, 8.0]))
    assert [sorted(chunk.tolist()) for chunk in order] == [[1, 4], [2, 5]]


def test_frozen_groups_and_the_last_unit_stay():
    assert chunks(UnitGroup("g", 3, (), frozen="because"), np.zeros(3)) == []
    assert len(chunks(UnitGroup("g", 3, (), minimum=0), np.zeros(3))) == 2


def test_dead_units_go_in_any_case_as_far_as_they_may():
    dead = {"c1": list(range(8)), "c2": [4]}
    plan = plan_units(GROUPS, scores_of(3), COSTS, {}, dead=dead)
    assert plan.kept == {"c1": 1, "c2": 11, "c3": 6}
    assert plan.removed["c2"].tolist() == [4]


def test_impossible_budgets_say_what_can_be_reached():
    least = count(Branches(1, 1, 1), torch.zeros(IMAGE)).macs
    with pytest.raises(UserError, match=rf"when everything removable is gone: macs {least:,}"):
        plan_units(GROUPS, scores_of(0), COSTS, {"macs": least - 1})
    frozen = [dataclasses.replace(group, frozen="by hand") for group in GROUPS]
    with pytest.raises(UserError, match="Raise the budget, or allow more"):
        plan_units(frozen, scores_of(0), COSTS, {"macs": 0.99 * COSTS.of()["macs"]})


def test_wrong_scores_and_limits_are_refused():
    with pytest.raises(UserError, match=r"scores\['c2'\].*12 numbers, none of them NaN"):
        plan_units(GROUPS, {**scores_of(0), "c2": np.full(12, np.nan)}, COSTS, {"macs": 1e4})
    with pytest.raises(UserError, match=r"scores\['c1'\]: got None"):
        plan_units(GROUPS, {}, COSTS, {"macs": 1e4})
    with pytest.raises(UserError, match="latency where it is measured"):
        plan_units(GROUPS, scores_of(0), COSTS, {"latency": 1.0})
    with pytest.raises(UserError, match="order: got 'best'"):
        plan_units(GROUPS, scores_of(0), COSTS, {"macs": 1e4}, order="best")


def test_schedules():
    linear = CutSchedule(kind="linear", begin=10, end=40, every=10)
    assert [step for step in range(1, 60) if linear.due(step)] == [10, 20, 30, 40]
    assert [linear.progress(step) for step in (9, 10, 20, 30, 40, 99)] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])
    cubic = CutSchedule(kind="cubic", begin=10, end=40, every=10)
    assert cubic.progress(10) == pytest.approx(1 - 0.75**3)
    shot = CutSchedule(kind="one_shot", end=7)
    assert [step for step in range(1, 20) if shot.due(step)] == [7]
    assert shot.progress(6) == 0
    dead = CutSchedule(kind="dead", begin=0, end=5, every=2)
    assert [step for step in range(1, 9) if dead.due(step)] == [2, 4, 5]
    assert linear.limits(20, {"macs": 100.0}, {"macs": 60.0}) == {"macs": pytest.approx(80.0)}
    assert linear.limits(40, {"macs": 100.0}, {"macs": 60.0}) == {"macs": 60.0}


def test_wrong_schedules_are_refused():
    with pytest.raises(UserError, match="one_shot, linear, cubic, dead"):
        CutSchedule(kind="exponential")
    with pytest.raises(UserError, match="0 <= begin <= end"):
        CutSchedule(begin=5, end=3)
    with pytest.raises(UserError, match=r"schedule.every: got 0"):
        CutSchedule(every=0)


def test_what_has_room_again_is_put_back():
    """Cheap units go first; then a large chunk of another group saves more than was missing."""
    _, groups, costs = chain(8, 16)
    groups = [groups[0], dataclasses.replace(groups[1], divisor=8)]
    scores = {"g0": np.full(8, 1e-6), "g1": np.full(16, 1.0)}
    alone = costs.of({"g0": 1})["macs"]
    plan = plan_units(groups, scores, costs, {"macs": alone - 1})  # all of g0 is one product too much
    assert plan.kept["g1"] == 8 and plan.kept["g0"] > 1
    assert costs.of({**plan.kept, "g0": plan.kept["g0"] + 1})["macs"] > alone - 1
