"""Problem formulations of hardware-aware NAS: what "best on this device" can mean, and what each meaning returns.

The survey sorts 126 papers by how they ask: accuracy alone, accuracy first and the device second, accuracy under
limits, one weighted number, a whole front, several devices at once. Here every question is a pure function over
columns (a benchmark table's, or those of a search's results); the numbers behind are in
``archsmith.space.formulations``, ``pareto`` and ``hypervolume``, so that ``archsmith.strategies.Scalarised`` and
``Nsga2`` search for the very same optima without a table. Beside them what the survey asks of a cost model: rank
correlation with what was measured, and how often a limit that the model said was kept is broken.

What differs: the survey describes, it has no algorithm and no code; the choice of realisations is from its chapter on
problem formulations. Searching the hardware itself (tiling, buffers) is not here. ``docs/capabilities.md`` goes through
its table of what a library should have.

Source: Benmeziane et al. 2021, arXiv 2101.09336.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from archsmith.core.errors import UserError
from archsmith.evaluate.tables import Table
from archsmith.run.statistics import kendall_tau, spearman_rho
from archsmith.space import Limit, Objective, non_dominated
from archsmith.space.formulations import (
    AcrossDevices,
    Columns,
    Formulation,
    Lagrangian,
    Limited,
    Plain,
    Rejected,
    WeightedProduct,
    WeightedSum,
    column,
    feasible,
    gain,
    relative_excess,
)
from archsmith.space.hypervolume import Hypervolume, hypervolume

SYSTEM = {
    "slug": "hw-nas-survey",
    "title": "A Comprehensive Survey on Hardware-Aware Neural Architecture Search: problem formulations",
    "year": 2021,
    "arxiv": "2101.09336",
    "kind": "protocol",
    "aliases": ["hardware-aware"],
}

# N architectures, M objectives, K limits


class Settings(BaseModel):
    """When an optimum deserves a warning.

    Attributes:
        chance: Value of the objective that guessing reaches (1.0 for percent of 100 classes); None for unknown.
        margin: An optimum within this share above chance counts as guessing.
        far_below: Below this share of every target, a scalarised optimum is one that the price chose, not the target.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    chance: float | None = None
    margin: float = Field(default=0.5, ge=0)
    far_below: float = Field(default=0.5, gt=0, le=1)


DEFAULTS = Settings()


def table_columns(table: Table, names: Sequence[str], *, dataset: str | None = None) -> dict[str, np.ndarray]:
    """Return columns of a table, full fidelity, by their names in the table (``latency_pixel3``, ``test_accuracy``).

    Raises:
        UserError: No such data set, metric or cost.
    """
    return {name: np.asarray(table.values(name, dataset=dataset), dtype=np.float64) for name in names}


# ---------------------------------------------------------------------------------------------------- one best network


@dataclass(frozen=True)
class Optimum:
    """The best row of a formulation.

    Attributes:
        row: Its position; of rows with equal scores the one with the smaller costs, then the first.
        score: The formulation's score, larger is better.
        value: The main objective's own value.
        costs: What else the formulation reads.
        admitted: Rows with a score: not rejected, nothing unknown.
        ties: Rows with exactly this score, this one included.
        notes: Warnings; empty when there is nothing to warn of.
    """

    row: int
    score: float
    value: float
    costs: Mapping[str, float]
    admitted: int
    ties: int
    notes: tuple[str, ...] = ()


def optimum(columns: Columns, formulation: Formulation, settings: Settings = DEFAULTS) -> Optimum | None:
    """Return the exact optimum of a formulation over all rows; None when every row is rejected or unknown.

    Args:
        columns: What the formulation reads, and for the notes the objective.
        formulation: Plain, constrained, scalarised, or across devices.
        settings: What guessing reaches, and when to warn.

    Notes warn where one number misleads: an optimum at chance level, because a cost near zero pays for any accuracy;
    one that breaks a limit, which all but ``Rejected`` may return; and one far below every target, because the exponent
    and not the target chose it.

    Raises:
        UserError: A column is missing.
    """
    scores = formulation.scores(columns)
    known = np.isfinite(scores)
    if not known.any():
        return None
    best = float(scores[known].max())
    tied = np.flatnonzero(known & (scores == best))
    others = [name for name in formulation.names if name != formulation.objectives[0].metric]
    keys = [column(columns, name)[tied] for name in others]
    row = int(tied[np.lexsort((tied, *reversed(keys)))[0]])
    return Optimum(
        row=row,
        score=best,
        value=float(column(columns, formulation.objectives[0].metric)[row]),
        costs={name: float(column(columns, name)[row]) for name in others},
        admitted=int(known.sum()),
        ties=len(tied),
        notes=tuple(_notes(columns, formulation, row, settings)),
    )


