"""Several objectives and limits as one number, larger is better: what a single-objective search can improve.

A formulation reads columns (name → one value per architecture, shape (N,)) or a single ``Result``, and needs no torch.
``-inf`` says rejected, NaN says unknown. ``archsmith.strategies.Scalarised`` searches with any of them; on a whole
table their maximum is exact.

=================== =====================================================================
Constrained         ``Rejected``, ``Penalised``, ``Lagrangian``, ``FeasibleFirst``
Scalarised          ``WeightedSum``, ``WeightedProduct``, ``ExponentialSum``, ``Chebyshev``
Several devices     ``AcrossDevices`` around any of the others; or one limit for each device
=================== =====================================================================

Source of the list: Benmeziane et al. 2021, arXiv 2101.09336, problem formulations.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space.budget import Limit
from archsmith.space.trial import Objective, Result

# N architectures, K costs or limits

Columns = Mapping[str, np.ndarray]
"""Metric or cost → its value for each architecture, shape (N,)."""


def at_most(cost: str, limit: float) -> Limit:
    """Return the limit ``cost <= limit`` on any cost or metric of a result, in its own unit (``latency_pixel3``, say).

    Raises:
        UserError: A limit that is not positive and finite.
    """
    _positive("limit", limit)
    return Limit(cost, "<=", limit, "", relative=False)


def columns_of(results: Sequence[Result], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the columns of some results; NaN where one is not ok, or has neither metric nor cost of that name."""
    return {name: np.array([Objective(name).value(result) for result in results], dtype=np.float64) for name in names}


def column(columns: Columns, name: str) -> np.ndarray:
    """Return a column as float64.

    Raises:
        UserError: There is none of this name.
    """
    if name not in columns:
        raise UserError("columns", sorted(columns), allowed=f"columns with {name!r}, which the formulation reads")
    return np.asarray(columns[name], dtype=np.float64)


def gain(columns: Columns, objective: Objective) -> np.ndarray:
    """Return an objective's column, negated where smaller is better: larger is better, always."""
    values = column(columns, objective.metric)
    return values if objective.direction == "maximize" else -values


def relative_excess(columns: Columns, limits: Sequence[Limit]) -> np.ndarray:
    """Return by how much each limit is broken, as a share of the limit, shape (N, K).

    Positive where it is broken, negative where there is room, NaN where the cost is unknown.

    Raises:
        UserError: A limit that is still relative, or whose cost is no column.
    """
    for limit in limits:
        if limit.relative:
            raise UserError("limits", str(limit), allowed="absolute limits", hint="Call Budget.resolve first.")
    signs = [1.0 if limit.relation == "<=" else -1.0 for limit in limits]
    parts = [
        sign * (column(columns, limit.cost) - limit.value) / limit.value
        for sign, limit in zip(signs, limits, strict=True)
    ]
    rows = len(next(iter(columns.values()))) if columns else 0
    return np.stack(parts, axis=1) if parts else np.zeros((rows, 0))


def feasible(columns: Columns, limits: Sequence[Limit]) -> np.ndarray:
    """Return one bool per architecture: whether it keeps every limit; an unknown cost keeps none."""
    kept = [
        column(columns, limit.cost) <= limit.value
        if limit.relation == "<="
        else column(columns, limit.cost) >= limit.value
        for limit in limits
    ]
    rows = len(next(iter(columns.values()))) if columns else 0
    return np.logical_and.reduce(kept) if kept else np.ones(rows, dtype=bool)


class Formulation(ABC):
    """One number for each architecture, larger is better. Final classes are frozen dataclasses."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Metrics and costs that are read."""

    @property
    @abstractmethod
    def objectives(self) -> tuple[Objective, ...]:
        """What is weighed against each other, the main objective first; limits are not objectives."""

    @abstractmethod
    def scores(self, columns: Columns) -> np.ndarray:
        """Return the scores, float64 of shape (N,): ``-inf`` where rejected, NaN where something is unknown.

        Raises:
            UserError: A column is missing.
        """

    def score(self, result: Result) -> float:
        """Return the score of one result; NaN when it is not ok, or lacks what is read."""
        return float(self.scores(columns_of([result], self.names))[0])

    def after(self, result: Result) -> Formulation:
        """Return what to go on with once a result is known; the same, unless the formulation adapts."""
        return self

    @property
    def state(self) -> tuple[float, ...]:
        """What ``after`` changed; with the constructor's arguments it restores the formulation."""
        return ()

    def with_state(self, state: Sequence[float]) -> Formulation:
        """Return the formulation with what ``state`` gave."""
        return self


