from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from shared_data import shared_data

from archsmith.core.errors import UserError
from archsmith.families.cell_spaces import NB201_EDGES, NB201_OPERATIONS, nas_bench_201_space
from archsmith.space import Architecture, Budget, Objective, Result, dominates, pareto_front
from archsmith.space.hypervolume import hypervolume, hypervolume_of
from archsmith.space.pareto import losses
from archsmith.strategies import Nsga2, RandomSearch, Strategy
from archsmith.strategies.nsga2 import ranks_and_crowding
from archsmith.testing.strategies import flat_space, toy_score

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "hypervolume.json").read_text())["fronts"]


def peeled(points: np.ndarray) -> list[int]:
    """Fronts by the definition: what nothing left dominates is taken off, layer by layer."""
    rank = [-1] * len(points)
    layer = 0
    while -1 in rank:
        left = [i for i, r in enumerate(rank) if r == -1]
        free = [i for i in left if not any(dominates(points[j], points[i]) for j in left)]
        for i in free:
            rank[i] = layer
        layer += 1
    return rank


@pytest.mark.parametrize("objectives", [1, 2, 3, 5])
def test_fronts_equal_the_definition_with_ties_and_duplicates(objectives: int) -> None:
    for seed in range(20):
        points = np.random.default_rng(seed).integers(0, 4, (25, objectives)).astype(float)
        points[20:] = points[:5]
        ranks, _ = ranks_and_crowding(points, np.zeros(25))
        assert ranks.tolist() == peeled(points)


def test_crowding_is_the_share_of_the_range_between_the_neighbours() -> None:
    # Range 10 in both: the second point's neighbours are 4 apart in x and 8 in y. pymoo divides by the number of
    # objectives, which changes no comparison.
    points = np.array([[0.0, 10.0], [1.0, 3.0], [4.0, 2.0], [10.0, 0.0]])
    ranks, crowding = ranks_and_crowding(points, np.zeros(4))
    assert ranks.tolist() == [0, 0, 0, 0]
    assert crowding.tolist() == pytest.approx([np.inf, (0.4 + 0.8) / 2, (0.9 + 0.3) / 2, np.inf])


def test_infeasible_points_rank_behind_by_their_violation() -> None:
    points = np.array([[5.0, 5.0], [0.0, 0.0], [6.0, 6.0], [1.0, 1.0], [np.nan, np.nan]])
    ranks, _ = ranks_and_crowding(points, np.array([0, 0.5, 0, 0.1, np.inf]))
    assert ranks.tolist() == [0, 3, 1, 2, 4]


def test_the_best_of_parents_and_children_survive() -> None:
    search = Nsga2(flat_space(), population=4, objectives=[Objective("a", "minimize"), Objective("b", "minimize")])
    first = [(1, 9), (9, 1), (5, 5), (8, 8)]
    second = [(2, 2), (1, 9), (9, 9), (0, 20)]
    for generation in (first, second):
        for trial, (a, b) in zip(search.ask(9), generation, strict=True):
            search.tell(trial.id, Result(metrics={"a": float(a), "b": float(b)}))
    # First front: (1,9) twice, (9,1), (2,2), (0,20): five for four places; one of the twins has no space around it.
    assert sorted(member.losses for member in search.members) == [(0, 20), (1, 9), (2, 2), (9, 1)]


def test_what_follows_does_not_depend_on_the_order_of_results() -> None:
    searches = [Nsga2(flat_space(), population=8, seed=4) for _ in range(2)]
    for _ in range(3):
        first, second = (search.ask(8) for search in searches)
        assert [t.architecture for t in first] == [t.architecture for t in second]
        for search, trials in zip(searches, (first, second[::-1]), strict=True):
            assert search.ask() == []
            for trial in trials:
                score = toy_score(search.space, trial.architecture)
                search.tell(trial.id, Result(metrics={"valid_accuracy": score}))


def test_constraints_come_before_objectives() -> None:
    search = Nsga2(flat_space(), population=4, constraints=Budget.parse("params<=10, throughput>=100/s"))
    told = [(99.0, 20.0, 100.0), (98.0, 11.0, 50.0), (1.0, 10.0, 100.0), (97.0, 12.0, 100.0)]
    for trial, (accuracy, params, throughput) in zip(search.ask(4), told, strict=True):
        costs = {"params": params, "throughput": throughput}
        search.tell(trial.id, Result(metrics={"valid_accuracy": accuracy}, costs=costs))
    found = [(-member.losses[0], pytest.approx(member.violation)) for member in search.members]
    assert found == [(1.0, 0.0), (97.0, 0.2), (98.0, 0.1 + 0.5), (99.0, 1.0)]


