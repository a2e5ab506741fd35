"""Searchers on the NAS-Bench-201 table, many seeds at once in plain numpy: independent of spaces and strategies.

Each takes the objective and the cost of every row, and returns the row of the best cell seen within the budget, per
seed; a query that would exceed the budget is not made and ends the run.
"""

from __future__ import annotations

import numpy as np

MOST = 400
"""More queries than any run can pay for."""

_EDGES = np.array([(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)])
_WEIGHTS = 5 ** np.arange(6)


class Clock:
    """Budget and best cell of every run; a run that is over takes part no more."""

    def __init__(self, runs: int, value: np.ndarray, cost: np.ndarray, budget: float) -> None:
        self.value, self.cost, self.budget = value, cost, budget
        self.spent = np.zeros(runs)
        self.over = np.zeros(runs, dtype=bool)
        self.best = np.full(runs, -np.inf)
        self.row = np.full(runs, -1)

    def query(self, rows: np.ndarray) -> np.ndarray:
        """Return the objective of one row per run."""
        self.over |= self.spent + self.cost[rows] > self.budget
        self.spent += np.where(self.over, 0.0, self.cost[rows])
        better = ~self.over & (self.value[rows] > self.best)
        self.best = np.where(better, self.value[rows], self.best)
        self.row = np.where(better, rows, self.row)
        return self.value[rows]


def random_search(clock: Clock, rng: np.random.Generator) -> np.ndarray:
    """Uniform rows with replacement."""
    while not clock.over.all():
        clock.query(rng.integers(5**6, size=len(clock.row)))
    return clock.row


def evolution(clock: Clock, ops: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Population 10, tournaments of 3 with replacement, target then source then another operation, the oldest dies."""
    runs = np.arange(len(clock.row))
    row_of = np.empty(5**6, dtype=np.int64)
    row_of[ops @ _WEIGHTS] = np.arange(5**6)
    alive = np.empty((10, len(runs)), dtype=np.int64)
    fitness = np.empty((10, len(runs)))
    for age in range(MOST):
        if clock.over.all():
            break
        if age < 10:
            rows = rng.integers(5**6, size=len(runs))
        else:
            drawn = rng.integers(10, size=(3, len(runs)))
            winner = drawn[fitness[drawn, runs].argmax(axis=0), runs]
            child = ops[alive[winner, runs]].copy()
            target = rng.integers(1, 4, size=len(runs))
            source = (rng.random(len(runs)) * target).astype(np.int64)
            edge = np.array([[0, 0, 0], [0, 9, 9], [1, 2, 9], [3, 4, 5]])[target, source]
            assert (_EDGES[edge] == np.stack([source, target], axis=1)).all()
            child[runs, edge] = (child[runs, edge] + rng.integers(1, 5, size=len(runs))) % 5
            rows = row_of[child @ _WEIGHTS]
        fitness[age % 10], alive[age % 10] = clock.query(rows), rows  # the eldest's place
    return clock.row


def reinforce(clock: Clock, ops: np.ndarray, rng: np.random.Generator, learning_rate: float) -> np.ndarray:
    """6 x 5 logits, Adam, bias-corrected moving average 0.9 with the reward in it already."""
    runs = np.arange(len(clock.row))
    row_of = np.empty(5**6, dtype=np.int64)
    row_of[ops @ _WEIGHTS] = np.arange(5**6)
    logits = 1e-3 * rng.standard_normal((len(runs), 6, 5))
    first, second = np.zeros_like(logits), np.zeros_like(logits)
    average = np.zeros(len(runs))
    for step in range(1, MOST):
        if clock.over.all():
            break
        shifted = np.exp(logits - logits.max(axis=2, keepdims=True))
        p = shifted / shifted.sum(axis=2, keepdims=True)
        chosen = (rng.random((len(runs), 6, 1)) > p.cumsum(axis=2)).sum(axis=2).clip(max=4)
        reward = clock.query(row_of[chosen @ _WEIGHTS])
        average = 0.9 * average + 0.1 * reward
        advantage = reward - average / (1 - 0.9**step)
        gradient = advantage[:, None, None] * (np.eye(5)[chosen] - p)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        logits += learning_rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return clock.row