@dataclass(frozen=True, kw_only=True)
class Limited(Formulation):
    """An objective under limits; the base of the four ways to tell them.

    Args:
        objective: What to improve.
        limits: What the costs must keep, absolute; ``at_most`` makes them, ``Budget.limits`` are some.
    """

    objective: Objective
    limits: tuple[Limit, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "limits", tuple(self.limits))
        if not self.limits:
            raise UserError("limits", [], allowed="at least one Limit")

    @property
    def names(self) -> tuple[str, ...]:
        """The objective's metric and the costs with a limit."""
        return tuple(dict.fromkeys((self.objective.metric, *(limit.cost for limit in self.limits))))

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objective."""
        return (self.objective,)


@dataclass(frozen=True, kw_only=True)
class Plain(Formulation):
    """The objective alone: ordinary architecture search.

    Args:
        objective: What to improve.
    """

    objective: Objective

    @property
    def names(self) -> tuple[str, ...]:
        """The objective's metric."""
        return (self.objective.metric,)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objective."""
        return (self.objective,)

    def scores(self, columns: Columns) -> np.ndarray:
        """Return the objective's gain."""
        return gain(columns, self.objective)


@dataclass(frozen=True, kw_only=True)
class Rejected(Limited):
    """``f`` where every limit is kept, ``-inf`` elsewhere; an unknown cost is rejected too."""

    def scores(self, columns: Columns) -> np.ndarray:
        """Return the gain, ``-inf`` outside the limits."""
        return np.where(feasible(columns, self.limits), gain(columns, self.objective), -np.inf)


@dataclass(frozen=True, kw_only=True)
class Penalised(Limited):
    """``f - weight * sum of max(0, excess_k) ** power``, excesses relative to their limits.

    Args:
        weight: What an excess of 100 % costs, in units of the objective; positive. Not to be tuned on test accuracy.
        power: 1 for a kink at the limit (exact from some weight on), 2 for a smooth start (small excesses nearly free).
    """

    weight: float
    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("weight", self.weight)
        _positive("power", self.power)

    def scores(self, columns: Columns) -> np.ndarray:
        """Return the gain minus the penalty."""
        broken_NK = np.maximum(relative_excess(columns, self.limits), 0.0)
        return np.asarray(gain(columns, self.objective) - self.weight * (broken_NK**self.power).sum(axis=1))


@dataclass(frozen=True, kw_only=True)
class Lagrangian(Limited):
    """``f - sum of multiplier_k * excess_k`` with signed excesses: room below a limit is worth something.

    ``after`` moves each multiplier by ``rate`` times the excess of what was evaluated, never below zero (projected
    dual ascent). Multipliers rise while a limit is broken and fall back when there is room. The maximum for fixed
    multipliers is a corner of the convex hull of the front: where the front is not convex, the best feasible
    architecture may have no multipliers that find it.

    Args:
        multipliers: One for each limit, in units of the objective, not negative; zeros when empty.
        rate: Step of the update, positive.
    """

    multipliers: tuple[float, ...] = ()
    rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        given = tuple(float(each) for each in self.multipliers) or (0.0,) * len(self.limits)
        if len(given) != len(self.limits) or not all(math.isfinite(each) and each >= 0 for each in given):
            raise UserError("multipliers", list(given), allowed=f"{len(self.limits)} finite numbers from 0")
        object.__setattr__(self, "multipliers", given)
        _positive("rate", self.rate)

    def scores(self, columns: Columns) -> np.ndarray:
        """Return the Lagrangian for the present multipliers."""
        return np.asarray(
            gain(columns, self.objective) - relative_excess(columns, self.limits) @ np.array(self.multipliers)
        )

    def updated(self, excess_K: np.ndarray) -> Lagrangian:
        """Return the Lagrangian after one step; an unknown or infinite excess moves nothing."""
        moves = np.where(np.isfinite(excess_K), excess_K, 0.0)
        moved = np.maximum(np.array(self.multipliers) + self.rate * moves, 0.0)
        return replace(self, multipliers=tuple(float(each) for each in moved))

    def after(self, result: Result) -> Lagrangian:
        """Return the Lagrangian after one step on the costs of a result."""
        costs = columns_of([result], [limit.cost for limit in self.limits])
        return self.updated(relative_excess(costs, self.limits)[0])

    @property
    def state(self) -> tuple[float, ...]:
        """The multipliers."""
        return self.multipliers

    def with_state(self, state: Sequence[float]) -> Lagrangian:
        """Return the Lagrangian with these multipliers."""
        return replace(self, multipliers=tuple(state))