def test_failures_and_missing_costs_rank_last() -> None:
    search = Nsga2(flat_space(), population=4, constraints=Budget.parse("params<=10"))
    results = [
        Result.failed("crashed"),
        Result.infeasible("too large", costs={"params": 15.0}),
        Result(metrics={"valid_accuracy": 5.0}),  # no cost: unknown is not within the budget
        Result(metrics={"valid_accuracy": 1.0}, costs={"params": 9.0}),
    ]
    for trial, result in zip(search.ask(4), results, strict=True):
        search.tell(trial.id, result)
    assert [member.violation for member in search.members] == [0.0, 0.5, np.inf, np.inf]


def test_bad_settings_are_named() -> None:
    for settings, text in (
        ({"population": 1}, "population: got 1"),
        ({"mutation_probability": 2}, "mutation_probability: got 2"),
        ({"constraints": Budget.parse("macs<=0.5x")}, "absolute limits"),
    ):
        with pytest.raises(UserError, match=text):
            Nsga2(flat_space(), **settings)


# -------------------------------------------------------------------------------- the real table, where it is present


def real_columns(device: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the cells' operations (N, 6), their cost on a device and their CIFAR-100 test accuracy in percent."""
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = shared_data("nas-benchmarks")
    edges = [f"op_e{source}{target}" for source, target in NB201_EDGES]
    names = [*edges, "test_acc_200ep_cifar100", "flops_cifar100"]
    table = parquet.read_table(folder / "nas-bench-201.parquet", columns=names)
    operations = np.stack([table[name].to_numpy() for name in edges], axis=1)
    if device == "flops":
        cost = table["flops_cifar100"].to_numpy()
    else:
        cost = parquet.read_table(folder / "nas-bench-201-latency-help.parquet", columns=[device])[device].to_numpy()
    return operations, cost.astype(float), table["test_acc_200ep_cifar100"].to_numpy()


def objectives_of(golden: dict[str, float]) -> list[Objective]:
    return [
        Objective("accuracy", reference=golden["ref_acc"]),
        Objective("cost", "minimize", reference=golden["ref_cost"]),
    ]


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: str(golden["device"]))
def test_the_hypervolume_of_the_whole_table_is_the_golden_one(golden: dict[str, float]) -> None:
    _, cost, accuracy = real_columns(str(golden["device"]))
    points = np.stack([-accuracy, cost], axis=1)
    found = hypervolume(points, (-golden["ref_acc"], golden["ref_cost"]))
    assert found.value == pytest.approx(golden["hypervolume"], rel=1e-6)
    results = [Result(metrics={"accuracy": float(a), "cost": float(c)}) for a, c in zip(accuracy, cost, strict=True)]
    assert len(pareto_front(results, objectives_of(golden))) == golden["n_front"]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["pixel3", "raspi4", "gold_6226"])
def test_nsga2_reaches_the_front_of_the_real_table(device: str) -> None:
    """2,000 evaluations, population 50, five seeds: at least 0.997 of the exact hypervolume, more than random."""
    golden = next(row for row in GOLDEN if row["device"] == device)
    operations, cost, accuracy = real_columns(device)
    row_of = {tuple(row): i for i, row in enumerate(operations.tolist())}
    code = {name: i for i, name in enumerate(NB201_OPERATIONS)}
    objectives = objectives_of(golden)

    def evaluated(architecture: Architecture) -> Result:
        row = row_of[tuple(code[str(operation)] for operation in architecture.values())]
        return Result(metrics={"accuracy": float(accuracy[row]), "cost": float(cost[row])})

    def share(strategy: Strategy) -> float:
        results: list[Result] = []
        while len(results) < 2_000:
            for trial in strategy.ask(50):
                results.append(evaluated(trial.architecture))
                strategy.tell(trial.id, results[-1])
        assert not np.isnan(losses(results, objectives)).any()
        return hypervolume_of(results, objectives).value / golden["hypervolume"]

    space = nas_bench_201_space()
    evolved = [share(Nsga2(space, objectives=objectives, seed=seed)) for seed in range(5)]
    drawn = [share(RandomSearch(space, objectives=objectives, seed=seed)) for seed in range(5)]
    print(f"{device}: NSGA-II {np.mean(evolved):.4f} ({min(evolved):.4f} to {max(evolved):.4f}), "
          f"random {np.mean(drawn):.4f} ({min(drawn):.4f} to {max(drawn):.4f})")  # fmt: skip
    assert np.mean(evolved) >= 0.997
    assert min(evolved) > max(drawn)
