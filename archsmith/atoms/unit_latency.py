"""Latency of cut networks: a table measured once, and a plan whose result is measured before it is believed.

Latency is no sum over units. The table only says where removing saves time: the time of the network with half of one
group's units gone, for every group. What a plan leaves is then measured itself, and the aim is lowered until the
measurement keeps ``MARGIN`` of the limit. Every measurement is kept by what was cut, so that a resumed run decides the
same without measuring again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from torch import nn

from archsmith.atoms.unit_budget import Order, Removed, UnitPlan, chunks, plan_units
from archsmith.atoms.unit_costs import Polynomial, Shrunk, UnitCosts
from archsmith.atoms.units import UnitGroup
from archsmith.core.errors import Shown, UserError

FloatArray = npt.NDArray[np.float64]

MARGIN = 0.95
"""Part of a latency limit that a plan aims at; the rest is for the spread of the measurement."""

ATTEMPTS = 12
"""Plans measured until one keeps the limit."""

Measure = Callable[[nn.Module], float]
"""Returns the latency of a network in milliseconds."""


class LatencyTable:
    """Measured milliseconds of one network and of cuts of it.

    Args:
        shrunk: Makes a copy without given units, with real tensors.
        measure: The measurement.
        measured: What is known already, as ``measured`` of an earlier table.

    Attributes:
        measured: Milliseconds by the text of what was removed: "ffn=64, stem=8", empty for nothing. JSON.
        removed: Units that earlier cuts took out of the network that ``shrunk`` copies, by group name.
    """

    def __init__(self, shrunk: Shrunk, measure: Measure, measured: Mapping[str, float] | None = None) -> None:
        self._shrunk = shrunk
        self._measure = measure
        self.measured = dict(measured or {})
        self.removed: dict[str, int] = {}

    def of(self, removed: Removed) -> float:
        """Return the milliseconds of the network without ``removed``; numbers of units decide, not which."""
        counts = dict(self.removed)
        for name, units in removed.items():
            counts[name] = counts.get(name, 0) + len(units)
        key = ", ".join(f"{name}={count}" for name, count in sorted(counts.items()) if count)
        if key not in self.measured:
            self.measured[key] = self._measure(self._shrunk(removed))
        return self.measured[key]

    def polynomial(self, groups: Sequence[UnitGroup], costs: UnitCosts) -> Polynomial:
        """Return predicted milliseconds, linear in the kept shares of the groups of ``costs``.

        A group whose saving does not come out of the noise is given its share of the MACs instead, so that it is
        neither free nor useless to cut.
        """
        whole = self.of({})
        halves: dict[int, tuple[float, int]] = {}
        for number, group in enumerate(groups):
            queue = chunks(group, np.zeros(group.size))
            if not queue:
                continue
            taken = np.sort(np.concatenate(queue[: max(1, len(queue) // 2)]))
            halves[number] = (whole - self.of({group.name: taken}), len(taken))
        kept = np.array([group.size for group in groups], dtype=np.float64)
        macs = costs.compiled("macs")
        per_unit = macs.gradient(kept) / max(1.0, macs.value(kept))
        slopes = {}
        for number, (saved, taken_units) in halves.items():
            by_macs = per_unit[number] * whole
            slopes[number] = max(saved / taken_units, 0.1 * by_macs, 1e-12 * whole)
        total = sum(slope * groups[number].size for number, slope in slopes.items())
        result: Polynomial = {(): Fraction(whole - total)}
        for number, slope in slopes.items():
            result[number,] = Fraction(slope * costs.sizes[number])
        return result


def plan_with_latency(
    groups: Sequence[UnitGroup],
    scores: Mapping[str, FloatArray],
    costs: UnitCosts,
    limits: Mapping[str, float],
    table: LatencyTable,
    *,
    order: Order = "share_per_cost",
    dead: Mapping[str, Sequence[int]] | None = None,
) -> UnitPlan:
    """Return a plan that keeps every limit, the latency by measurement; see ``plan_units``.

    Raises:
        UserError: As ``plan_units``, or the latency stays above the limit after ``ATTEMPTS`` measured plans.
    """
    if "latency" not in limits:
        return plan_units(groups, scores, costs, limits, order=order, dead=dead)
    aim = MARGIN * limits["latency"]
    target, found = aim, float("inf")
    predicted = costs.compile(table.polynomial(groups, costs))
    for _ in range(ATTEMPTS):
        plan = plan_units(
            groups, scores, costs, {**limits, "latency": target}, order=order, dead=dead, latency=predicted
        )
        found = table.of(plan.removed)
        if found <= aim:
            return UnitPlan(plan.removed, plan.kept, {**plan.costs, "latency": found})
        # What was removed so far saves less than predicted: ask for as much more as is missing, and a little.
        target = min(plan.costs["latency"], target) - 1.1 * (found - aim)
    raise UserError(
        "budget",
        Shown(f"latency<={limits['latency']:g}ms"),
        allowed=f"what can be reached; the last of {ATTEMPTS} measured plans takes {found:.4g} ms",
        hint="Raise the limit, or shrink by macs first.",
    )