@dataclass(frozen=True, kw_only=True)
class FeasibleFirst(Limited):
    """Feasible before infeasible, among the infeasible by the sum of their excesses (Deb 2000).

    The order is the tournament's of doi 10.1016/S0045-7825(99)00389-8, as a number: ``f`` where the limits are kept,
    else the objective's ``reference`` minus the excess. The objective of an infeasible architecture need not be known.

    Args:
        objective: With a ``reference``: the worst value that counts. Feasible values beyond it count as the reference.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective.reference is None:
            raise UserError(
                "objective.reference", None, allowed="the worst value that counts: infeasible ones are ranked below it"
            )

    def scores(self, columns: Columns) -> np.ndarray:
        """Return the gain where feasible, less than the reference elsewhere."""
        assert self.objective.reference is not None
        worst = self.objective.reference if self.objective.direction == "maximize" else -self.objective.reference
        excess_N = np.maximum(relative_excess(columns, self.limits), 0.0).sum(axis=1)
        inside = np.maximum(gain(columns, self.objective), worst)
        return np.where(feasible(columns, self.limits), inside, worst - excess_N)


@dataclass(frozen=True, kw_only=True)
class CostTerm:
    """A cost in a weighted sum or product.

    Args:
        cost: Name of the cost; smaller is better.
        weight: In a sum the price of one unit of the cost, positive; in a product the exponent, negative.
        target: T_k, positive; read by products only.
    """

    cost: str
    weight: float
    target: float = 1.0

    def __post_init__(self) -> None:
        _positive("target", self.target)
        if not math.isfinite(self.weight):
            raise UserError("weight", self.weight, allowed="a finite number")


@dataclass(frozen=True, kw_only=True)
class _Priced(Formulation):
    """An objective and costs with a price."""

    objective: Objective
    costs: tuple[CostTerm, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "costs", tuple(self.costs))
        if not self.costs:
            raise UserError("costs", [], allowed="at least one CostTerm")

    @property
    def names(self) -> tuple[str, ...]:
        """The objective's metric and the costs."""
        return tuple(dict.fromkeys((self.objective.metric, *(term.cost for term in self.costs))))

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The objective, and each cost to be minimised."""
        return (self.objective, *(Objective(term.cost, "minimize") for term in self.costs))


@dataclass(frozen=True, kw_only=True)
class WeightedSum(_Priced):
    """``f - sum of weight_k * h_k``.

    Args:
        objective: What to improve.
        costs: Terms with positive weights, in units of the objective for one unit of the cost.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for term in self.costs:
            if term.weight <= 0:
                raise UserError(f"weight of {term.cost!r}", term.weight, allowed="positive: the sum subtracts costs")

    def scores(self, columns: Columns) -> np.ndarray:
        """Return the weighted sums."""
        total = gain(columns, self.objective)
        for term in self.costs:
            total = total - term.weight * column(columns, term.cost)
        return total


