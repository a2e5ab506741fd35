"""Do the parts add up? A look-up table against whole networks that were measured.

Parts measured alone never quite sum to the whole (fusion across borders, caches, layout changes), so a table is fitted
to whole networks, and what is left over is stated with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from archsmith.core.errors import UserError
from archsmith.cost.lookup import LookupTable

NETWORKS_NEEDED = 20
RANKS_NEEDED = 0.9


@dataclass(frozen=True)
class Additivity:
    """How well sums of parts tell the cost of whole networks.

    Args:
        networks: Number of whole networks.
        sum_ratio: Median of (sum of the rows + overhead) / measured, before the fit: 1 if parts simply add up.
        scale: Fitted factor of the sums.
        overhead: Fitted constant, in the table's unit.
        spearman: Rank correlation of sums and measured costs; the fit does not change it.
        median_error: Median relative error of the fitted table, each network left out of its own fit.
        largest_error: The largest of these.
    """

    networks: int
    sum_ratio: float
    scale: float
    overhead: float
    spearman: float
    median_error: float
    largest_error: float

    @property
    def trustworthy(self) -> bool:
        """Whether sums order networks as measured (0.9 or more); else tabulate larger blocks, or measure in quiet."""
        return self.spearman >= RANKS_NEEDED

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        return {**asdict(self), "trustworthy": self.trustworthy}


def fit_whole_networks(
    table: LookupTable, networks: Sequence[Sequence[str]], measured: Sequence[float]
) -> tuple[LookupTable, Additivity]:
    """Return the table fitted to whole networks (scale and overhead by least squares), and how well that works.

    Args:
        table: Measured parts.
        networks: Keys of each network, at least 20 of them.
        measured: Its cost, in the table's unit.

    Raises:
        UserError: Fewer than 20 networks, or what ``LookupTable.fitted`` refuses.
    """
    if len(networks) < NETWORKS_NEEDED or len(networks) != len(measured):
        raise UserError(
            "networks", len(networks), allowed=f"at least {NETWORKS_NEEDED} whole networks, a measurement for each"
        )
    fitted = table.fitted(networks, measured)
    costs = np.asarray(measured, dtype=np.float64)
    sums = np.array([math.fsum(table.row(key).mean for key in keys) for keys in networks])
    errors = []
    for left_out, (sum_, cost) in enumerate(zip(sums, costs, strict=True)):
        rest = np.arange(len(costs)) != left_out
        slope, constant = np.polyfit(sums[rest], costs[rest], 1)
        errors.append(abs(slope * sum_ + constant - cost) / cost)
    ratio = float(np.median([table.cost(keys) for keys in networks] / costs))
    report = Additivity(
        networks=len(networks),
        sum_ratio=ratio,
        scale=fitted.scale,
        overhead=fitted.overhead,
        spearman=_spearman(sums, costs),
        median_error=float(np.median(errors)),
        largest_error=float(np.max(errors)),
    )
    return fitted, report


def _spearman(first: np.ndarray, second: np.ndarray) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)
