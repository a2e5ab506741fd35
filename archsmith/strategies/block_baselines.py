"""Selections of alternatives without an integer programme: what the exact one is compared with, under the same limits.

Greedy spends an equal share of every limit on each group; "largest" keeps as many parameters as fit and ignores the
scores; random draws. Source: the ablations of Puzzle, arXiv 2411.19146, Sec. 7 (greedy search, maximising parameters,
random selection from the library).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from archsmith.core.errors import Shown, UserError
from archsmith.strategies.milp import Range, Selection, Table, checked_limits, solve, within

_TRIES = 10_000

_LARGEST_GAP = 1e-4
"""Relative gap of ``largest``: sizes against their own limit are a subset sum, whose last digits take very long."""


def greedy(
    scores: Table,
    costs: Mapping[str, Table],
    limits: Mapping[str, float | Range],
    *,
    maximize: bool = False,
) -> Selection:
    """Return what a greedy search selects: every group gets an equal share of every limit.

    Groups take their turn in ascending order of the mean score of their alternatives (descending when ``maximize``):
    where replacing does least harm first. Each takes the best alternative whose every cost fits its share and what
    earlier groups left over; what it leaves goes to the next. Where none fits, it takes the one that exceeds its share
    by least, and the next groups have to make up for it.

    Args:
        scores: As in ``solve``.
        costs: As in ``solve``.
        limits: As in ``solve``; lower bounds are shared out alike.
        maximize: As in ``solve``.

    Raises:
        UserError: The selection breaks a limit: greedy found none, which does not mean that there is none.
    """
    ranges = checked_limits(limits, costs)
    groups, sign = len(scores), -1 if maximize else 1
    order = sorted(range(groups), key=lambda i: (sign * float(np.mean(scores[i])), i))
    left = dict.fromkeys(ranges, 0.0)  # what earlier groups did not spend of their shares
    choice = [0] * groups
    for i in order:

        def excess(j: int, i: int = i) -> float:
            """Return by which part of its share an alternative exceeds what the group may spend, over all limits."""
            worst = 0.0
            for name, (low, high) in ranges.items():
                for bound, direction in ((high, 1), (low, -1)):
                    if bound is not None:
                        share = bound / groups
                        over = direction * (costs[name][i][j] - share) - (left[name] if direction > 0 else 0.0)
                        worst = max(worst, over / (abs(share) or 1.0))
            return worst if worst > 1e-12 else 0.0

        choice[i] = min(range(len(scores[i])), key=lambda j: (excess(j), sign * scores[i][j], j))
        for name, (_, high) in ranges.items():
            if high is not None:
                left[name] += high / groups - costs[name][i][choice[i]]
    return _checked(choice, scores, costs, ranges, "a greedy selection within the limits")


def largest(sizes: Table, scores: Table, costs: Mapping[str, Table], limits: Mapping[str, float | Range]) -> Selection:
    """Return a selection with the most parameters within the limits; its ``score`` is that of ``scores``.

    It has at least 0.9999 of the most that is possible; it is not claimed to be optimal.

    Args:
        sizes: Parameters of each alternative, which are maximised.
        scores: As in ``solve``; only added up.
        costs: As in ``solve``.
        limits: As in ``solve``.

    Raises:
        Infeasible: Nothing keeps the limits.
    """
    return chosen(solve(sizes, costs, limits, maximize=True, gap=_LARGEST_GAP).choice, scores, costs)


def random_within(
    scores: Table,
    costs: Mapping[str, Table],
    limits: Mapping[str, float | Range],
    rng: np.random.Generator,
    *,
    slack: float = 0.1,
) -> Selection:
    """Return a random selection within the limits that uses at least one of them up to ``slack``.

    Alternatives are drawn uniformly; groups are then drawn anew one after the other, at random, where that brings the
    selection nearer to the limits: a purely uniform one is far below a loose limit and above a tight one.

    Args:
        scores: As in ``solve``; only added up.
        costs: As in ``solve``.
        limits: As in ``solve``.
        rng: Source of randomness.
        slack: Part of the tightest limit that may stay unused.

    Raises:
        UserError: None was found in 10,000 steps.
    """
    ranges = checked_limits(limits, costs)
    choice = [int(rng.integers(len(row))) for row in scores]
    for _ in range(_TRIES):
        totals = {name: sum(costs[name][i][j] for i, j in enumerate(choice)) for name in ranges}
        inside = all(within(totals[name], ranges[name]) for name in ranges)
        used = max((totals[n] / high for n, (_, high) in ranges.items() if high), default=1.0)
        if inside and (used >= 1 - slack or not any(high for _, high in ranges.values())):
            return chosen(choice, scores, costs)
        group = int(rng.integers(len(scores)))
        drawn = int(rng.integers(len(scores[group])))
        above = any(high is not None and totals[name] > high for name, (_, high) in ranges.items())
        name = max((n for n in ranges if ranges[n][1]), key=lambda n: totals[n] / (ranges[n][1] or 1.0), default=None)
        if name is None or (costs[name][group][drawn] < costs[name][group][choice[group]]) == above:
            choice[group] = drawn
    return _checked(choice, scores, costs, ranges, "a random selection within the limits")


def uniform(
    scores: Table, costs: Mapping[str, Table], limits: Mapping[str, float | Range], *, maximize: bool = False
) -> Selection:
    """Return the best selection that takes the same alternative (by index) in every group.

    Raises:
        UserError: Groups of different lengths, or no alternative fits when it is taken everywhere.
    """
    ranges, sign = checked_limits(limits, costs), -1 if maximize else 1
    if len(lengths := {len(row) for row in scores}) != 1:
        raise UserError("scores", sorted(lengths), allowed="groups with the same alternatives")
    every = [chosen([j] * len(scores), scores, costs) for j in range(lengths.pop())]
    fitting = [each for each in every if all(within(each.totals[name], ranges[name]) for name in ranges)]
    if not fitting:
        raise UserError("limits", dict(limits), allowed="limits that one alternative keeps in every group")
    return min(fitting, key=lambda each: sign * each.score)


def chosen(choice: Sequence[int], scores: Table, costs: Mapping[str, Table]) -> Selection:
    """Return a choice with its sums; it is not claimed to be optimal."""
    totals = {name: float(sum(table[i][j] for i, j in enumerate(choice))) for name, table in costs.items()}
    score = float(sum(scores[i][j] for i, j in enumerate(choice)))
    return Selection(tuple(int(j) for j in choice), score, totals, optimal=False)


def _checked(
    choice: Sequence[int], scores: Table, costs: Mapping[str, Table], ranges: Mapping[str, Range], what: str
) -> Selection:
    found = chosen(choice, scores, costs)
    for name, limit in ranges.items():
        if not within(found.totals[name], limit):
            low, high = limit
            raise UserError(
                "limits",
                Shown(f"{name} {found.totals[name]:.10g} of {what}, limit {low} to {high}"),
                allowed="limits that it keeps",
                hint="The exact programme, solve(), finds a selection where there is one.",
            )
    return found