@dataclass(frozen=True, kw_only=True)
class WeightedProduct(_Priced):
    """``f * product of (h_k / T_k) ** w_k``, each cost with its own exponent.

    Soft exponents act on both sides of the target, hard ones only above it. Soft products have a trap: a cost near zero
    is worth any accuracy, so look at what ``archsmith.methods.hw_nas_survey.optimum`` notes.

    Args:
        objective: What to improve; its values must not be negative, and larger must be better.
        costs: Terms with targets and negative exponents (-0.07, say).
        hard: Whether a cost below its target is worth nothing.

    Source: Tan et al. 2019 (MnasNet), arXiv 1807.11626, Eq. 2 and 3.
    """

    hard: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective.direction != "maximize":
            raise UserError("objective.direction", self.objective.direction, allowed="'maximize' in a product")
        for term in self.costs:
            if term.weight >= 0:
                raise UserError(
                    f"exponent of {term.cost!r}", term.weight, allowed="negative: larger costs are to be worse"
                )

    def scores(self, columns: Columns) -> np.ndarray:
        """Return the weighted products."""
        product = gain(columns, self.objective)
        if (product < 0).any():
            raise UserError("objective", float(np.nanmin(product)), allowed="values from 0 in a product")
        for term in self.costs:
            ratio = column(columns, term.cost) / term.target
            if (ratio < 0).any() or (not self.hard and (ratio == 0).any()):
                raise UserError(f"cost {term.cost!r}", float(np.nanmin(ratio)), allowed="positive costs in a product")
            product = product * (np.maximum(ratio, 1.0) if self.hard else ratio) ** term.weight
        return product


@dataclass(frozen=True, kw_only=True)
class Goal:
    """An objective on its own scale: 0 at the ideal, 1 at the worst value.

    Args:
        objective: With a ``reference``: the worst value that counts, 1 on the scale.
        ideal: The best value there is, or could be; 0 on the scale. Better ones count as the ideal.
        weight: Positive.
    """

    objective: Objective
    ideal: float
    weight: float = 1.0

    def __post_init__(self) -> None:
        _positive("weight", self.weight)
        reference = self.objective.reference
        if reference is None or not math.isfinite(self.ideal) or not self.objective.is_better(self.ideal, reference):
            raise UserError(
                f"ideal of {self.objective.metric!r}",
                self.ideal,
                allowed=f"a finite number better than the objective's reference ({reference})",
            )

    def distance(self, columns: Columns) -> np.ndarray:
        """Return the distance from the ideal on the goal's scale, shape (N,), not negative."""
        assert self.objective.reference is not None
        values = column(columns, self.objective.metric)
        return np.asarray(np.maximum((values - self.ideal) / (self.objective.reference - self.ideal), 0.0))


@dataclass(frozen=True, kw_only=True)
class _Goals(Formulation):
    """Several objectives, each on its own scale.

    Args:
        goals: At least one.
    """

    goals: tuple[Goal, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "goals", tuple(self.goals))
        if not self.goals:
            raise UserError("goals", [], allowed="at least one Goal")

    @property
    def names(self) -> tuple[str, ...]:
        """The objectives' metrics."""
        return tuple(goal.objective.metric for goal in self.goals)

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The goals' objectives."""
        return tuple(goal.objective for goal in self.goals)

    def _weighted(self, columns: Columns, power: float) -> np.ndarray:
        """Return weight * distance ** power, shape (N, K)."""
        return np.stack([goal.weight * goal.distance(columns) ** power for goal in self.goals], axis=1)


