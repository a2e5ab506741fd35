"""What an evaluation promises: acquisition functions of a prediction, and transformations of what was observed.

All are pure functions of arrays; larger is better everywhere.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from archsmith.core.errors import UserError

# N candidates or observations

Acquisition = Literal["ei", "pi", "ucb", "thompson", "mean"]
Scaling = Literal["log-regret", "rank", "none"]

ACQUISITIONS: tuple[Acquisition, ...] = ("ei", "pi", "ucb", "thompson", "mean")
SCALINGS: tuple[Scaling, ...] = ("log-regret", "rank", "none")


def normal_cdf(z: np.ndarray) -> np.ndarray:
    """Return the distribution function of the standard normal."""
    from scipy.special import ndtr

    value: np.ndarray = ndtr(z)
    return value


def expected_improvement(mean: np.ndarray, std: np.ndarray, best: float) -> np.ndarray:
    """Return E[max(Y - best, 0)] for Y normal (Jones et al. 1998); exact where ``std`` is zero.

    Args:
        mean: Shape (N,).
        std: Shape (N,), from 0.
        best: The best value observed.
    """
    gain = mean - best
    safe = np.where(std > 0, std, 1.0)
    z = gain / safe
    spread = safe * (z * normal_cdf(z) + np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))
    return np.where(std > 0, np.maximum(spread, 0.0), np.maximum(gain, 0.0))


def acquire(
    kind: Acquisition,
    mean: np.ndarray,
    std: np.ndarray,
    best: float,
    rng: np.random.Generator,
    exploration: float = 1.0,
) -> np.ndarray:
    """Return the value of evaluating each candidate.

    ======== ==============================================================================================
    ei       expected improvement over ``best``
    pi       probability of improving on ``best`` by ``exploration`` standard deviations, as its z-score
    ucb      ``mean + exploration * std``
    thompson one draw from each candidate's own normal distribution (independent Thompson sampling, White et
             al. 2021, Sec. 4)
    mean     the mean: no exploration
    ======== ==============================================================================================

    Args:
        kind: One of the above.
        mean: Shape (N,).
        std: Shape (N,), from 0.
        best: The best value observed.
        rng: Stream of "thompson"; the others draw nothing.
        exploration: From 0; used by "pi" and "ucb".

    Raises:
        UserError: An unknown kind.
    """
    if kind == "ei":
        return expected_improvement(mean, std, best)
    if kind == "pi":
        return (mean - best) / np.maximum(std, 1e-12) - exploration
    if kind == "ucb":
        return mean + exploration * std
    if kind == "thompson":
        return mean + std * rng.standard_normal(len(mean))
    if kind == "mean":
        return mean
    raise UserError("acquisition", kind, allowed=f"one of {list(ACQUISITIONS)}")


def scaled(kind: Scaling, values: np.ndarray) -> np.ndarray:
    """Return observations on a scale on which a predictor can tell good from best; order is kept.

    Accuracies are skewed: a few wrecks at chance level, most within a few percent of the best. On their own scale the
    wrecks are all that a squared error sees.

    ========== ==============================================================================================
    log-regret ``-log(1 + 4 r / m)``: r how far below the best, m the median of these; halving the distance to
               the best is worth about the same everywhere beyond m/4
    rank       normal scores: the quantile of the standard normal at (rank - 1/2) / N, equal values share a rank
    none       as they are
    ========== ==============================================================================================

    Args:
        kind: One of the above.
        values: Finite, shape (N,).

    Raises:
        UserError: An unknown kind.
    """
    if kind == "none" or not len(values):
        return values.astype(np.float64)
    if kind == "log-regret":
        regret = values.max() - values
        middle = float(np.median(regret)) or float(regret.mean())
        return -np.log1p(4 * regret / middle) if middle > 0 else np.zeros(len(values))
    if kind == "rank":
        from scipy.special import ndtri
        from scipy.stats import rankdata

        quantiles: np.ndarray = ndtri((rankdata(values) - 0.5) / len(values))
        return quantiles
    raise UserError("scaling", kind, allowed=f"one of {list(SCALINGS)}")
