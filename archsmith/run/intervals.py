"""Intervals that the report gives beside its numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

_NORMAL_95 = 1.959963984540054


def wilson(share: float, examples: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of an accuracy in [0, 1] that was counted on ``examples`` examples.

    It covers the choice of the test images only: not the seed, and not the choice of the network by a search.
    """
    z2 = _NORMAL_95**2
    centre = (share + z2 / (2 * examples)) / (1 + z2 / examples)
    spread = math.sqrt(share * (1 - share) / examples + z2 / (4 * examples**2))
    half = _NORMAL_95 / (1 + z2 / examples) * spread
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def mean_interval(values: Sequence[float]) -> tuple[float, float, float] | None:
    """Return the mean and its 95 % interval by Student's t, or None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    mean = statistics.fmean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half
