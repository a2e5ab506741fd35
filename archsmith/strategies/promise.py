"""Which candidates together promise most: a batch chosen by the hypervolume it would add."""

from __future__ import annotations

import numpy as np

from archsmith.space import non_dominated
from archsmith.space.hypervolume import hypervolume

# N candidates, M objectives


def chosen_by_hypervolume(
    losses_NM: np.ndarray, measured: np.ndarray, reference_M: np.ndarray, count: int
) -> np.ndarray:
    """Return the positions of ``count`` candidates, one after the other the one that adds most hypervolume.

    Args:
        losses_NM: Predicted losses of the candidates, up to three objectives.
        measured: Losses that were measured, shape (K, M); what a candidate adds is beyond their front.
        reference_M: Losses that bound the hypervolume.
        count: How many; fewer where there are fewer candidates.

    When nothing is left that adds any, those follow that come nearest to the front: by how far, relative to the range
    of the measured losses, a candidate would have to improve in all objectives at once to be on it.
    """
    front = _front(measured)
    scale = np.maximum(measured.max(axis=0) - measured.min(axis=0), 1e-12)
    left = np.ones(len(losses_NM), dtype=bool)
    # What a candidate adds never grows when others are chosen: an old gain bounds a new one (Minoux 1978).
    bounds = np.where((losses_NM < reference_M).all(axis=1), np.prod(reference_M - losses_NM, axis=1), 0.0)
    chosen: list[int] = []
    while len(chosen) < min(count, len(losses_NM)):
        best = _best_gain(losses_NM, bounds, front, reference_M)
        if best is None:
            best = int(np.argmin(np.where(left, _shortfall(losses_NM, front, scale), np.inf)))
        chosen.append(best)
        left[best], bounds[best] = False, 0.0
        front = _front(np.vstack([front, losses_NM[best]]))
    return np.array(chosen, dtype=np.int64)


def _front(losses_NM: np.ndarray) -> np.ndarray:
    return np.unique(losses_NM[non_dominated(losses_NM)], axis=0)


def _best_gain(losses_NM: np.ndarray, bounds: np.ndarray, front: np.ndarray, reference_M: np.ndarray) -> int | None:
    """Return the candidate that adds most, None when none adds any; tighten ``bounds`` to what was computed."""
    inside = front[(front < reference_M).all(axis=1)]
    if losses_NM.shape[1] <= 2:
        added = _lengths if losses_NM.shape[1] == 1 else _areas
        np.minimum(bounds, added(losses_NM, inside, reference_M), out=bounds)
    else:
        beaten = np.asarray((inside[None] <= losses_NM[:, None]).all(axis=2))
        bounds[beaten.any(axis=1)] = 0.0
        before = hypervolume(inside, reference_M).value
        fresh = np.zeros(len(bounds), dtype=bool)
        while bounds.max(initial=0.0) > 0 and not fresh[at := int(np.argmax(bounds))]:
            bounds[at] = max(0.0, hypervolume(np.vstack([inside, losses_NM[at]]), reference_M).value - before)
            fresh[at] = True
    return int(np.argmax(bounds)) if bounds.max(initial=0.0) > 0 else None


def _lengths(losses_N1: np.ndarray, front: np.ndarray, reference_1: np.ndarray) -> np.ndarray:
    """Return by how much each is better than the best so far."""
    return np.asarray(np.maximum(0.0, min([float(reference_1[0]), *front[:, 0].tolist()]) - losses_N1[:, 0]))


def _areas(losses_N2: np.ndarray, front: np.ndarray, reference_2: np.ndarray) -> np.ndarray:
    """Return the area that each point alone adds below a staircase."""
    ordered = front[np.argsort(front[:, 0])]  # the second loss falls
    lefts = np.concatenate([[-np.inf], ordered[:, 0]])
    rights = np.concatenate([ordered[:, 0], [reference_2[0]]])
    heights = np.concatenate([[reference_2[1]], ordered[:, 1]])  # of the staircase between left and right
    x, y = losses_N2[:, :1], losses_N2[:, 1:]
    widths = np.maximum(0.0, rights[None] - np.maximum(lefts[None], x))
    return np.asarray((widths * np.maximum(0.0, heights[None] - y)).sum(axis=1))


def _shortfall(losses_NM: np.ndarray, front: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return by how much each candidate is behind the front, in ranges of the measured losses; 0 when it is on it."""
    behind = (losses_NM[:, None] - front[None]) / scale  # (N, K, M)
    return np.asarray(np.maximum(0.0, behind.min(axis=2)).max(axis=1))
