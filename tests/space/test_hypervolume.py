from __future__ import annotations

import itertools

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.space import Objective, Result
from archsmith.space.hypervolume import hypervolume, hypervolume_of


def by_inclusion_exclusion(points: np.ndarray, reference: np.ndarray) -> float:
    """The volume of a union of boxes, literally."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in itertools.combinations(points, size):
            corner = np.max(chosen, axis=0)
            total += (-1) ** (size + 1) * float(np.prod(np.maximum(reference - corner, 0)))
    return total


@pytest.mark.parametrize(
    ("points", "reference", "expected"),
    [
        ([[1.0]], [4.0], 3.0),
        ([[1, 3], [2, 2], [3, 1]], [4, 4], 3 + 2 + 1),  # columns of width 1 and heights 1, 2, 3
        ([[0, 0]], [2, 3], 6),
        ([[1, 3], [1, 3], [2, 3.5]], [4, 4], 3),  # a duplicate and a dominated point
        ([[1, 3], [5, 0], [0, 4]], [4, 4], 3),  # beyond the reference, and on it
        ([[np.nan, 0], [1, 3]], [4, 4], 3),
        ([[0, 0, 0]], [1, 2, 3], 6),
        ([[0, 1, 1], [1, 0, 1], [1, 1, 0]], [2, 2, 2], 3 * 2 - 3 + 1),  # boxes of 2 that share the unit cube
        ([[1, 1, 0], [0, 0, 1]], [2, 2, 2], 2 + 4 - 1),
    ],
)
def test_hand_computed_cases(points: list[list[float]], reference: list[float], expected: float) -> None:
    found = hypervolume(np.array(points, dtype=float), reference)
    assert (found.value, found.standard_error) == (pytest.approx(expected), 0.0)
    assert found.reference == tuple(map(float, reference))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("grid", [True, False], ids=["ties", "real"])
def test_exact_volumes_equal_inclusion_and_exclusion(dimensions: int, grid: bool) -> None:
    for seed in range(40):
        rng = np.random.default_rng(seed)
        points = rng.integers(0, 5, (8, dimensions)).astype(float) if grid else rng.random((8, dimensions)) * 5
        reference = np.full(dimensions, 4.0)
        inside = points[(points < 4).all(axis=1)]
        expected = by_inclusion_exclusion(inside, reference)
        assert hypervolume(points, reference).value == pytest.approx(expected, abs=1e-9), seed


@pytest.mark.parametrize("dimensions", [2, 3])
def test_fifty_points_agree_with_monte_carlo(dimensions: int) -> None:
    points = np.random.default_rng(1).random((50, dimensions))
    drawn = np.random.default_rng(2).random((200_000, dimensions))
    share = (points[None] <= drawn[:, None]).all(2).any(1).mean()
    assert hypervolume(points, np.ones(dimensions)).value == pytest.approx(share, rel=0.01)


def test_four_objectives_are_sampled_within_their_standard_error() -> None:
    points = np.random.default_rng(3).random((6, 4))
    expected = by_inclusion_exclusion(points, np.ones(4))
    found = hypervolume(points, np.ones(4), rng=np.random.default_rng(0))
    assert 0 < found.standard_error < 0.01
    assert abs(found.value - expected) < 4 * found.standard_error
    # A third objective that all share is a factor, so three objectives check the sampler's scale as well.
    single = hypervolume(np.array([[0.0, 1.0, 2.0, 3.0]]), [1, 3, 5, 7], rng=np.random.default_rng(0))
    assert single.value == 1 * 2 * 3 * 4


def test_a_dominated_point_changes_nothing() -> None:
    points = np.random.default_rng(4).random((20, 3))
    worse = points[3] + 0.01
    assert hypervolume(np.vstack([points, worse]), np.ones(3)) == hypervolume(points, np.ones(3))


def test_results_are_bounded_by_their_objectives() -> None:
    objectives = [Objective("accuracy", reference=0.0), Objective("latency_ms", "minimize", reference=10.0)]
    results = [
        Result(metrics={"accuracy": 90.0}, costs={"latency_ms": 4.0}),
        Result(metrics={"accuracy": 80.0}, costs={"latency_ms": 2.0}),
        Result.failed("crashed"),
    ]
    found = hypervolume_of(results, objectives)
    assert found.value == 90 * 6 + 80 * 2
    assert found.reference == (0.0, 10.0)


def test_errors_say_what_is_missing() -> None:
    with pytest.raises(UserError, match="the worst value that counts"):
        hypervolume_of([], [Objective("accuracy")])
    with pytest.raises(UserError, match="more than three objectives are sampled"):
        hypervolume(np.zeros((1, 4)), np.ones(4))
    with pytest.raises(UserError, match="finite numbers"):
        hypervolume(np.zeros((1, 2)), [1, np.inf])
    with pytest.raises(UserError, match=r"\(M,\) for losses"):
        hypervolume(np.zeros((1, 2)), [1, 2, 3])
    with pytest.raises(UserError, match="-inf"):
        hypervolume(np.array([[-np.inf, 0.0]]), [1, 1])
