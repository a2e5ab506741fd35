"""The NAS-Bench-201 protocol on the real table: stopping rule, the benchmark's mutation, and simulated means.

Means are compared three ways: the strategies with the recorded simulations (500 seeds of an independent script), a
plain numpy version over many seeds with the same records, and, as slow evidence, the strategies with that version.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from benchmark_tables import real_table
from references.tabular_searchers import Clock, evolution, random_search, reinforce

from archsmith.core.errors import UserError
from archsmith.evaluate.tables import Table, TableEvaluator
from archsmith.families.cell_spaces import NB201_EDGES, NB201_OPERATIONS, cell_from_string, nas_bench_201_space
from archsmith.methods.nas_bench_201 import (
    SEARCHERS,
    TARGET_THEN_SOURCE,
    Settings,
    Simulation,
    search,
    simulate,
)
from archsmith.strategies import Proposal, Strategy

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "nas-bench-201.json").read_text())
SIMULATED = {"RANDOM": "RANDOM", "REA": "REA", "REINFORCE lr 0.01": "REINFORCE lr 0.01"}
METRICS = {"val": "valid_accuracy", "test": "test_accuracy"}


@pytest.fixture
def table() -> Table:
    return real_table("nas-bench-201")


class Scripted(Strategy):
    """Proposes the given rows, then nothing."""

    def __init__(self, table: Table, rows: list[int]) -> None:
        super().__init__(table.space)
        self.cells = [table.architecture(row) for row in rows]

    @property
    def done(self) -> bool:
        return not self.cells

    def _propose(self) -> Proposal | None:
        return Proposal(self.cells.pop(0)) if self.cells else None


def accuracies(table: Table, rows: np.ndarray, name: str) -> np.ndarray:
    """Return a column of the recorded simulations ("cifar10_val", "imagenet16_120_test") for some rows."""
    dataset, part = name.rsplit("_", 1)
    return table.values(METRICS[part], dataset=dataset)[rows]


def referenced(table: Table, name: str, runs: int, seed: int) -> np.ndarray:
    """Return the rows of the plain numpy version."""
    columns, rng = table.columns, np.random.default_rng(seed)
    value = columns["val_acc_12ep_cifar10"].astype(float)
    clock = Clock(runs, value, columns["train_time_s_200ep_cifar10"].astype(float) * 12 / 200, 12_000.0)
    ops = columns["ops"].astype(np.int64)
    if name == "RANDOM":
        return random_search(clock, rng)
    return evolution(clock, ops, rng) if name == "REA" else reinforce(clock, ops, rng, float(name.split()[-1]))


def close(first: np.ndarray, case: dict, column: str) -> bool:  # type: ignore[type-arg]
    """Within the recorded tolerance, or 4 standard errors of the difference of the two means if that is more."""
    spread = case.get("std_over_seeds", {}).get(column, first.std(ddof=1))
    error = (first.var(ddof=1) / len(first) + spread**2 / 500) ** 0.5
    return bool(abs(first.mean() - case["expected"][column]) <= max(case["tolerance"], 4 * error))


@pytest.mark.parametrize("name", SIMULATED)
def test_thirty_runs_agree_with_the_recorded_means(table: Table, name: str) -> None:
    """Bounds of 4 standard errors, the runs' and the record's; no allowance beyond them."""
    case = GOLDEN["simulate"][SIMULATED[name]]
    simulation = simulate(SEARCHERS[name], table, Settings(runs=30))
    for column in case["expected"]:
        found = accuracies(table, simulation.rows, column)
        error = (found.var(ddof=1) * (1 / 30 + 1 / 500)) ** 0.5
        assert abs(found.mean() - case["expected"][column]) <= 4 * error, column


@pytest.mark.parametrize("name", SIMULATED)
def test_the_plain_version_agrees_with_the_recorded_means(table: Table, name: str) -> None:
    case = GOLDEN["simulate"][SIMULATED[name]]
    rows = referenced(table, name, 2000, seed=0)
    for column in case["expected"]:
        assert close(accuracies(table, rows, column), case, column), column


@pytest.mark.slow
@pytest.mark.parametrize("name", SEARCHERS)
def test_five_hundred_runs(table: Table, name: str) -> None:
    simulation = simulate(SEARCHERS[name], table, Settings(runs=500))
    plain = referenced(table, name, 10_000, seed=1)
    for column in ("cifar10_val", "cifar10_test", "cifar100_val", "cifar100_test"):
        found, expected = accuracies(table, simulation.rows, column), accuracies(table, plain, column)
        error = (found.var(ddof=1) / len(found) + expected.var(ddof=1) / len(expected)) ** 0.5
        assert abs(found.mean() - expected.mean()) <= 4 * error, column
        if name in SIMULATED:
            assert close(found, GOLDEN["simulate"][SIMULATED[name]], column), column


@pytest.mark.slow
def test_evolution_beats_random_search(table: Table) -> None:
    """By about 0.17 points of CIFAR-10 test accuracy, on the same seeds."""
    runs = {name: simulate(SEARCHERS[name], table, Settings(runs=500)) for name in ("RANDOM", "REA")}
    gain = runs["REA"].accuracy("test_accuracy", "cifar10") - runs["RANDOM"].accuracy("test_accuracy", "cifar10")
    error = gain.std(ddof=1) / len(gain) ** 0.5
    assert gain.mean() > 4 * error
    assert abs(gain.mean() - 0.17) <= 4 * error


def test_the_mutation_draws_target_then_source_then_operation() -> None:
    space, rng = nas_bench_201_space(), np.random.default_rng(0)
    cell = cell_from_string("|none~0|+|skip_connect~0|none~1|+|nor_conv_1x1~0|none~1|avg_pool_3x3~2|")
    edges: Counter[str] = Counter()
    operations: Counter[str] = Counter()
    draws = 3000
    for _ in range(draws):
        child = TARGET_THEN_SOURCE(space, cell, rng)
        (path,) = [path for path in cell if child[path] != cell[path]]
        edges[path] += 1
        if path == "edge/0-1":
            operations[str(child[path])] += 1
    for source, target in NB201_EDGES:
        p = 1 / (3 * target)
        assert abs(edges[f"edge/{source}-{target}"] - draws * p) <= 4 * (draws * p * (1 - p)) ** 0.5
    assert set(operations) == set(NB201_OPERATIONS) - {"none"}
    for count in operations.values():
        assert abs(count - edges["edge/0-1"] / 4) <= 4 * (edges["edge/0-1"] * 3 / 16) ** 0.5


def test_a_run_stops_before_the_query_that_would_exceed_the_budget(table: Table) -> None:
    evaluator = TableEvaluator(table, fidelity=12)
    seconds = table.columns["train_time_s_200ep_cifar10"].astype(float) * 12 / 200
    rows = [0, 1, 6111, 3]
    enough = float(seconds[rows[:3]].sum())
    run = search(Scripted(table, rows), evaluator, enough)
    assert (run.row, run.queries) == (6111, 3)
    assert run.seconds == pytest.approx(enough)
    run = search(Scripted(table, rows), evaluator, enough - 1e-3)
    assert (run.row, run.queries) == (1, 2)
    whole = search(Scripted(table, rows), evaluator, 1e9)
    assert whole.queries == 4 and whole.row == 6111


def test_the_best_cell_seen_is_returned_the_first_of_equal_ones(table: Table) -> None:
    evaluator = TableEvaluator(table, fidelity=12)
    short = table.values("valid_accuracy", fidelity=12)
    values, counts = np.unique(short, return_counts=True)
    tie = np.flatnonzero(short == values[counts > 1][-1]).tolist()
    low = int(short.argmin())
    assert search(Scripted(table, [low, tie[1], tie[0], low]), evaluator, 1e9).row == tie[1]


def test_a_budget_below_one_query_is_refused(table: Table) -> None:
    with pytest.raises(UserError, match=r"budget_seconds: got 10.0; allowed: at least the cost of one query"):
        simulate(SEARCHERS["RANDOM"], table, Settings(budget_seconds=10.0, runs=1))
    with pytest.raises(ValueError, match="budget_seconds"):
        Settings(budget_seconds=0)
    with pytest.raises(UserError, match="dataset: got 'mnist'"):
        simulate(SEARCHERS["RANDOM"], table, Settings(dataset="mnist"))


def test_the_same_seed_is_the_same_run(table: Table) -> None:
    for name, make in SEARCHERS.items():
        first = simulate(make, table, Settings(runs=2, seed=7))
        again = simulate(make, table, Settings(runs=1, seed=8))
        assert first.rows[1] == again.rows[0], name
        assert (first.seconds <= 12_000).all() and (first.queries > 50).all()


def test_searching_elsewhere_uses_that_clock(table: Table) -> None:
    settings = Settings(dataset="imagenet16_120", runs=2, budget_seconds=120_000)
    simulation = simulate(SEARCHERS["REA"], table, settings)
    assert isinstance(simulation, Simulation)
    assert (simulation.queries > 50).all() and (simulation.accuracy("test_accuracy", "imagenet16_120") > 30).all()