@dataclass(frozen=True, kw_only=True)
class ExponentialSum(_Goals):
    """Minus the ``sum of weight_k * distance_k ** power``: 1 is a weighted sum, large powers look at the worst goal.

    Args:
        power: From 1.

    Source: weighted exponential sum, Marler and Arora 2004, doi 10.1007/s00158-003-0368-6, Sec. 3.1.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.power) or self.power < 1:
            raise UserError("power", self.power, allowed="a finite number from 1")

    def scores(self, columns: Columns) -> np.ndarray:
        """Return the negated sums."""
        return np.asarray(-self._weighted(columns, self.power).sum(axis=1))


@dataclass(frozen=True, kw_only=True)
class Chebyshev(_Goals):
    """Minus the ``max of weight_k * distance_k``, plus a little of their sum.

    For some weights it finds any point of a front, also where the front is not convex, which no weighted sum does.

    Args:
        augmentation: Share of the sum, not negative: with a small one, the optimum is never a dominated tie.
    """

    augmentation: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.augmentation) or self.augmentation < 0:
            raise UserError("augmentation", self.augmentation, allowed="a finite number from 0")

    def scores(self, columns: Columns) -> np.ndarray:
        """Return the negated largest distances."""
        weighted_NK = self._weighted(columns, 1.0)
        return np.asarray(-(weighted_NK.max(axis=1) + self.augmentation * weighted_NK.sum(axis=1)))


DEVICE_COST = "device_cost"
"""Column that ``AcrossDevices`` adds: the cost relative to the targets, over all devices."""


def across_devices(columns: Columns, targets: Mapping[str, float], how: Literal["worst", "mean"]) -> np.ndarray:
    """Return one relative cost for several devices, shape (N,): 1 is on target; NaN where a device is unknown.

    Args:
        columns: With one cost for each device.
        targets: Cost of a device (``latency_pixel3``) → its target.
        how: The worst device, or the mean of all. "worst at most 1" says the same as one limit for each device; the
            mean lets one device pay for another.

    Raises:
        UserError: No device, a target that is not positive, or another ``how``.
    """
    if not targets or how not in ("worst", "mean"):
        raise UserError("devices", (dict(targets), how), allowed="at least one target, and 'worst' or 'mean'")
    for target in targets.values():
        _positive("target", target)
    ratios_KN = np.stack([column(columns, cost) / target for cost, target in targets.items()])
    return np.asarray(ratios_KN.max(axis=0) if how == "worst" else ratios_KN.mean(axis=0))


@dataclass(frozen=True, kw_only=True)
class AcrossDevices(Formulation):
    """Any formulation of the cost ``device_cost``, which stands for several devices at once.

    Args:
        inner: Reads ``DEVICE_COST``; its limits and targets are then relative, 1 for on target.
        targets: See ``across_devices``.
        how: See ``across_devices``.
    """

    inner: Formulation
    targets: Mapping[str, float]
    how: Literal["worst", "mean"] = "worst"

    def __post_init__(self) -> None:
        if DEVICE_COST not in self.inner.names:
            raise UserError("inner", list(self.inner.names), allowed=f"a formulation that reads {DEVICE_COST!r}")
        across_devices({cost: np.zeros(0) for cost in self.targets}, self.targets, self.how)

    @property
    def names(self) -> tuple[str, ...]:
        """What the inner formulation reads, with the devices' costs in place of ``device_cost``."""
        return tuple(dict.fromkeys((*(name for name in self.inner.names if name != DEVICE_COST), *self.targets)))

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """The inner objectives; where the combined cost is one, each device's cost in its place."""
        inner = self.inner.objectives
        devices = tuple(Objective(cost, "minimize") for cost in self.targets)
        kept = tuple(each for each in inner if each.metric != DEVICE_COST)
        return kept if len(kept) == len(inner) else (*kept, *devices)

    def scores(self, columns: Columns) -> np.ndarray:
        """Return the inner scores."""
        return self.inner.scores(self.seen_by_inner(columns))

    def seen_by_inner(self, columns: Columns) -> dict[str, np.ndarray]:
        """Return the columns with the combined cost beside them."""
        return {**columns, DEVICE_COST: across_devices(columns, self.targets, self.how)}

    def after(self, result: Result) -> AcrossDevices:
        """Let the inner formulation adapt to the combined cost."""
        if result.status != "ok":
            return self
        combined = float(across_devices(columns_of([result], tuple(self.targets)), self.targets, self.how)[0])
        seen = replace(result, costs={**result.costs, DEVICE_COST: combined})
        return replace(self, inner=self.inner.after(seen))

    @property
    def state(self) -> tuple[float, ...]:
        """The inner state."""
        return self.inner.state

    def with_state(self, state: Sequence[float]) -> AcrossDevices:
        """Return the formulation with the inner state."""
        return replace(self, inner=self.inner.with_state(state))


def _positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise UserError(name, value, allowed="a positive finite number")
