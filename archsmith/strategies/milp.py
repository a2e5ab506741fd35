"""Choose one alternative in every group under limits on sums: the grouped knapsack as an exact integer programme.

With ``x_ij = 1`` where group ``i`` takes alternative ``j``:

    minimise  sum score_ij x_ij   subject to   sum_j x_ij = 1 for every i,
    low_k <= sum cost^k_ij x_ij <= high_k for every limit k,
    sum y_ij x_ij <= alpha * groups for every earlier selection y (diversity).

The solver (HiGHS, through ``scipy.optimize.milp``) works with tolerances; what is returned does not: a selection is
added up again in exact order, and one that breaks a limit by a rounding of the solver is forbidden by a cut, which
loses no other selection. A limit that cannot be kept is an error that says which one, and what can be reached.

Source: the mixed integer programme of Puzzle, arXiv 2411.19146, Sec. 4; greedy, largest and random selections are the
baselines of its ablations. Cutting off single selections: Balas and Jeroslow, "Canonical cuts on the unit hypercube",
1972.
"""

# G groups, A alternatives of a group

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from archsmith.core.clean_stdout import without_lines
from archsmith.core.errors import ArchsmithError, Shown, UserError

Table = Sequence[Sequence[float]]
"""One number for each alternative of each group; groups may differ in length."""

Range = tuple[float | None, float | None]
"""Smallest and largest allowed sum; None for no bound."""

TOLERANCE = 1e-9
"""By how much a sum may break its limit, relative to the limit: the rounding of a sum of floats."""

DIVERSITY = "difference from earlier selections"

_MAXIMUM_CUTS = 200

_STRAY = (b"HighsMipSolverData::",)
"""How lines begin that HiGHS prints on some instances although its output is off."""


@dataclass(frozen=True)
class Selection:
    """One alternative for every group.

    Attributes:
        choice: Index of the alternative of each group.
        score: Sum of the scores.
        totals: Sum of every cost that was given, limited or not.
        optimal: Whether no selection within the limits has a better score.
        bound: The best score that the solver has not excluded; equals ``score`` (within rounding) when optimal.
        info: Values of the caller (the batch of a sweep, say).
    """

    choice: tuple[int, ...]
    score: float
    totals: Mapping[str, float]
    optimal: bool = True
    bound: float = math.nan
    info: Mapping[str, Any] = field(default_factory=dict)


