"""The survey's formulations: fifty facts of the real table with measured latencies, and closed forms without it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_tables import real_table

from archsmith.core.errors import UserError
from archsmith.methods.hw_nas_survey import (
    Settings,
    cost_model_report,
    device_correlations,
    epsilon_sweep,
    front,
    lagrangian,
    optimum,
    plain,
    table_columns,
    two_stage,
    violation_report,
    weighted_sum_sweep,
)
from archsmith.space import Objective
from archsmith.space.formulations import (
    DEVICE_COST,
    AcrossDevices,
    Chebyshev,
    CostTerm,
    FeasibleFirst,
    Formulation,
    Goal,
    Lagrangian,
    Penalised,
    Plain,
    Rejected,
    WeightedProduct,
    WeightedSum,
    at_most,
)
from archsmith.space.trial import Result

GOLDEN_FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((GOLDEN_FOLDER / "hw-nas-survey.json").read_text())
LATENCY = json.loads((GOLDEN_FOLDER / "nas-bench-201-latency.json").read_text())["cases"]
FRONTS = {row["device"]: row for row in json.loads((GOLDEN_FOLDER / "hypervolume.json").read_text())["fronts"]}

CONSTRAINED = [case for case in LATENCY if case["name"].startswith("constrained/")]
CORRELATED = [case for case in LATENCY if case["name"].startswith("device_rank_correlation/")]
ACCURACY = Objective("test_accuracy", reference=0.0)


def real_columns(*costs: str) -> dict[str, np.ndarray]:
    table = real_table("nas-bench-201", "nas-bench-201-latency-help.parquet", "nas-bench-201-latency-oneproxy.parquet")
    return table_columns(table, ("test_accuracy", *costs), dataset="cifar100")


def cost_of(device: str) -> str:
    return "macs_paper" if device == "flops" else f"latency_{device}"


# ------------------------------------------------------------------------------------------------------ the real table


def test_there_are_fifty_cases() -> None:
    assert (len(CONSTRAINED), len(CORRELATED), len(GOLDEN["fronts"]), len(GOLDEN["weighted_product"])) == (18, 24, 6, 2)


@pytest.mark.parametrize("case", CONSTRAINED, ids=lambda case: case["name"])
@pytest.mark.parametrize("kind", [Rejected, FeasibleFirst], ids=lambda kind: kind.__name__)
def test_best_under_a_limit(case: dict[str, Any], kind: type[Rejected] | type[FeasibleFirst]) -> None:
    expected, cost = case["expected"], cost_of(case["expected"]["device"])
    columns = real_columns(cost)
    limits = (at_most(cost, expected["limit_ms"]),)
    found = optimum(columns, kind(objective=ACCURACY, limits=limits))
    assert found is not None
    assert found.row == expected["best_index"]
    assert found.value == pytest.approx(expected["best_acc"], abs=case["tolerance"])
    assert found.costs[cost] == pytest.approx(expected["cost"], abs=case["tolerance"])
    (report,) = violation_report(columns, limits)
    assert report.n - report.broken == expected["n_feasible"]
    if kind is Rejected:
        assert found.admitted == expected["n_feasible"]


@pytest.mark.parametrize("case", CORRELATED, ids=lambda case: case["name"])
def test_rank_correlation_of_two_devices(case: dict[str, Any]) -> None:
    first, second = (cost_of(device) for device in case["name"].split("/")[1].split("|"))
    found = device_correlations(real_columns(first, second), [first, second])
    assert found == {(first, second): pytest.approx(case["expected"], abs=case["tolerance"])}


@pytest.mark.parametrize("case", GOLDEN["fronts"], ids=lambda case: case["device"])
def test_front(case: dict[str, Any]) -> None:
    known, cost = FRONTS[case["device"]], cost_of(case["device"])
    columns = real_columns(*dict.fromkeys((cost, "macs_paper")))
    objectives = [ACCURACY, Objective(cost, "minimize", reference=known["ref_cost"])]
    found = front(columns, objectives)
    assert len(found.rows) == known["n_front"]
    assert found.hypervolume.value == pytest.approx(known["hypervolume"], rel=1e-6)
    assert found.hypervolume.reference == (-known["ref_acc"], known["ref_cost"])
    assert list(found.rows[:5]) == case["front_first"]
    assert list(found.rows[-5:]) == case["front_last"]
    report = cost_model_report(columns["macs_paper"], columns[cost])
    assert report.spearman == pytest.approx(case["spearman_cost_flops"], rel=1e-6)
    # With every cost of the front as a limit, the epsilon-constraint method is the front.
    sweep = epsilon_sweep(columns, ACCURACY, cost, columns[cost][list(found.rows)].tolist())
    assert [each.row for _, each in sweep if each] == list(found.rows)


@pytest.mark.parametrize("case", GOLDEN["weighted_product"], ids=lambda case: case["device"])
@pytest.mark.parametrize("form", ["soft", "hard"])
def test_weighted_product(case: dict[str, Any], form: str) -> None:
    cost = cost_of(case["device"])
    term = CostTerm(cost=cost, target=case["target"], weight=case["w"])
    problem = WeightedProduct(objective=ACCURACY, costs=(term,), hard=form == "hard")
    found = optimum(real_columns(cost), problem)
    assert found is not None
    assert found.row == case[f"{form}_best"]
    assert found.score / 100 == pytest.approx(case[f"{form}_value"], abs=case["tolerance"])


def product(exponent: float, *, hard: bool = False) -> WeightedProduct:
    term = CostTerm(cost="latency_pixel3", target=10.0, weight=exponent)
    return WeightedProduct(objective=ACCURACY, costs=(term,), hard=hard)


def test_the_trap_of_soft_exponents_on_pixel3() -> None:
    """At -0.3 it is not yet a useless network, as has been said, but one far below the target; useless from -0.71."""
    columns, settings = real_columns("latency_pixel3"), Settings(chance=1.0)
    mild = optimum(columns, product(-0.3), settings)
    assert mild is not None
    assert (mild.row, round(mild.value, 2), round(mild.costs["latency_pixel3"], 2)) == (8912, 58.98, 1.07)
    (note,) = mild.notes
    assert "at 0.107 of its target or less and gives up 11.89 of test_accuracy" in note
    strong = optimum(columns, product(-1.0), settings)
    assert strong is not None
    assert (strong.row, strong.value) == (7001, 1.0)
    assert "the optimum is at chance level: test_accuracy 1, guessing reaches 1" in strong.notes[0]
    before, after = (optimum(columns, product(exponent), settings) for exponent in (-0.70, -0.71))
    assert before is not None
    assert after is not None
    assert before.value > 50
    assert after.value == 1.0
    for exponent in (-0.07, -0.3, -1.0):
        hard = optimum(columns, product(exponent, hard=True), settings)
        assert hard is not None
        assert hard.notes == ()
        assert hard.value > 70
    # Any formulation is watched, not only products: without a floor, a price per millisecond ends there too.
    dear = WeightedSum(objective=ACCURACY, costs=(CostTerm(cost="latency_pixel3", weight=80.0),))
    assert "chance level" in optimum(columns, dear, settings).notes[0]  # type: ignore[union-attr]
    assert optimum(columns, dear).notes == ()  # type: ignore[union-attr]  # what guessing reaches was not said


def test_lagrangian_finds_supported_points_and_a_bound_on_the_real_table() -> None:
    columns = real_columns("latency_pixel3")
    for limit in (5.0, 10.0, 15.0, 20.0):
        limits = (at_most("latency_pixel3", limit),)
        exact = optimum(columns, Rejected(objective=ACCURACY, limits=limits))
        found = lagrangian(columns, Lagrangian(objective=ACCURACY, limits=limits, rate=5.0), steps=100)
        assert exact is not None
        assert found.best is not None
        print(
            f"pixel3 <= {limit}: exact {exact.value:.2f}, dual ascent {found.best.value:.2f}, bound {found.bound:.3f}"
        )
        assert found.best.costs["latency_pixel3"] <= limit
        assert found.best.value <= exact.value <= found.bound + 1e-9
        assert found.bound - exact.value < 1.5
        assert exact.value - found.best.value < 2.5


def test_penalties_are_exact_from_some_weight_on() -> None:
    columns, limits = real_columns("latency_pixel3"), (at_most("latency_pixel3", 10.0),)
    exact = optimum(columns, Rejected(objective=ACCURACY, limits=limits))
    light, heavy = (optimum(columns, Penalised(objective=ACCURACY, limits=limits, weight=w)) for w in (1.0, 1e5))
    assert exact is not None
    assert light is not None
    assert heavy is not None
    assert heavy.row == exact.row
    assert light.costs["latency_pixel3"] > 10


def test_two_stages_lose_what_the_first_did_not_keep() -> None:
    columns, limits = real_columns("latency_pixel3"), (at_most("latency_pixel3", 10.0),)
    exact = optimum(columns, Rejected(objective=ACCURACY, limits=limits))
    assert exact is not None
    assert two_stage(columns, ACCURACY, limits, keep=100) is None
    some = two_stage(columns, ACCURACY, limits, keep=2000)
    assert some == exact or (some is not None and some.row == exact.row)
    assert plain(columns, ACCURACY).row == int(columns["test_accuracy"].argmax())  # type: ignore[union-attr]


def test_one_network_for_several_devices_of_the_real_table() -> None:
    targets = {"latency_pixel3": 10.0, "latency_eyeriss": 5.0, "latency_1080ti_256": 20.0}
    columns = real_columns(*targets)
    each = Rejected(objective=ACCURACY, limits=tuple(at_most(cost, limit) for cost, limit in targets.items()))
    relative = Rejected(objective=ACCURACY, limits=(at_most(DEVICE_COST, 1.0),))
    separate, worst, mean = (
        optimum(columns, problem)
        for problem in (
            each,
            AcrossDevices(inner=relative, targets=targets),
            AcrossDevices(inner=relative, targets=targets, how="mean"),
        )
    )
    assert separate is not None
    assert worst is not None
    assert mean is not None
    assert (worst.row, worst.admitted) == (separate.row, separate.admitted)
    assert mean.value >= worst.value
    assert mean.admitted > worst.admitted
    print({name: (found.row, found.value, dict(found.costs)) for name, found in
           (("worst", worst), ("mean", mean))})  # fmt: skip


def test_macs_as_a_latency_model_break_limits() -> None:
    """A straight line through MACs, fitted on all rows: it ranks, and a quarter of what it admits is too slow."""
    columns = real_columns("macs_paper", "latency_pixel3")
    line = np.polynomial.Polynomial.fit(columns["macs_paper"], columns["latency_pixel3"], 1)
    report = cost_model_report(line(columns["macs_paper"]), columns["latency_pixel3"], limit=10.0)
    print(report)
    assert report.spearman == pytest.approx(0.84116, abs=1e-4)
    assert 0.05 < report.violation_rate < 0.5
    assert report.admitted - report.violations + report.missed == 7202  # feasible ones of the golden case
    assert report.worst_excess > 0.5


# ----------------------------------------------------------------------------------------- by hand, without the table

HAND = {
    "accuracy": np.array([70.0, 90.0, 90.0, 60.0, np.nan]),
    "latency": np.array([8.0, 20.0, 16.0, 4.0, 1.0]),
    "memory": np.array([1.0, 1.0, 1.0, 3.0, 1.0]),
}
BY_HAND = Objective("accuracy", reference=0.0)


def test_ties_go_to_the_cheaper_one_then_to_the_first() -> None:
    limits = (at_most("latency", 30.0), at_most("memory", 2.0))
    found = optimum(HAND, Rejected(objective=BY_HAND, limits=limits))
    assert found is not None
    assert (found.row, found.ties, found.admitted, found.costs) == (2, 2, 3, {"latency": 16.0, "memory": 1.0})
    assert plain(HAND, BY_HAND).row == 1  # type: ignore[union-attr]  # no cost is read: the first


def test_an_optimum_that_breaks_a_limit_says_so() -> None:
    limits = (at_most("latency", 3.0), at_most("memory", 2.0))
    first = optimum(HAND, FeasibleFirst(objective=BY_HAND, limits=limits[:1]))
    assert first is not None
    # The only feasible one has no known accuracy: the one that breaks least is next, and it says so.
    assert (first.row, first.notes) == (3, ("the optimum breaks a limit: latency<=3.0, it has 4.",))
    light = optimum(HAND, Penalised(objective=BY_HAND, limits=limits, weight=0.1))
    assert light is not None
    assert (light.row, light.notes) == (2, ("the optimum breaks a limit: latency<=3.0, it has 16.",))
    inner = Penalised(objective=BY_HAND, limits=(at_most(DEVICE_COST, 1.0),), weight=0.1)
    several = optimum(HAND, AcrossDevices(inner=inner, targets={"latency": 4.0, "memory": 2.0}))
    assert several is not None
    assert several.notes == ("the optimum breaks a limit: device_cost<=1.0, it has 4.",)
    kept = optimum(HAND, Penalised(objective=BY_HAND, limits=(at_most("latency", 30.0),), weight=0.1))
    assert kept is not None
    assert kept.notes == ()


def test_nothing_feasible_is_no_optimum() -> None:
    assert optimum(HAND, Rejected(objective=BY_HAND, limits=(at_most("latency", 2.0),))) is None
    assert two_stage(HAND, BY_HAND, (at_most("latency", 10.0),), keep=2) is None
    third = two_stage(HAND, BY_HAND, (at_most("latency", 10.0),), keep=3)
    assert third is not None
    assert third.row == 0
    everyone = two_stage(HAND, BY_HAND, (at_most("latency", 2.0),), keep=99)
    assert everyone is None  # the unknown accuracy never survives
    with pytest.raises(UserError, match="keep: got 0"):
        two_stage(HAND, BY_HAND, (at_most("latency", 2.0),), keep=0)


def test_front_by_hand() -> None:
    objectives = [BY_HAND, Objective("latency", "minimize", reference=20.0)]
    found = front(HAND, objectives)
    assert found.rows == (3, 0, 2)
    # columns from 4 to 8, 8 to 16 and 16 to 20 with heights 60, 70 and 90
    assert found.hypervolume.value == 4 * 60 + 8 * 70 + 4 * 90
    with pytest.raises(UserError, match="the worst value that counts"):
        front(HAND, [Objective("accuracy")])
    with pytest.raises(UserError, match="at least one Objective"):
        front(HAND, [])
    sweep = epsilon_sweep(HAND, BY_HAND, "latency", [3.0, 4.0, 15.0, 16.0])
    assert [found.row if found else None for _, found in sweep] == [None, 3, 0, 2]


def test_sums_never_reach_a_dent_and_chebyshev_and_limits_do() -> None:
    columns = {"accuracy": np.array([90.0, 60.0, 50.0]), "latency": np.array([20.0, 12.0, 1.0])}  # 60 is in a dent
    assert front(columns, [BY_HAND, Objective("latency", "minimize", reference=30.0)]).rows == (2, 1, 0)
    sums = [
        WeightedSum(objective=BY_HAND, costs=(CostTerm(cost="latency", weight=float(w)),))
        for w in np.geomspace(0.01, 100, 200)
    ]
    assert {found.row for _, found in weighted_sum_sweep(columns, BY_HAND, sums) if found} == {0, 2}
    goals = (
        Goal(objective=BY_HAND, ideal=90.0, weight=1.0),
        Goal(objective=Objective("latency", "minimize", reference=30.0), ideal=0.0, weight=0.9),
    )
    assert optimum(columns, Chebyshev(goals=goals)).row == 1  # type: ignore[union-attr]
    assert dict(epsilon_sweep(columns, BY_HAND, "latency", [12.0]))[12.0].row == 1  # type: ignore[union-attr]
    found = lagrangian(columns, Lagrangian(objective=BY_HAND, limits=(at_most("latency", 12.0),), rate=10.0))
    assert found.best is not None
    assert found.best.row == 2  # the gap that duality leaves: row 1 is feasible and better
    assert found.bound > 60
    assert all(multiplier >= 0 for (multiplier,) in found.multipliers)
    with pytest.raises(UserError, match="sums of 'latency'"):
        weighted_sum_sweep(columns, Objective("latency", "minimize"), sums)
    with pytest.raises(UserError, match="steps: got 0"):
        lagrangian(columns, Lagrangian(objective=BY_HAND, limits=(at_most("latency", 12.0),)), steps=0)


def test_violations_by_hand() -> None:
    columns = {"latency": np.array([5.0, 10.0, 12.0, 20.0, np.nan])}
    (report,) = violation_report(columns, [at_most("latency", 10.0)])
    assert (report.n, report.broken, report.rate) == (4, 2, 0.5)
    assert (report.mean_excess, report.worst_excess) == (pytest.approx(0.6), pytest.approx(1.0))
    (none,) = violation_report(columns, [at_most("latency", 30.0)])
    assert (none.broken, none.rate, none.mean_excess, none.worst_excess) == (0, 0.0, 0.0, 0.0)
    (empty,) = violation_report({"latency": np.array([np.nan])}, [at_most("latency", 1.0)])
    assert math.isnan(empty.rate)


def test_cost_model_report_by_hand() -> None:
    measured = [10.0, 20.0, 30.0, 40.0]
    report = cost_model_report([12.0, 19.0, 24.0, 44.0], measured, limit=25.0)
    assert (report.spearman, report.kendall) == (pytest.approx(1), pytest.approx(1))
    assert report.mape == pytest.approx((0.2 + 0.05 + 0.2 + 0.1) / 4)
    assert report.bias == pytest.approx((0.2 - 0.05 - 0.2 + 0.1) / 4)
    assert (report.admitted, report.violations, report.violation_rate) == (3, 1, pytest.approx(1 / 3))
    assert (report.worst_excess, report.missed) == (pytest.approx(0.2), 0)
    timid = cost_model_report([30.0, 20.0, 25.1, 40.0], measured, limit=25.0)
    assert (timid.violations, timid.missed) == (0, 1)
    none = cost_model_report([50.0, 51.0, 52.0, 53.0], measured, limit=25.0)
    assert math.isnan(none.violation_rate)
    assert (none.missed, none.limit) == (2, 25.0)
    perfect = cost_model_report(measured, measured)
    assert (perfect.mape, perfect.violations, perfect.limit) == (0.0, 0, None)
    for bad in (([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([1.0, 2.0], [0.0, 1.0]), ([1.0, math.nan], [1.0, 2.0])):
        with pytest.raises(UserError):
            cost_model_report(*bad)
    with pytest.raises(UserError, match="limit: got -1"):
        cost_model_report([1.0, 2.0], [1.0, 2.0], limit=-1.0)


@pytest.mark.parametrize("problem", [Plain(objective=BY_HAND), product(-0.07)], ids=["plain", "product"])
def test_a_search_and_the_table_score_alike(problem: Formulation) -> None:
    """What a strategy is told of a result is the table's score of its row."""
    columns = {"accuracy": np.array([70.0, 60.0]), "test_accuracy": np.array([70.0, 60.0])}
    columns |= {"latency_pixel3": np.array([8.0, 12.0])}
    results = [Result(metrics={name: float(values[row]) for name, values in columns.items()}) for row in (0, 1)]
    assert [problem.score(result) for result in results] == problem.scores(columns).tolist()


