"""Every formulation in closed form, on four architectures that can be reckoned by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.space import Budget, Limit, Objective, Result
from archsmith.space.formulations import (
    DEVICE_COST,
    AcrossDevices,
    Chebyshev,
    CostTerm,
    ExponentialSum,
    FeasibleFirst,
    Formulation,
    Goal,
    Lagrangian,
    Penalised,
    Plain,
    Rejected,
    WeightedProduct,
    WeightedSum,
    across_devices,
    at_most,
    columns_of,
    feasible,
    relative_excess,
)

ACCURACY = Objective("accuracy", reference=0.0)
COLUMNS = {
    "accuracy": np.array([90.0, 80.0, 60.0, 10.0]),
    "latency": np.array([20.0, 10.0, 5.0, 0.01]),
    "memory": np.array([1.0, 4.0, 2.0, 1.0]),
}
TEN = (at_most("latency", 10.0),)


def scores(formulation: Formulation) -> list[float]:
    return [float(each) for each in formulation.scores(COLUMNS)]


def test_plain_and_its_direction() -> None:
    assert scores(Plain(objective=ACCURACY)) == [90, 80, 60, 10]
    assert scores(Plain(objective=Objective("latency", "minimize"))) == [-20, -10, -5, -0.01]


def test_rejection_keeps_what_is_exactly_on_the_limit() -> None:
    assert scores(Rejected(objective=ACCURACY, limits=TEN)) == [-math.inf, 80, 60, 10]
    both = Rejected(objective=ACCURACY, limits=(*TEN, at_most("memory", 3)))
    assert scores(both) == [-math.inf, -math.inf, 60, 10]


def test_penalty_is_linear_or_quadratic_in_the_relative_excess() -> None:
    assert scores(Penalised(objective=ACCURACY, limits=TEN, weight=30)) == [60, 80, 60, 10]
    half = (at_most("latency", 8.0),)  # excesses 1.5 and 0.25
    assert scores(Penalised(objective=ACCURACY, limits=half, weight=16, power=2)) == [90 - 36, 80 - 1, 60, 10]
    two = (at_most("latency", 10), at_most("memory", 2))  # excesses (1, 0) and (0, 1)
    assert scores(Penalised(objective=ACCURACY, limits=two, weight=5)) == [85, 75, 60, 10]


def test_lagrangian_is_signed_and_its_multipliers_never_fall_below_zero() -> None:
    start = Lagrangian(objective=ACCURACY, limits=TEN, multipliers=(10.0,), rate=4.0)
    assert scores(start) == pytest.approx([80, 80, 65, 10 + 10 * 0.999])
    slow = Result(metrics={"accuracy": 90.0}, costs={"latency": 20.0})
    assert start.after(slow).multipliers == (14.0,)  # excess 1
    fast = Result(metrics={"accuracy": 60.0}, costs={"latency": 0.0})
    moved: Lagrangian = start
    for expected in (6.0, 2.0, 0.0, 0.0):
        moved = moved.after(fast)
        assert moved.multipliers == (expected,)
    assert start.after(Result.failed("crashed")) == start
    assert start.after(Result(metrics={"accuracy": 1.0}, costs={"latency": math.inf})) == start
    assert start.with_state(json.loads(json.dumps(moved.state))) == moved
    assert Lagrangian(objective=ACCURACY, limits=TEN).multipliers == (0.0,)


def test_feasible_first_is_the_tournaments_order() -> None:
    limits = (at_most("latency", 4.0),)
    found = scores(FeasibleFirst(objective=ACCURACY, limits=limits))
    assert found == [-4.0, -1.5, -0.25, 10.0]  # the useless but feasible one wins, then by excess
    # As a tournament, pair by pair, on random points.
    rng = np.random.default_rng(0)
    columns = {"accuracy": rng.integers(0, 9, 60).astype(float), "latency": rng.integers(1, 9, 60).astype(float)}
    numbers = FeasibleFirst(objective=ACCURACY, limits=limits).scores(columns)
    for i in range(60):
        for j in range(60):
            (a, b), (s, t) = columns["latency"][[i, j]], columns["accuracy"][[i, j]]
            if a <= 4 and b <= 4:
                wins = s > t
            else:
                wins = a < b if a > 4 and b > 4 else a <= 4
            assert (numbers[i] > numbers[j]) == wins
    # The accuracy of an infeasible one need not be known, and one worse than the reference counts as the reference.
    unknown = {"accuracy": np.array([math.nan, -5.0]), "latency": np.array([8.0, 1.0])}
    assert FeasibleFirst(objective=ACCURACY, limits=limits).scores(unknown).tolist() == [-1.0, 0.0]
    error = Objective("error", "minimize", reference=100.0)
    small = {"error": np.array([3.0, 2.0]), "latency": np.array([4.0, 8.0])}
    assert FeasibleFirst(objective=error, limits=limits).scores(small).tolist() == [-3.0, -101.0]


def test_weighted_sum_subtracts_each_cost() -> None:
    terms = (CostTerm(cost="latency", weight=2), CostTerm(cost="memory", weight=0.5))
    assert scores(WeightedSum(objective=ACCURACY, costs=terms)) == pytest.approx([49.5, 58, 49, 9.48])


def test_weighted_product_soft_and_hard_with_an_exponent_for_each_cost() -> None:
    terms = (CostTerm(cost="latency", target=10, weight=-0.5), CostTerm(cost="memory", target=2, weight=-1))
    soft = WeightedProduct(objective=ACCURACY, costs=terms)
    assert scores(soft) == pytest.approx(
        [90 / math.sqrt(2) / 0.5, 80 / 2, 60 * math.sqrt(2), 10 * math.sqrt(1000) / 0.5]
    )
    hard = WeightedProduct(objective=ACCURACY, costs=terms, hard=True)
    assert scores(hard) == pytest.approx([90 / math.sqrt(2), 80 / 2, 60, 10])
    # The trap: softly, the useless network that costs next to nothing wins.
    assert np.argmax(soft.scores(COLUMNS)) == 3
    assert np.argmax(hard.scores(COLUMNS)) == 0


def goals(latency_weight: float = 1.0) -> tuple[Goal, Goal]:
    return (
        Goal(objective=ACCURACY, ideal=100.0),
        Goal(objective=Objective("latency", "minimize", reference=20.0), ideal=0.0, weight=latency_weight),
    )


def test_exponential_sum_of_distances_from_the_ideal() -> None:
    # distances of accuracy .1 .2 .4 .9, of latency 1 .5 .25 .0005
    assert scores(ExponentialSum(goals=goals(), power=1)) == pytest.approx([-1.1, -0.7, -0.65, -0.9005])
    assert scores(ExponentialSum(goals=goals(2), power=2)) == pytest.approx(
        [-(0.01 + 2), -(0.04 + 0.5), -(0.16 + 0.125), -(0.81 + 2 * 0.0005**2)]
    )


def test_chebyshev_is_the_limit_of_large_powers_and_reaches_dents_that_no_sum_reaches() -> None:
    assert scores(Chebyshev(goals=goals(), augmentation=0)) == pytest.approx([-1, -0.5, -0.4, -0.9])
    power = 200
    high = (-ExponentialSum(goals=goals(), power=power).scores(COLUMNS)) ** (1 / power)
    assert high == pytest.approx(-np.array(scores(Chebyshev(goals=goals(), augmentation=0))), rel=0.01)
    # (0, 1), (0.6, 0.6), (1, 0): the middle is on the front, in a dent.
    dent = {"a": np.array([0.0, 0.6, 1.0]), "b": np.array([1.0, 0.6, 0.0])}
    low = [Objective(name, "minimize", reference=1.0) for name in "ab"]
    for share in np.linspace(0.01, 0.99, 99):
        weighted = [Goal(objective=o, ideal=0.0, weight=w) for o, w in zip(low, (share, 1 - share), strict=True)]
        assert np.argmax(ExponentialSum(goals=tuple(weighted), power=1).scores(dent)) != 1
    even = tuple(Goal(objective=each, ideal=0.0) for each in low)
    assert np.argmax(Chebyshev(goals=even).scores(dent)) == 1
    # Augmentation breaks the tie between (1, 1) and (1, 0), which is dominated by it.
    tie = {"a": np.array([1.0, 1.0]), "b": np.array([1.0, 0.0])}
    assert np.diff(Chebyshev(goals=even, augmentation=0).scores(tie)) == 0
    assert np.argmax(Chebyshev(goals=even).scores(tie)) == 1


def test_several_devices_worst_mean_and_one_limit_each() -> None:
    targets = {"latency": 10.0, "memory": 2.0}
    assert across_devices(COLUMNS, targets, "worst").tolist() == [2, 2, 1, 0.5]
    assert across_devices(COLUMNS, targets, "mean") == pytest.approx([1.25, 1.5, 0.75, 0.2505])
    one = Rejected(objective=ACCURACY, limits=(at_most(DEVICE_COST, 1.0),))
    each = Rejected(objective=ACCURACY, limits=tuple(at_most(cost, limit) for cost, limit in targets.items()))
    rng = np.random.default_rng(3)
    columns = {"accuracy": rng.random(500)} | {name: rng.integers(1, 20, 500) / 4 for name in targets}
    narrow = {"latency": 3.0, "memory": 2.0}
    each = Rejected(objective=ACCURACY, limits=tuple(at_most(cost, limit) for cost, limit in narrow.items()))
    worst = AcrossDevices(inner=one, targets=narrow).scores(columns)
    assert np.array_equal(worst, each.scores(columns))
    mean = AcrossDevices(inner=one, targets=narrow, how="mean").scores(columns)
    assert set(np.flatnonzero(np.isfinite(worst))) < set(np.flatnonzero(np.isfinite(mean)))
    # What the combined cost stands for is named; multipliers move through it.
    priced = WeightedSum(objective=ACCURACY, costs=(CostTerm(cost=DEVICE_COST, weight=1),))
    assert AcrossDevices(inner=priced, targets=targets).names == ("accuracy", "latency", "memory")
    assert [o.metric for o in AcrossDevices(inner=priced, targets=targets).objectives] == [
        "accuracy", "latency", "memory",
    ]  # fmt: skip
    moving = AcrossDevices(
        inner=Lagrangian(objective=ACCURACY, limits=(at_most(DEVICE_COST, 1),), rate=2), targets=targets
    )
    seen = Result(metrics={"accuracy": 1.0}, costs={"latency": 5.0, "memory": 5.0})  # worst 2.5, excess 1.5
    assert moving.after(seen).state == (3.0,)
    assert moving.with_state([3.0]) == moving.after(seen)
    assert moving.after(Result.failed("crashed")) is moving


def test_limits_of_a_budget_and_unknown_costs() -> None:
    limits = Budget.parse("latency<=10ms, throughput>=100/s").limits
    columns = {"latency": np.array([5.0, 20.0, math.nan]), "throughput": np.array([50.0, 150.0, 100.0])}
    excess = relative_excess(columns, limits)
    assert excess[:2].tolist() == [[-0.5, 0.5], [1.0, -0.5]]
    assert math.isnan(excess[2, 0])
    assert feasible(columns, limits).tolist() == [False, False, False]
    assert feasible(columns, limits[1:]).tolist() == [False, True, True]
    assert feasible(columns, ()).tolist() == [True, True, True]


def test_scores_of_results() -> None:
    problem = Rejected(objective=ACCURACY, limits=TEN)
    good = Result(metrics={"accuracy": 80.0}, costs={"latency": 10.0})
    slow = Result(metrics={"accuracy": 90.0}, costs={"latency": 20.0})
    assert (problem.score(good), problem.score(slow)) == (80.0, -math.inf)
    assert problem.score(Result(metrics={"accuracy": 90.0})) == -math.inf  # unknown is not "within the limit"
    assert math.isnan(problem.score(Result(costs={"latency": 1.0})))
    assert math.isnan(Plain(objective=ACCURACY).score(Result.failed("crashed")))
    assert columns_of([good, slow], ["latency"])["latency"].tolist() == [10.0, 20.0]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: at_most("latency", 0), "limit: got 0; allowed: a positive finite number"),
        (lambda: Rejected(objective=ACCURACY, limits=()), "at least one Limit"),
        (lambda: Penalised(objective=ACCURACY, limits=TEN, weight=-1), "weight: got -1; allowed: a positive"),
        (lambda: Lagrangian(objective=ACCURACY, limits=TEN, multipliers=(1, 2)), "1 finite numbers from 0"),
        (lambda: Lagrangian(objective=ACCURACY, limits=TEN, multipliers=(-1,)), "1 finite numbers from 0"),
        (lambda: FeasibleFirst(objective=Objective("accuracy"), limits=TEN), "the worst value that counts"),
        (
            lambda: WeightedSum(objective=ACCURACY, costs=(CostTerm(cost="latency", weight=-1),)),
            "weight of 'latency': got -1; allowed: positive: the sum subtracts costs",
        ),
        (
            lambda: WeightedProduct(objective=ACCURACY, costs=(CostTerm(cost="latency", weight=0.07),)),
            "exponent of 'latency': got 0.07; allowed: negative",
        ),
        (
            lambda: WeightedProduct(
                objective=Objective("error", "minimize"), costs=(CostTerm(cost="latency", weight=-1),)
            ),
            "'maximize' in a product",
        ),
        (lambda: Goal(objective=ACCURACY, ideal=-1.0), r"better than the objective's reference \(0.0\)"),
        (lambda: ExponentialSum(goals=goals(), power=0.5), "power: got 0.5"),
        (lambda: Chebyshev(goals=goals(), augmentation=-1), "augmentation: got -1"),
        (lambda: AcrossDevices(inner=Plain(objective=ACCURACY), targets={"a": 1.0}), "reads 'device_cost'"),
        (lambda: across_devices(COLUMNS, {}, "worst"), "at least one target"),
        (lambda: Rejected(objective=ACCURACY, limits=TEN).scores({"accuracy": np.ones(2)}), "columns with 'latency'"),
        (lambda: relative_excess(COLUMNS, [Limit("latency", "<=", 0.5, "x", relative=True)]), "absolute limits"),
        (
            lambda: WeightedProduct(objective=ACCURACY, costs=(CostTerm(cost="latency", weight=-1),)).scores(
                {"accuracy": np.ones(1), "latency": np.zeros(1)}
            ),
            "positive costs in a product",
        ),
    ],
)
def test_errors_say_what_is_allowed(make: object, text: str) -> None:
    with pytest.raises(UserError, match=text):
        make()  # type: ignore[operator]