def _notes(columns: Columns, formulation: Formulation, row: int, settings: Settings) -> list[str]:
    objective = formulation.objectives[0]
    value = float(column(columns, objective.metric)[row])
    notes = []
    if settings.chance is not None and objective.direction == "maximize":
        guess = settings.chance * (1 + settings.margin)
        if value <= guess:
            notes.append(
                f"the optimum is at chance level: {objective.metric} {value:.4g}, guessing reaches "
                f"{settings.chance:g}; its cost is so small that any accuracy will do. Use a limit or a hard exponent."
            )
    inner = formulation.inner if isinstance(formulation, AcrossDevices) else formulation
    if isinstance(inner, Limited):
        seen = formulation.seen_by_inner(columns) if isinstance(formulation, AcrossDevices) else columns
        for limit in inner.limits:
            if not feasible(seen, [limit])[row]:
                notes.append(f"the optimum breaks a limit: {limit}, it has {float(column(seen, limit.cost)[row]):.6g}.")
    if isinstance(formulation, WeightedProduct):
        ratios = [float(column(columns, term.cost)[row]) / term.target for term in formulation.costs]
        within = np.logical_and.reduce([column(columns, term.cost) <= term.target for term in formulation.costs])
        better = gain(columns, objective)[within]
        if max(ratios) < settings.far_below and len(better) and (given_up := float(np.nanmax(better)) - value) > 0:
            notes.append(
                f"the optimum is at {max(ratios):.3g} of its target or less and gives up {given_up:.4g} of "
                f"{objective.metric}: the exponent chose it, not the target."
            )
    return notes


def plain(columns: Columns, objective: Objective) -> Optimum | None:
    """Return the best row by accuracy alone (form 1)."""
    return optimum(columns, Plain(objective=objective))


def two_stage(columns: Columns, objective: Objective, limits: Sequence[Limit], *, keep: int) -> Optimum | None:
    """Return the best row under the limits among the ``keep`` most accurate (form 2).

    The first stage knows no device. Its survivors may all be too slow: then there is nothing to return, while
    ``Rejected`` over all rows may have found something.

    Args:
        columns: With the objective and the limited costs.
        objective: What the first stage improves.
        limits: What the second stage asks of the survivors.
        keep: How many survive the first stage.

    Returns:
        The optimum, with ``row`` counted over all rows; None when no survivor keeps the limits.

    Raises:
        UserError: ``keep`` is not positive, no limit, a column is missing.
    """
    if keep < 1:
        raise UserError("keep", keep, allowed="an integer from 1")
    gains = gain(columns, objective)
    survivors = np.sort(np.argsort(-gains, kind="stable")[: min(keep, int(np.isfinite(gains).sum()))])
    second = Rejected(objective=objective, limits=tuple(limits))
    found = optimum({name: column(columns, name)[survivors] for name in second.names}, second)
    return None if found is None else Optimum(**{**found.__dict__, "row": int(survivors[found.row])})


@dataclass(frozen=True)
class DualAscent:
    """What a Lagrangian with moving multipliers found.

    Attributes:
        best: The best feasible row among those it visited; None when it visited none.
        visited: Row of each step.
        multipliers: Multipliers of the step that visited it.
        bound: The smallest Lagrangian maximum seen: no feasible row is better than that (weak duality).
    """

    best: Optimum | None
    visited: tuple[int, ...]
    multipliers: tuple[tuple[float, ...], ...]
    bound: float