class Infeasible(UserError):
    """No selection keeps the limits; ``reachable`` has the smallest (or largest) sums for the limits to blame.

    Attributes:
        reachable: By limit, the nearest sum that can be reached while the other limits hold; None where nothing can.
    """

    def __init__(self, given: object, *, allowed: str, hint: str, reachable: Mapping[str, float | None]) -> None:
        super().__init__("limits", given, allowed=allowed, hint=hint)
        self.reachable = dict(reachable)

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross a process boundary whole."""
        return _rebuild, (self.given, self.allowed, self.hint, self.reachable)


def _rebuild(given: object, allowed: str, hint: str, reachable: Mapping[str, float | None]) -> Infeasible:
    return Infeasible(given, allowed=allowed, hint=hint, reachable=reachable)


def solve(
    scores: Table,
    costs: Mapping[str, Table] | None = None,
    limits: Mapping[str, float | Range] | None = None,
    *,
    maximize: bool = False,
    different_from: Sequence[Sequence[int]] = (),
    alpha: float = 1.0,
    seconds: float | None = None,
    gap: float = 0.0,
) -> Selection:
    """Return the selection with the best sum of scores among those within every limit.

    Args:
        scores: Score of each alternative of each group.
        costs: Cost tables by name, of the shape of ``scores``.
        limits: By name of a cost, the largest sum, or ``(smallest, largest)`` with None for no bound.
        maximize: Whether larger scores are better (accuracies) rather than smaller ones (divergences).
        different_from: Earlier selections; at most ``alpha * groups`` of the choices of each may come again.
        alpha: Share of equal choices that is allowed, in [0, 1]; 1 still admits the same selection again.
        seconds: Time after which the best selection found so far is returned with ``optimal=False``; None for no limit.
        gap: Relative distance from the best score at which the solver may stop; above 0 the selection is not claimed to
            be optimal.

    Raises:
        Infeasible: Nothing keeps the limits; names the limits that bind, and the nearest sums that can be reached.
        UserError: Tables of different shapes, an empty group, numbers that are not finite, a limit without its cost.
        ArchsmithError: The time was over before any selection was found.

    Example:
        >>> solve([[0.0, 1.0], [0.0, 3.0]], {"bytes": [[4, 1], [4, 1]]}, {"bytes": 5}).choice
        (1, 0)
    """
    problem = _Problem(scores, costs or {}, limits or {}, maximize, different_from, alpha)
    return problem.best(seconds, gap)


def sweep(
    problems: Mapping[Any, Callable[[], Selection]], *, maximize: bool = False
) -> tuple[Any, dict[Any, Selection], dict[Any, Infeasible]]:
    """Solve one problem for each setting (a batch size, say) and return the setting with the best score.

    Args:
        problems: By setting, a call that solves it.
        maximize: As in ``solve``.

    Returns:
        The best setting (the first of equals), the selections, and the errors of settings that nothing fits.

    Raises:
        Infeasible: Nothing fits in any setting; the error of the last one.
        UserError: No setting.
    """
    if not problems:
        raise UserError("settings", {}, allowed="at least one batch size to solve for")
    found: dict[Any, Selection] = {}
    failed: dict[Any, Infeasible] = {}
    for setting, problem in problems.items():
        try:
            found[setting] = problem()
        except Infeasible as error:
            failed[setting] = error
    if not found:
        raise failed[next(reversed(failed))]
    sign = -1 if maximize else 1
    return min(found, key=lambda setting: sign * found[setting].score), found, failed


class _Problem:
    """The tables of one problem, checked, and its rows as the solver takes them."""

    def __init__(
        self,
        scores: Table,
        costs: Mapping[str, Table],
        limits: Mapping[str, float | Range],
        maximize: bool,
        different_from: Sequence[Sequence[int]],
        alpha: float,
    ) -> None:
        self.sizes = [len(row) for row in scores]
        if not self.sizes or not all(self.sizes):
            raise UserError("scores", self.sizes, allowed="at least one group, and at least one alternative in each")
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.scores = self._flat(scores, "scores")
        self.costs = {name: self._flat(table, f"costs[{name!r}]") for name, table in costs.items()}
        self.limits = checked_limits(limits, self.costs)
        self.maximize = maximize
        if not 0 <= alpha <= 1:
            raise UserError("alpha", alpha, allowed="a number from 0 to 1")
        self.earlier = [self._checked(choice) for choice in different_from]
        self.shared = math.floor(alpha * len(self.sizes) + TOLERANCE)

    def _flat(self, table: Table, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        if [len(row) for row in table] != self.sizes:
            raise UserError(
                name, [len(row) for row in table], allowed=f"one number for each alternative, rows of {self.sizes}"
            )
        flat = np.array([value for row in table for value in row], dtype=np.float64)
        if not np.isfinite(flat).all():
            group = int(np.searchsorted(self.starts, int(np.flatnonzero(~np.isfinite(flat))[0]), side="right")) - 1
            raise UserError(name, list(table[group]), allowed=f"finite numbers (group {group})")
        return flat

    def _checked(self, choice: Sequence[int]) -> tuple[int, ...]:
        inside = len(choice) == len(self.sizes) and all(
            0 <= j < size for j, size in zip(choice, self.sizes, strict=False)
        )
        if not inside:
            raise UserError("different_from", list(choice), allowed="an index of an alternative for each group")
        return tuple(int(j) for j in choice)

    # ------------------------------------------------------------------ solving

    def best(self, seconds: float | None, gap: float = 0.0) -> Selection:
        """Return the best selection; see ``solve``."""
        found = self._minimum(-self.scores if self.maximize else self.scores, list(self.limits), True, seconds, gap)
        if found is None:
            raise self._explained()
        choice, bound, optimal = found
        return self.selection(choice, bound=-bound if self.maximize else bound, optimal=optimal and gap == 0)

    def selection(self, choice: Sequence[int], *, bound: float = math.nan, optimal: bool = True) -> Selection:
        """Return a choice with its sums."""
        totals = {name: self._total(table, choice) for name, table in self.costs.items()}
        return Selection(tuple(choice), self._total(self.scores, choice), totals, optimal, bound)

    def _total(self, table: np.ndarray[Any, np.dtype[np.float64]], choice: Sequence[int]) -> float:
        return math.fsum(table[start + j] for start, j in zip(self.starts, choice, strict=False))

    def _keeps(self, choice: Sequence[int], names: Sequence[str], diverse: bool) -> bool:
        """Return whether a choice keeps these limits, added up in exact order."""
        if diverse and any(sum(a == b for a, b in zip(choice, y, strict=True)) > self.shared for y in self.earlier):
            return False
        return all(within(self._total(self.costs[name], choice), self.limits[name]) for name in names)

    def _minimum(
        self,
        objective: np.ndarray[Any, np.dtype[np.float64]],
        names: Sequence[str],
        diverse: bool,
        seconds: float | None = None,
        gap: float = 0.0,
    ) -> tuple[tuple[int, ...], float, bool] | None:
        """Return the choice that minimises ``objective``, the proven bound and whether it is optimal, or None.

        Args:
            objective: Coefficient of each alternative.
            names: Limits that have to hold.
            diverse: Whether the selections have to differ from the earlier ones.
            seconds: Time limit of the solver.
            gap: Relative gap at which it may stop.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array, vstack

        count, groups = int(self.starts[-1]), len(self.sizes)
        of_group = np.repeat(np.arange(groups), self.sizes)
        rows = [csr_array((np.ones(count), (of_group, np.arange(count))), shape=(groups, count))]
        low, high = [np.ones(groups)], [np.ones(groups)]

        def add(row: np.ndarray[Any, np.dtype[np.float64]], lowest: float, highest: float) -> None:
            rows.append(csr_array(row[None, :]))
            low.append(np.array([lowest]))
            high.append(np.array([highest]))

        for name in names:  # rows of like size, whatever the unit: the solver's tolerances are absolute
            lowest, highest = self.limits[name]
            scale = max((abs(bound) for bound in (lowest, highest) if bound), default=0.0)
            scale = scale or float(np.abs(self.costs[name]).max()) or 1.0
            add(
                self.costs[name] / scale,
                -np.inf if lowest is None else lowest / scale,
                np.inf if highest is None else highest / scale,
            )
        for choice in self.earlier if diverse else ():
            add(self._indicator(choice), -np.inf, self.shared)
        # The solver stops at an absolute gap of 1e-6: with a largest score of 1000 that is 1e-9 of it.
        size = (float(np.abs(objective).max()) or 1.0) / 1e3
        options = {"mip_rel_gap": gap, "presolve": True, **({} if seconds is None else {"time_limit": seconds})}
        for _ in range(_MAXIMUM_CUTS):
            with without_lines(_STRAY):
                found = milp(
                    objective / size,
                    integrality=np.ones(count),
                    bounds=Bounds(0, 1),
                    constraints=LinearConstraint(vstack(rows), np.concatenate(low), np.concatenate(high)),
                    options=options,
                )
            if found.status == 2:
                return None
            if found.x is None:
                raise ArchsmithError(
                    f"The integer programme found nothing within {seconds:g} s; give it more time."
                    if found.status == 1
                    else f"The integer programme was not solved: {found.message}"
                )
            choice = tuple(
                int(np.argmax(found.x[start:end])) for start, end in zip(self.starts, self.starts[1:], strict=False)
            )
            if self._keeps(choice, names, diverse):
                bound = found.mip_dual_bound
                return choice, math.nan if bound is None else float(bound) * size, bool(found.status == 0)
            add(self._indicator(choice), -np.inf, groups - 1)  # broken by a rounding of the solver: never again
        raise ArchsmithError(
            f"The integer programme found {_MAXIMUM_CUTS} selections that break a limit by less than the solver's "
            "tolerance; lower the limit a little."
        )

    def _indicator(self, choice: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float64]]:
        row = np.zeros(int(self.starts[-1]))
        row[self.starts[:-1] + np.array(choice)] = 1.0
        return row

    # ------------------------------------------------------------------ what cannot be kept, and why

    def _explained(self) -> Infeasible:
        """Return the error of a problem without a solution: the limits to blame, each with what can be reached."""
        for name, (lowest, highest) in self.limits.items():  # one limit alone
            nearest = self._nearest(name, [], False)
            assert nearest is not None
            if not within(nearest, (lowest, highest)):
                return self._blamed([name], {name: nearest}, False)
        needed, diverse = list(self.limits), bool(self.earlier)
        if diverse and self._minimum(0 * self.scores, needed, False) is None:
            diverse = False
        for name in list(needed):  # what is left when nothing more can be dropped conflicts as a whole
            rest = [other for other in needed if other != name]
            if self._minimum(0 * self.scores, rest, diverse) is None:
                needed = rest
        reachable = {
            name: self._nearest(name, [other for other in needed if other != name], diverse) for name in needed
        }
        return self._blamed(needed, reachable, diverse)

    def _nearest(self, name: str, others: Sequence[str], diverse: bool) -> float | None:
        """Return the sum nearest to the limit's range while ``others`` hold, or None."""
        lowest, highest = self.limits[name]
        table = self.costs[name]
        ends = []
        for sign, bound in ((1, highest), (-1, lowest)):
            if bound is not None and (found := self._minimum(sign * table, others, diverse)) is not None:
                ends.append((sign, bound, self._total(table, found[0])))
        broken = [total for sign, bound, total in ends if sign * total > sign * bound + _slack(bound)]
        return broken[0] if broken else ends[0][2] if ends else None

    def _blamed(self, names: Sequence[str], reachable: Mapping[str, float | None], diverse: bool) -> Infeasible:
        shown = ", ".join(name + _text(self.limits[name]) for name in names)
        if diverse:
            shown = f"{shown}, {DIVERSITY} (at most {self.shared} equal choices)".removeprefix(", ")
        alone = len(names) == 1 and not diverse
        told = [
            f"{name} {'at least' if _is_above(total, self.limits[name]) else 'at most'} {total:.10g}"
            for name in names
            if (total := reachable[name]) is not None
        ]
        return Infeasible(
            Shown(shown),
            allowed=" or ".join(told) + ("" if alone else " (each while the other limits hold)")
            if told
            else "limits that some selection keeps",
            hint=f"The limit on {names[0]} binds: nothing reaches it." if alone else "Together nothing keeps them.",
            reachable=reachable,
        )


