from __future__ import annotations

import math

import numpy as np
import pytest
from generators import few_losses
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays

from archsmith.core.errors import UserError
from archsmith.space import Objective, Result, dominates, non_dominated, pareto_front


@given(arrays(np.float64, array_shapes(min_dims=2, max_dims=2, max_side=6), elements=few_losses))
def test_the_front_equals_its_definition(points: np.ndarray) -> None:
    expected = [
        not np.isnan(point).any() and not any(dominates(other, point) for other in points if not np.isnan(other).any())
        for point in points
    ]
    assert non_dominated(points).tolist() == expected


def test_ties_failures_and_missing_metrics() -> None:
    results = [
        Result(metrics={"accuracy": 0.9}, costs={"macs": 100}),
        Result(metrics={"accuracy": 0.9}, costs={"macs": 100}),  # a tie stays
        Result(metrics={"accuracy": 0.9}, costs={"macs": 101}),  # dominated
        Result(metrics={"accuracy": 0.5}, costs={"macs": 10}),
        Result(metrics={"accuracy": math.nan}, costs={"macs": 1}),
        Result(metrics={"accuracy": 1.0}),  # no cost known
        Result(status="failed", reason="r", metrics={"accuracy": 1.0}, costs={"macs": 1}),
        Result.infeasible("too large", costs={"macs": 1}),
        Result(metrics={"accuracy": 0.4}, costs={"macs": 10}),  # dominated at equal cost
    ]
    assert pareto_front(results, [Objective("accuracy"), Objective("macs", "minimize")]) == [0, 1, 3]
    assert pareto_front(results, [Objective("accuracy")]) == [5]
    assert pareto_front([], [Objective("accuracy")]) == []
    with pytest.raises(UserError, match=r"objectives: got \[\]; allowed: at least one"):
        pareto_front(results, [])


def test_the_front_on_many_small_grids_with_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        points = rng.integers(0, 3, size=(6, int(rng.integers(1, 4)))).astype(float)
        expected = [not any(dominates(other, point) for other in points) for point in points]
        assert non_dominated(points).tolist() == expected