def lagrangian(columns: Columns, formulation: Lagrangian, *, steps: int = 100) -> DualAscent:
    """Maximise the Lagrangian over all rows, move the multipliers by the winner's excesses, and repeat (form 3).

    The step of the n-th update is ``rate / sqrt(n)``, so that the multipliers settle.

    Args:
        columns: With the objective and the limited costs.
        formulation: Objective, limits, first multipliers and rate.
        steps: How many maxima are taken.

    Raises:
        UserError: No step, or no row with a score.
    """
    excess_NK = relative_excess(columns, formulation.limits)
    current, visited, multipliers, bound = formulation, list[int](), list[tuple[float, ...]](), math.inf
    for step in range(steps):
        found = optimum(columns, current)
        if found is None:
            raise UserError("columns", "no row with a score", allowed="a row whose objective and costs are known")
        visited.append(found.row)
        multipliers.append(current.multipliers)
        bound = min(bound, found.score)
        moved = Lagrangian(**{**current.__dict__, "rate": formulation.rate / math.sqrt(step + 1)})
        current = moved.updated(excess_NK[found.row])
    if not visited:
        raise UserError("steps", steps, allowed="an integer from 1")
    rows = np.unique(visited)
    only = Rejected(objective=formulation.objective, limits=formulation.limits)
    best = optimum({name: column(columns, name)[rows] for name in only.names}, only)
    if best is not None:
        best = Optimum(**{**best.__dict__, "row": int(rows[best.row])})
    return DualAscent(best, tuple(visited), tuple(multipliers), bound)


# -------------------------------------------------------------------------------------------------------- whole fronts


@dataclass(frozen=True)
class Front:
    """The rows that no other dominates, and how much they dominate.

    Attributes:
        rows: Ascending in the last objective's value, then by row; rows with equal values are all there.
        hypervolume: Up to the objectives' references, in losses.
    """

    rows: tuple[int, ...]
    hypervolume: Hypervolume


def front(columns: Columns, objectives: Sequence[Objective], *, rng: np.random.Generator | None = None) -> Front:
    """Return the exact Pareto front of all rows and its hypervolume (form 5).

    Args:
        columns: With every objective.
        objectives: Each with a ``reference``: a hypervolume without one is no number.
        rng: Samples the hypervolume above three objectives.

    Raises:
        UserError: No objective, one without a reference, a column is missing.
    """
    references = []
    for objective in objectives:
        if objective.reference is None:
            raise UserError(f"objective {objective.metric!r}.reference", None, allowed="the worst value that counts")
        references.append(-objective.reference if objective.direction == "maximize" else objective.reference)
    if not references:
        raise UserError("objectives", [], allowed="at least one Objective")
    losses_NM = np.stack([-gain(columns, objective) for objective in objectives], axis=1)
    rows = np.flatnonzero(non_dominated(losses_NM))
    order = np.lexsort((rows, column(columns, objectives[-1].metric)[rows]))
    return Front(tuple(int(row) for row in rows[order]), hypervolume(losses_NM, references, rng=rng))


def epsilon_sweep(
    columns: Columns, objective: Objective, cost: str, limits: Sequence[float]
) -> list[tuple[float, Optimum | None]]:
    """Return the best row under each of several limits on one cost (the epsilon-constraint method).

    With every cost of the table as a limit, the optima are the whole front, convex or not.

    Args:
        columns: With the objective and the cost.
        objective: What to improve.
        cost: What is limited, smaller is better.
        limits: The limits; positive.
    """
    return [
        (each, optimum(columns, Rejected(objective=objective, limits=(Limit(cost, "<=", each, "", relative=False),))))
        for each in limits
    ]


def weighted_sum_sweep(
    columns: Columns, objective: Objective, sums: Sequence[WeightedSum]
) -> list[tuple[WeightedSum, Optimum | None]]:
    """Return the optimum of each of several weighted sums: the convex part of a front, never the rest.

    Raises:
        UserError: A sum of another objective.
    """
    for each in sums:
        if each.objective != objective:
            raise UserError("sums", each.objective.metric, allowed=f"sums of {objective.metric!r}")
    return [(each, optimum(columns, each)) for each in sums]


# ------------------------------------------------------------------------------------ devices, limits and cost models


def device_correlations(columns: Columns, costs: Sequence[str]) -> dict[tuple[str, str], float]:
    """Return Spearman's rank correlation of each pair of costs: what a search for one device says about another."""
    return {
        (first, second): spearman_rho(column(columns, first).tolist(), column(columns, second).tolist())
        for i, first in enumerate(costs)
        for second in costs[i + 1 :]
    }