def checked_limits(limits: Mapping[str, float | Range], costs: Mapping[str, Any]) -> dict[str, Range]:
    """Return every limit as a range.

    Raises:
        UserError: A limit without its cost, not a number, or a range that is empty.
    """
    ranges: dict[str, Range] = {}
    for name, limit in limits.items():
        if name not in costs:
            raise UserError("limits", name, allowed=f"costs that are given: {sorted(costs)}")
        low, high = limit if isinstance(limit, tuple | list) else (None, limit)
        bounds = [bound for bound in (low, high) if bound is not None]
        if not bounds or not all(math.isfinite(bound) for bound in bounds):
            raise UserError(f"limits[{name!r}]", limit, allowed="a finite number, or (smallest, largest)")
        if low is not None and high is not None and low > high:
            raise UserError(f"limits[{name!r}]", limit, allowed="a smallest sum that is not above the largest")
        ranges[name] = (low, high)
    return ranges


def within(total: float, limit: Range) -> bool:
    """Return whether a sum is in the range, up to the rounding of a sum (``TOLERANCE``)."""
    low, high = limit
    return (high is None or total <= high + _slack(high)) and (low is None or total >= low - _slack(low))


def _slack(bound: float) -> float:
    return TOLERANCE * abs(bound)


def _is_above(total: float, limit: Range) -> bool:
    high = limit[1]
    return high is not None and total > high + _slack(high)


def _text(limit: Range) -> str:
    low, high = limit
    if low is None:
        return f"<={high:.10g}"
    return f">={low:.10g}" if high is None else f" in [{low:.10g}, {high:.10g}]"