def test_other_devices_are_features_for_a_new_one() -> None:
    """Ten measured cells of the FPGA: their operations alone, and beside them four other devices' latencies."""
    from archsmith.predictors import Ridge
    from archsmith.run.statistics import spearman_rho

    table = real_table("nas-bench-201", "nas-bench-201-latency-help.parquet", "nas-bench-201-latency-oneproxy.parquet")
    hot = np.eye(5)[table.columns["ops"]].reshape(len(table), 30)
    known = np.stack([table.values(cost_of(each)) for each in ("pixel3", "raspi4", "gold_6226", "1080ti_1")], axis=1)
    target = np.asarray(table.values("latency_fpga"), dtype=np.float64)

    def ranked(features: np.ndarray, seed: int) -> float:
        order = np.random.default_rng(seed).permutation(len(target))
        model = Ridge(seed=seed)
        model.fit(features[order[:10]], target[order[:10]])
        return spearman_rho(model.predict(features[order[10:]]).mean.tolist(), target[order[10:]].tolist())

    alone, together = (
        float(np.mean([ranked(features, seed) for seed in range(20)])) for features in (hot, np.hstack([hot, known]))
    )
    print(f"ten cells: operations {alone:.3f}, with four other devices {together:.3f}")
    assert alone < 0.7
    assert together > 0.94