@dataclass(frozen=True)
class LimitReport:
    """How some rows keep one limit.

    Attributes:
        limit: The limit.
        n: Rows with a known cost.
        broken: How many break it.
        rate: Their share; NaN without any row.
        mean_excess: Mean excess of those, as a share of the limit; 0 when none.
        worst_excess: Largest excess; 0 when none.
    """

    limit: Limit
    n: int
    broken: int
    rate: float
    mean_excess: float
    worst_excess: float


def violation_report(columns: Columns, limits: Sequence[Limit]) -> list[LimitReport]:
    """Return one report for each limit; unknown costs are left out and show in ``n``.

    Raises:
        UserError: A relative limit, or a cost that is no column.
    """
    reports = []
    for limit, excess in zip(limits, relative_excess(columns, limits).T, strict=True):
        known = ~np.isnan(excess)
        over = known & ~feasible(columns, [limit])
        n, broken = int(known.sum()), int(over.sum())
        mean, worst = (float(excess[over].mean()), float(excess[over].max())) if broken else (0.0, 0.0)
        reports.append(LimitReport(limit, n, broken, broken / n if n else math.nan, mean, worst))
    return reports


@dataclass(frozen=True)
class CostModelReport:
    """How well a cost model ranks, hits, and keeps a limit, against what was measured.

    Attributes:
        n: Architectures.
        spearman: Rank correlation; NaN where either is constant.
        kendall: Kendall's tau-b; NaN likewise.
        mape: Mean absolute error as a share of the measured value.
        bias: Mean of predicted minus measured, as a share of the measured value: below 0 the model is an optimist.
        limit: The limit, in the cost's unit; None for none.
        admitted: Architectures that the model says keep it.
        violations: Those of them that, measured, do not.
        violation_rate: Their share of the admitted; NaN when none is admitted.
        worst_excess: Largest measured excess among the admitted, as a share of the limit.
        missed: Architectures that keep the limit, measured, but that the model refuses.
    """

    n: int
    spearman: float
    kendall: float
    mape: float
    bias: float
    limit: float | None
    admitted: int
    violations: int
    violation_rate: float
    worst_excess: float
    missed: int


def cost_model_report(
    predicted: Sequence[float] | np.ndarray, measured: Sequence[float] | np.ndarray, *, limit: float | None = None
) -> CostModelReport:
    """Return how a cost model (analytical, table, learned) compares with measurements it has not seen.

    Args:
        predicted: In the unit of ``measured``; for a stand-in in another unit (MACs for latency) only the rank
            correlations mean anything.
        measured: Positive, finite.
        limit: Upper limit on the cost, in its unit.

    Raises:
        UserError: Different lengths, fewer than two values, measured values that are not positive, NaN, a limit that is
            not positive.
    """
    guess, truth = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    if guess.shape != truth.shape or guess.ndim != 1 or len(guess) < 2:
        raise UserError("predicted", guess.shape, allowed=f"one value for each of at least 2 measured ({truth.shape})")
    if not np.isfinite(guess).all() or not np.isfinite(truth).all() or (truth <= 0).any():
        raise UserError("measured", float(truth.min()), allowed="finite predictions and positive, finite measurements")
    if limit is not None and not (math.isfinite(limit) and limit > 0):
        raise UserError("limit", limit, allowed="a positive finite number, or None")
    errors = (guess - truth) / truth
    admitted = guess <= limit if limit is not None else np.zeros(len(guess), dtype=bool)
    broken = admitted & (truth > limit) if limit is not None else admitted
    return CostModelReport(
        n=len(guess),
        spearman=spearman_rho(guess.tolist(), truth.tolist()),
        kendall=kendall_tau(guess.tolist(), truth.tolist()),
        mape=float(np.abs(errors).mean()),
        bias=float(errors.mean()),
        limit=limit,
        admitted=int(admitted.sum()),
        violations=int(broken.sum()),
        violation_rate=float(broken.sum() / admitted.sum()) if admitted.any() else math.nan,
        worst_excess=float((truth[broken] / limit - 1).max()) if limit is not None and broken.any() else 0.0,
        missed=int((~admitted & (truth <= limit)).sum()) if limit is not None else 0,
    )
