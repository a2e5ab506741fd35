"""Hypervolume: how much of the objective space a set of results dominates, up to a reference point.

Exact in one, two and three dimensions, by sweeping; above, by Monte Carlo with a standard error. A hypervolume is a
number only together with its reference point, so there is no default.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space.pareto import losses, non_dominated
from archsmith.space.trial import Objective, Result

# N points, M objectives, S samples

CHUNK = 4_096
"""Samples that are compared with all points at once."""


@dataclass(frozen=True)
class Hypervolume:
    """A hypervolume and how sure it is.

    Attributes:
        value: In the product of the objectives' units.
        standard_error: 0 where it is exact.
        reference: The losses that bound it, shape (M,).
    """

    value: float
    standard_error: float
    reference: tuple[float, ...]


def hypervolume(
    losses_NM: np.ndarray,
    reference_M: Sequence[float] | np.ndarray,
    *,
    rng: np.random.Generator | None = None,
    samples: int = 100_000,
) -> Hypervolume:
    """Return the volume that is dominated by some point and dominates the reference.

    Args:
        losses_NM: Losses of shape (N, M), smaller is better. Points with a NaN, and those that are not better than the
            reference in every objective, add nothing; so do dominated points and duplicates.
        reference_M: Losses of shape (M,), finite.
        rng: Stream of the samples; needed above three objectives.
        samples: How many are drawn there, uniformly in the box between the best of each loss and the reference.

    Raises:
        UserError: Shapes that do not match, a reference that is not finite, a loss of minus infinity, or more than
            three objectives without ``rng``.
    """
    points = np.asarray(losses_NM, dtype=np.float64)
    reference = np.asarray(reference_M, dtype=np.float64)
    if points.ndim != 2 or reference.shape != (points.shape[1],) or not points.shape[1]:
        raise UserError("reference", f"shape {reference.shape}", allowed=f"(M,) for losses (N, M), here {points.shape}")
    if not np.isfinite(reference).all():
        raise UserError("reference", reference.tolist(), allowed="finite numbers")
    inside = points[(points < reference).all(axis=1)]
    if np.isneginf(inside).any():
        raise UserError("losses", "-inf", allowed="finite numbers, where better than the reference")
    bounds = tuple(float(bound) for bound in reference)
    if not len(inside):
        return Hypervolume(0.0, 0.0, bounds)
    front = np.unique(inside[non_dominated(inside)], axis=0)
    if len(reference) == 1:
        return Hypervolume(float(reference[0] - front[0, 0]), 0.0, bounds)
    if len(reference) == 2:
        return Hypervolume(_area(front, reference), 0.0, bounds)
    if len(reference) == 3:
        return Hypervolume(_volume(front, reference), 0.0, bounds)
    if rng is None:
        raise UserError("rng", None, allowed="a numpy Generator: more than three objectives are sampled")
    return _sampled(front, reference, rng, samples)


def _area(front: np.ndarray, reference: np.ndarray) -> float:
    """Return the area under a staircase: the front sorted by its first loss falls in its second."""
    right = np.append(front[1:, 0], reference[0])
    return float(((right - front[:, 0]) * (reference[1] - front[:, 1])).sum())


def _volume(front: np.ndarray, reference: np.ndarray) -> float:
    """Return the volume by a sweep along the third loss, with the staircase of the first two kept up to date."""
    order = np.argsort(front[:, 2], kind="stable")
    # The staircase between two sentinels: x ascending, y descending.
    xs, ys = [-math.inf, float(reference[0])], [float(reference[1]), -math.inf]
    area, volume = 0.0, 0.0
    for position, i in enumerate(order):
        x, y, z = (float(value) for value in front[i])
        at = bisect_left(xs, x)
        if ys[at - 1] > y and not (xs[at] == x and ys[at] <= y):  # not below the staircase already
            last = at
            while ys[last] >= y:
                last += 1
            # What the new point adds, step by step, up to the first corner that is lower.
            left, height = x, ys[at - 1]
            for corner in range(at, last + 1):
                area += (xs[corner] - left) * (height - y)
                left, height = xs[corner], ys[corner]
            xs[at:last], ys[at:last] = [x], [y]
        following = float(front[order[position + 1], 2]) if position + 1 < len(order) else float(reference[2])
        volume += area * (following - z)
    return volume


def _sampled(front: np.ndarray, reference: np.ndarray, rng: np.random.Generator, samples: int) -> Hypervolume:
    low = front.min(axis=0)
    box = float(np.prod(reference - low))
    hits = 0
    for start in range(0, samples, CHUNK):
        drawn_SM = low + (reference - low) * rng.random((min(CHUNK, samples - start), len(reference)))
        hits += int((front[None, :, :] <= drawn_SM[:, None, :]).all(axis=2).any(axis=1).sum())
    share = hits / samples
    error = box * math.sqrt(share * (1 - share) / samples)
    return Hypervolume(box * share, error, tuple(float(bound) for bound in reference))


def hypervolume_of(
    results: Sequence[Result], objectives: Sequence[Objective], *, rng: np.random.Generator | None = None
) -> Hypervolume:
    """Return the hypervolume of results, bounded by the objectives' own references.

    Args:
        results: Failed and infeasible ones, and those without a metric, add nothing.
        objectives: Each with a ``reference``. The reported reference is in losses: negated where larger is better.
        rng: See ``hypervolume``.

    Raises:
        UserError: No objective, or one without a reference.
    """
    references = []
    for objective in objectives:
        if objective.reference is None:
            raise UserError(
                f"objective {objective.metric!r}.reference", None, allowed="the worst value that counts, a number"
            )
        references.append(-objective.reference if objective.direction == "maximize" else objective.reference)
    return hypervolume(losses(results, objectives), references, rng=rng)
