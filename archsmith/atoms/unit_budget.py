"""Which units go, so that a budget holds: by lost score per cost, in chunks that keep every constraint.

The planner removes one chunk after another. A chunk is the fewest units of a group that may go together: one, or
``divisor`` many, or equally many out of every set that must stay balanced. At each step the chunk goes that loses least
for what it saves; what it saves follows the present sizes of its neighbours (``UnitCosts.marginal``). It stops as soon
as every limit holds, by exact counts, and then puts back what has room again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from archsmith.atoms.unit_costs import CompiledPolynomial, UnitCosts
from archsmith.atoms.units import IntArray, UnitGroup
from archsmith.core.errors import Shown, UserError

FloatArray = npt.NDArray[np.float64]
Order = Literal["share_per_cost", "score_per_cost", "score"]
Removed = dict[str, IntArray]
"""Positions of the units that go, ascending, by group name; groups that lose nothing are left out."""


def chunks(group: UnitGroup, scores: FloatArray, first: Sequence[int] = ()) -> list[IntArray]:
    """Return the units of a group in the order in which they may go, chunk by chunk.

    After any number of chunks the group keeps at least its minimum, a multiple of its divisor (or all of it), and
    equally many units of every set of its balance.

    Args:
        group: The group.
        scores: Its scores, the smallest go first; ties by position.
        first: Units that go before all others, whatever their score.

    Returns:
        Chunks of positions; no chunk at all for a frozen group.
    """
    if group.frozen:
        return []
    early = set(first)
    rank = sorted(range(group.size), key=lambda unit: (unit not in early, scores[unit], unit))
    if group.balance:
        queues = [[unit for unit in rank if unit in set(each)] for each in group.balance]
        rows = [list(row) for row in zip(*queues, strict=True)]
    else:
        rows = [[unit] for unit in rank]
    result: list[IntArray] = []
    waiting: list[int] = []
    left = group.size
    for row in rows:
        waiting += row
        kept = left - len(waiting)
        if kept < max(1, group.minimum):  # a tensor without elements is no layer any more
            break
        if kept % group.divisor == 0:
            result.append(np.array(waiting, dtype=np.int64))
            left, waiting = kept, []
    return result


@dataclass(frozen=True, eq=False)
class UnitPlan:
    """What the planner decided.

    Attributes:
        removed: Units that go.
        kept: Units that stay, by group name.
        costs: Exact costs afterwards, and predicted latency where a limit names it.
    """

    removed: Removed
    kept: Mapping[str, int]
    costs: Mapping[str, float]


@dataclass(eq=False)
class _State:
    """How far every group has been cut while planning."""

    queues: list[list[IntArray]]
    sizes: FloatArray
    kept: FloatArray
    taken: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)

    def take(self, group: int) -> None:
        self.kept[group] -= len(self.queues[group][self.taken[group]])
        self.taken[group] += 1

    def give_back(self, group: int) -> None:
        self.taken[group] -= 1
        self.kept[group] += len(self.queues[group][self.taken[group]])


def plan_units(
    groups: Sequence[UnitGroup],
    scores: Mapping[str, FloatArray],
    costs: UnitCosts,
    limits: Mapping[str, float],
    *,
    order: Order = "share_per_cost",
    dead: Mapping[str, Sequence[int]] | None = None,
    latency: CompiledPolynomial | None = None,
) -> UnitPlan:
    """Return what to remove so that every limit holds.

    Args:
        groups: All groups.
        scores: By group name, (size,), comparable across groups (``unit_scores.normalised``).
        costs: Exact costs of the same groups.
        limits: Absolute limits by cost: "macs", "params", "latency" (ms).
        order: "share_per_cost": keeps ``sum over groups of (part of the group's score that is lost)^2`` small for what
            is saved, where saving counts in parts of what each broken limit still asks for. The square makes every
            further unit of a group dearer, so that no layer collapses because its units cost most. "score_per_cost":
            the score itself for what is saved; "score": the smallest mean score. Both can empty one layer.
        dead: Units by group name that go in any case, as far as the constraints allow.
        latency: Predicted milliseconds in the kept units; needed when ``limits`` names the latency.

    Raises:
        UserError: The limits do not hold even when everything that may go is gone; a score is missing, has a wrong
            length, or is NaN.
    """
    if order not in get_args(Order):
        raise UserError("order", order, allowed=", ".join(get_args(Order)))
    values = [_scores_of(group, scores) for group in groups]
    dead = dead or {}
    state = _State(
        [chunks(group, values[i], dead.get(group.name, ())) for i, group in enumerate(groups)],
        np.array([float(group.size) for group in groups]),
        np.array([float(group.size) for group in groups]),
        [0] * len(groups),
    )
    measures = _measures(costs, limits, latency)
    for number, group in enumerate(groups):  # what is dead goes first, in whole chunks of dead units only
        gone = {int(unit) for unit in dead.get(group.name, ())}
        while state.taken[number] < len(state.queues[number]):
            if not set(state.queues[number][state.taken[number]].tolist()) <= gone:
                break
            state.take(number)
    floor = list(state.taken)
    removal = _remove_until_it_fits(state, values, limits, measures, order)
    _put_back(state, removal, limits, measures, floor)
    removed: Removed = {}
    for number, group in enumerate(groups):
        if state.taken[number]:
            removed[group.name] = np.sort(np.concatenate(state.queues[number][: state.taken[number]]))
    kept = {group.name: int(state.kept[number]) for number, group in enumerate(groups)}
    found: dict[str, float] = {**costs.of(kept)}
    if latency is not None:
        found["latency"] = latency.value(state.kept)
    return UnitPlan(removed, kept, found)


def _scores_of(group: UnitGroup, scores: Mapping[str, FloatArray]) -> FloatArray:
    values = scores.get(group.name)
    if values is None or values.shape != (group.size,) or bool(np.isnan(values).any()):
        shown = None if values is None else Shown(f"shape {values.shape}, NaN: {bool(np.isnan(values).any())}")
        raise UserError(f"scores['{group.name}']", shown, allowed=f"{group.size} numbers, none of them NaN")
    return values


def _measures(
    costs: UnitCosts, limits: Mapping[str, float], latency: CompiledPolynomial | None
) -> dict[str, CompiledPolynomial]:
    measures: dict[str, CompiledPolynomial] = {}
    for name in limits:
        if name in costs.polynomials:
            measures[name] = costs.compiled(name)
        elif name == "latency" and latency is not None:
            measures[name] = latency
        else:
            raise UserError("budget", name, allowed="limits on macs and params, and on latency where it is measured")
    return measures


def _excess(
    kept: FloatArray, limits: Mapping[str, float], measures: Mapping[str, CompiledPolynomial]
) -> dict[str, float]:
    """Return by how much each broken limit is exceeded; counts are whole numbers, so a half forgives rounding."""
    found = {}
    for name, limit in limits.items():
        over = measures[name].value(kept) - limit
        if over > (0.0 if name == "latency" else min(0.5, 1e-9 * limit)):
            found[name] = over
    return found


def _remove_until_it_fits(
    state: _State,
    values: Sequence[FloatArray],
    limits: Mapping[str, float],
    measures: Mapping[str, CompiledPolynomial],
    order: Order,
) -> list[int]:
    """Take chunks until nothing is exceeded; return the groups in the order in which they lost one."""
    sums = [np.array([values[g][chunk].sum() for chunk in queue]) for g, queue in enumerate(state.queues)]
    lengths = [np.array([len(chunk) for chunk in queue], dtype=float) for queue in state.queues]
    totals = [float(value.sum()) or 1.0 for value in values]
    shares = [sums[g] / totals[g] for g in range(len(sums))]
    lost = [float(shares[g][: state.taken[g]].sum()) for g in range(len(sums))]
    removal: list[int] = []
    while excess := _excess(state.kept, limits, measures):
        open_groups = [g for g, queue in enumerate(state.queues) if state.taken[g] < len(queue)]
        chunk = np.zeros(len(state.queues))
        for g in open_groups:
            chunk[g] = lengths[g][state.taken[g]]
        relief = np.zeros(len(state.queues))
        for name, over in excess.items():
            relief += np.minimum(measures[name].marginal(state.kept, chunk) / over, 1.0)
        useful = [g for g in open_groups if relief[g] > 0]
        if not useful:
            raise _impossible(state, limits, measures)
        if order == "score":
            best = min(useful, key=lambda g: (sums[g][state.taken[g]] / chunk[g], g))
        else:
            worth = {g: sums[g][state.taken[g]] for g in useful}
            if order == "share_per_cost":
                next_share = {g: shares[g][state.taken[g]] for g in useful}
                worth = {g: (lost[g] + share) ** 2 - lost[g] ** 2 for g, share in next_share.items()}
            best = min(useful, key=lambda g: (worth[g] / relief[g], -relief[g], g))
        lost[best] += float(shares[best][state.taken[best]])
        state.take(best)
        removal.append(best)
    return removal


def _put_back(
    state: _State,
    removal: Sequence[int],
    limits: Mapping[str, float],
    measures: Mapping[str, CompiledPolynomial],
    floor: Sequence[int],
) -> None:
    """Give back the last chunks that went, as long as everything still fits."""
    for group in reversed(removal):
        if state.taken[group] > floor[group]:
            state.give_back(group)
            if _excess(state.kept, limits, measures):
                state.take(group)


def _impossible(state: _State, limits: Mapping[str, float], measures: Mapping[str, CompiledPolynomial]) -> UserError:
    least = {name: measure.value(state.kept) for name, measure in measures.items()}
    shown = ", ".join(f"{name}<={limit:g}" for name, limit in limits.items())
    reached = ", ".join(f"{name} {value:,.6g}" for name, value in least.items())
    return UserError(
        "budget",
        Shown(shown),
        allowed=f"what is left when everything removable is gone: {reached}",
        hint="Raise the budget, or allow more: a smaller minimum or divisor, fewer frozen or pinned layers.",
    )


# ---------------------------------------------------------------------- when


ScheduleKind = Literal["one_shot", "linear", "cubic", "dead"]


@dataclass(frozen=True, kw_only=True)
class CutSchedule:
    """When cuts are made, and how much of the way to the budget each goes.

    Attributes:
        kind: "one_shot": all at step ``end``. "linear": in equal parts of the excess from ``begin`` to ``end``.
            "cubic": ``1 - (1 - t)^3`` of it (arXiv 1710.01878): most goes early, while there is time to recover.
            "dead": units go when they are dead (their scale or gate at most ``threshold``) and together worth
            ``worth`` of the network's MACs; what the budget still asks for goes at ``end``.
        begin: Step before which nothing is cut; "one_shot" does not look at it.
        end: Step at which the budget holds.
        every: Steps between two cuts.
        threshold: Largest magnitude of a dead unit.
        worth: Smallest part of the MACs for which dead units are cut.
    """

    kind: ScheduleKind = "cubic"
    begin: int = 100
    end: int = 1000
    every: int = 100
    threshold: float = 1e-3
    worth: float = 1e-3

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            raise UserError("schedule", self.kind, allowed=", ".join(get_args(ScheduleKind)))
        late = self.kind != "one_shot" and self.begin > self.end
        if self.begin < 0 or late or self.end < 1:
            raise UserError(
                "schedule", Shown(f"steps {self.begin} to {self.end}"), allowed="0 <= begin <= end, end >= 1"
            )
        if self.every < 1:
            raise UserError("schedule.every", self.every, allowed="an integer from 1")
        if self.threshold < 0 or self.worth < 0:
            raise UserError(
                "schedule", Shown(f"threshold {self.threshold}, worth {self.worth}"), allowed="not negative"
            )

    def due(self, step: int) -> bool:
        """Return whether step ``step`` (from 1) may end with a cut."""
        if step >= self.end:
            return step == self.end
        return self.kind != "one_shot" and step >= max(1, self.begin) and (step - self.begin) % self.every == 0

    def progress(self, step: int) -> float:
        """Return which part of the excess over the budget is gone after ``step``, 0 to 1."""
        if step >= self.end:
            return 1.0
        if self.kind in ("one_shot", "dead") or step < self.begin:
            return 0.0
        # The first cut takes a part too: it stands at the end of its own interval.
        passed = min(1.0, (step - self.begin + self.every) / (self.end - self.begin + self.every))
        return passed if self.kind == "linear" else 1.0 - (1.0 - passed) ** 3

    def limits(self, step: int, start: Mapping[str, float], final: Mapping[str, float]) -> dict[str, float]:
        """Return the limits that hold after ``step``: on the way from the costs at the beginning to the budget."""
        part = self.progress(step)
        return {name: value + (1.0 - part) * max(0.0, start[name] - value) for name, value in final.items()}

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {name: getattr(self, name) for name in ("kind", "begin", "end", "every", "threshold", "worth")}
