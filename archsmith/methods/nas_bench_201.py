"""NAS-Bench-201: searchers on a space of 15,625 cells whose true accuracies are known, compared by simulated time.

A searcher sees the validation accuracy of the 12-epoch training and pays its training time; when the next query would
exceed 12,000 seconds it stops and returns the best cell it has *seen*. That cell is then scored by its 200-epoch
validation and test accuracy, on the data set of the search and, transferred, on the other two. One run takes
milliseconds, so tables of means are over 500 runs.

Here are the protocol and the searchers that query the table: random search, regularised evolution (REA) and REINFORCE,
with the benchmark's settings. What differs: the table does not record the time of validating, so a query costs the
training time alone, 12/200 of the recorded 200-epoch time. The searchers that train a super-network (RSPS, DARTS, GDAS,
SETN, ENAS) are systems of their own; the table only scores the cells they return.

Source: Dong and Yang 2020, arXiv 2001.00326, Sec. 5 and its released scripts; NATS-Bench, arXiv 2009.00437.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from archsmith.core.errors import UserError
from archsmith.evaluate.tables import Table, TableEvaluator
from archsmith.families.cell_spaces import NB201_EDGES
from archsmith.space import Space
from archsmith.strategies import RandomSearch, RegularizedEvolution, Reinforce, Strategy
from archsmith.strategies.evolution import MutateWithin

SYSTEM = {
    "slug": "nas-bench-201",
    "title": "NAS-Bench-201: Extending the Scope of Reproducible Neural Architecture Search",
    "year": 2020,
    "arxiv": "2001.00326",
    "kind": "protocol",
    "aliases": ["nats-bench-topology"],
}

MakeStrategy = Callable[[Space, int], Strategy]
"""Makes a searcher for a space and a seed."""

WEIGHT_SHARING = ("RSPS", "DARTS-V1", "DARTS-V2", "GDAS", "SETN", "ENAS")
"""Rows of the published table that a table alone cannot give."""


class Settings(BaseModel):
    """Settings of the protocol, with the benchmark's values.

    Attributes:
        dataset: Where the searchers look.
        fidelity: Epochs of a query.
        budget_seconds: Simulated seconds of one run.
        runs: Number of runs.
        seed: Seed of the first run; run k has ``seed + k``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = "cifar10"
    fidelity: float = 12
    budget_seconds: float = Field(default=12_000.0, gt=0)
    runs: int = Field(default=500, ge=1)
    seed: int = Field(default=0, ge=0)


DEFAULTS = Settings()

TARGET_THEN_SOURCE = MutateWithin([[f"edge/{a}-{b}" for a, b in NB201_EDGES if b == target] for target in (1, 2, 3)])
"""The benchmark's mutation: a target node, then one of its sources, then another operation, each uniformly."""


def random_search(space: Space, seed: int) -> Strategy:
    """Return RANDOM: uniform cells, with replacement."""
    return RandomSearch(space, seed=seed)


def regularised_evolution(space: Space, seed: int) -> Strategy:
    """Return REA: population 10, tournaments of 3 with replacement, the oldest dies."""
    return RegularizedEvolution(
        space, seed=seed, population=10, tournament=3, replacement=True, mutation=TARGET_THEN_SOURCE
    )


def reinforce(learning_rate: float) -> MakeStrategy:
    """Return REINFORCE: 6 x 5 logits from 1e-3 * normal, Adam, a bias-corrected moving average 0.9 as the baseline.

    Args:
        learning_rate: Of Adam; 0.5 in the released script.
    """

    def make(space: Space, seed: int) -> Strategy:
        return Reinforce(space, seed=seed, learning_rate=learning_rate, baseline_decay=0.9, init_scale=1e-3)

    return make


SEARCHERS: dict[str, MakeStrategy] = {
    "RANDOM": random_search,
    "REA": regularised_evolution,
    "REINFORCE lr 0.5": reinforce(0.5),
    "REINFORCE lr 0.01": reinforce(0.01),
}
"""The searchers of the benchmark that query the table, by name."""


@dataclass(frozen=True)
class Run:
    """One simulated search: the returned row, queries made, seconds spent (at most the budget)."""

    row: int
    queries: int
    seconds: float


def search(strategy: Strategy, evaluator: TableEvaluator, budget_seconds: float) -> Run:
    """Run one searcher until the next query would exceed the budget, and return the best cell it has seen.

    Failed queries cost their time and win nothing; of equal cells the first is returned.

    Raises:
        UserError: Not even one query fits into the budget.
    """
    best, row, spent, queries = -math.inf, -1, 0.0, 0
    while not strategy.done and (trials := strategy.ask()):
        trial = trials[0]
        result = evaluator.evaluate(trial)
        if spent + result.seconds > budget_seconds:
            break
        spent, queries = spent + result.seconds, queries + 1
        strategy.tell(trial.id, result)
        objective = strategy.objective
        value = objective.value(result) * (1 if objective.direction == "maximize" else -1)
        if value > best:
            found = evaluator.table.row(trial.architecture)
            assert found is not None
            best, row = value, found
    if row < 0:
        raise UserError("budget_seconds", budget_seconds, allowed="at least the cost of one query that succeeds")
    return Run(row, queries, spent)


@dataclass(frozen=True)
class Simulation:
    """Many runs of one searcher.

    Attributes:
        table: The table they were run on.
        rows: Returned row of each run.
        queries: Queries of each run.
        seconds: Simulated seconds of each run.
    """

    table: Table
    rows: np.ndarray
    queries: np.ndarray
    seconds: np.ndarray

    def accuracy(self, metric: str, dataset: str) -> np.ndarray:
        """Return the full-training accuracy of each run's cell in percent.

        Args:
            metric: "valid_accuracy" or "test_accuracy".
            dataset: Any data set of the table: that of the search, or one the cell is transferred to.
        """
        return self.table.values(metric, dataset=dataset)[self.rows]


def simulate(make: MakeStrategy, table: Table, settings: Settings = DEFAULTS) -> Simulation:
    """Run a searcher with many seeds on the table.

    Args:
        make: Makes the searcher for a space and a seed: one of ``SEARCHERS``, or your own.
        table: The opened table "nas-bench-201".
        settings: Data set, fidelity, budget and number of runs.

    Raises:
        UserError: No such data set or fidelity, or a budget below a single query.
    """
    evaluator = TableEvaluator(table, dataset=settings.dataset, fidelity=settings.fidelity)
    seeds = range(settings.seed, settings.seed + settings.runs)
    runs = [search(make(table.space, seed), evaluator, settings.budget_seconds) for seed in seeds]
    columns = zip(*((run.row, run.queries, run.seconds) for run in runs), strict=True)
    return Simulation(table, *map(np.array, columns))
