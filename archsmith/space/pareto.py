"""Which results are not beaten: exact dominance over several objectives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space.trial import Objective, Result

# N points, M objectives


def losses(results: Sequence[Result], objectives: Sequence[Objective]) -> np.ndarray:
    """Return the objectives' values as a float64 array of shape (N, M), negated where larger is better.

    Entries are NaN where a result is not ok or lacks the metric.

    Raises:
        UserError: No objective is given.
    """
    if not objectives:
        raise UserError("objectives", list(objectives), allowed="at least one Objective")
    signs = np.array([-1.0 if objective.direction == "maximize" else 1.0 for objective in objectives])
    rows = [[objective.value(result) for objective in objectives] for result in results]
    return np.array(rows, dtype=np.float64).reshape(len(results), len(objectives)) * signs


def dominates(first: np.ndarray, second: np.ndarray) -> bool:
    """Return whether losses ``first`` are nowhere worse than ``second`` and better somewhere; never with a NaN.

    Args:
        first: Losses of shape (M,).
        second: Losses of shape (M,).
    """
    return bool((first <= second).all() and (first < second).any())


def non_dominated(losses_NM: np.ndarray) -> np.ndarray:
    """Return one bool per row: whether no other row dominates it. Equal rows stay together; rows with NaN never stay.

    Args:
        losses_NM: Losses of shape (N, M), smaller is better, compared exactly; infinities are ordinary values.
    """
    points = np.asarray(losses_NM, dtype=np.float64)
    keep = np.array(~np.isnan(points).any(axis=1))
    # In lexicographic order a point can only be dominated by an earlier one, and then also by one of the front so far.
    order = np.lexsort(points.T[::-1])
    front = np.empty((0, points.shape[1]))
    for i in order:
        if not keep[i]:
            continue
        point = points[i]
        beaten = (front <= point).all(axis=1) & (front < point).any(axis=1)
        keep[i] = not beaten.any()
        if keep[i]:
            front = np.vstack([front, point])
    return keep


def pareto_front(results: Sequence[Result], objectives: Sequence[Objective]) -> list[int]:
    """Return the positions of the results that no other dominates, ascending.

    Ties are kept: results with equal values are all on the front or all off it. Failed and infeasible results, and
    those with a NaN or without the metric, are never on it.

    Raises:
        UserError: No objective is given.
    """
    return [int(i) for i in np.flatnonzero(non_dominated(losses(results, objectives)))]
