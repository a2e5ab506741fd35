"""NSGA-II: evolution towards a whole Pareto front.

Deb, Pratap, Agarwal and Meyarivan 2002 (doi 10.1109/4235.996017). Parents win binary tournaments by (front, crowding);
children come of uniform crossover and a one-decision mutation; parents and children together are sorted into fronts,
and the best P survive, those with the most space around them where a front does not fit whole. Infeasible candidates
rank behind all feasible ones, by how much they break the constraints (constraint dominance).

The sort and the crowding distance are pymoo's (the ``evolve`` extra): two pure functions of an array, so the population
here stays plain JSON. Optuna's NSGA-II keeps its generations inside a study and breeds from parameter dictionaries of a
fixed set of names; it could not use a space's own crossover and mutation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from archsmith.core.errors import MissingExtra, UserError
from archsmith.space import Architecture, Budget, Objective, Result, Space, Trial
from archsmith.space.pareto import losses
from archsmith.space.values import number_from_json, number_to_json
from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy
from archsmith.strategies.evolution import Mutation, mutate_one

STRATEGIES = (
    {
        "name": "nsga2",
        "class": "Nsga2",
        "title": "Evolution towards a Pareto front, any number of objectives",
        "paper": "doi 10.1109/4235.996017",
        "extra": "evolve",
    },
)

# N members, M objectives

BREEDINGS = 50
"""Children that may already be in the population before a random architecture takes their place."""


@dataclass(frozen=True)
class Individual:
    """A member: its trial, its losses (one for each objective), and by how much it breaks the constraints."""

    trial: int
    architecture: Architecture
    losses: tuple[float, ...]
    violation: float


def ranks_and_crowding(losses_NM: np.ndarray, violations_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the front of each point (0 is the best) and its crowding distance within the front.

    Args:
        losses_NM: Losses of shape (N, M), smaller is better, finite where the violation is 0.
        violations_N: By how much each breaks the constraints, 0 for feasible, shape (N,).

    Feasible points are sorted by dominance. Infeasible ones come behind them, one front for each distinct violation,
    with crowding 0. The ends of a front have infinite crowding.

    Raises:
        MissingExtra: pymoo is not installed.
    """
    try:
        from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
        from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
    except ImportError as error:
        raise MissingExtra("pymoo", "evolve", "NSGA-II") from error
    ranks, crowding = np.zeros(len(losses_NM), dtype=np.int64), np.zeros(len(losses_NM))
    feasible = np.flatnonzero(violations_N == 0)
    fronts = NonDominatedSorting().do(losses_NM[feasible]) if len(feasible) else []
    for rank, front in enumerate(fronts):
        members = feasible[front]
        ranks[members] = rank
        crowding[members] = calc_crowding_distance(losses_NM[members]) if len(members) > 2 else np.inf
    broken = np.flatnonzero(violations_N != 0)
    if len(broken):
        ranks[broken] = len(fronts) + np.unique(violations_N[broken], return_inverse=True)[1]
    return ranks, crowding


class Nsga2(Strategy):
    """Evolves a population towards the Pareto front of any number of objectives.

    Args:
        space: Where to search.
        objectives: One or more.
        seed: Seed of everything drawn.
        population: P, also the number of children in a generation.
        crossover_probability: How often a child has two parents instead of one.
        mutation_probability: How often a child is mutated.
        mutation: How; one decision by default.
        constraints: Absolute limits on the results' costs. Whatever breaks them counts as infeasible, by the sum of the
            relative excesses. An infeasible result whose costs do not say so ranks last, and so does a failed one.

    Generations are synchronous: the strategy waits for the last result of each. Which results it waits for, not their
    order, decides what follows. A trial's parent is its first parent's trial. Memory is two populations.

    Raises:
        UserError: A setting out of its range, or a relative limit.
        MissingExtra: pymoo is not installed (when the second generation is asked).
    """

    objectives_allowed = None

    def __init__(
        self,
        space: Space,
        *,
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
        population: int = 50,
        crossover_probability: float = 1.0,
        mutation_probability: float = 0.9,
        mutation: Mutation = mutate_one,
        constraints: Budget | None = None,
    ) -> None:
        super().__init__(space, objectives=objectives, seed=seed)
        if not isinstance(population, int) or isinstance(population, bool) or population < 2:
            raise UserError("population", population, allowed="an integer from 2")
        chances = (("crossover_probability", crossover_probability), ("mutation_probability", mutation_probability))
        for name, given in chances:
            if not 0 <= given <= 1:
                raise UserError(name, given, allowed="a number in [0, 1]")
        if constraints is not None and any(limit.relative for limit in constraints.limits):
            raise UserError("constraints", str(constraints), allowed="absolute limits", hint="Call resolve() first.")
        self.population = population
        self.crossover_probability, self.mutation_probability = crossover_probability, mutation_probability
        self.mutation, self.constraints = mutation, constraints
        self.members: list[Individual] = []
        self.children: list[Individual] = []  # of this generation, as far as told
        self.bred: list[str] = []  # digests of this generation, as far as asked
        self._ranked: tuple[np.ndarray, np.ndarray] | None = None

    def _propose(self) -> Proposal | None:
        if len(self.bred) == self.population:
            return None
        taken = {member.architecture.digest for member in self.members}.union(self.bred)
        proposal = self._child(taken) if self.members else None
        if proposal is None:
            for _ in range(BREEDINGS):
                proposal = Proposal(self.space.sample(self.rng))
                if proposal.architecture.digest not in taken:
                    break
        assert proposal is not None
        self.bred.append(proposal.architecture.digest)
        return proposal

    def _child(self, taken: set[str]) -> Proposal | None:
        """Return a child that is new to the population, ``None`` when none comes."""
        for _ in range(BREEDINGS):
            first, second = self._winner(), self._winner()
            child = first.architecture
            if self.rng.random() < self.crossover_probability:
                child = self.space.crossover(child, second.architecture, self.rng)
            if self.rng.random() < self.mutation_probability:
                child = self.mutation(self.space, child, self.rng)
            if child.digest not in taken:
                return Proposal(child, parent=first.trial)
        return None

    def _winner(self) -> Individual:
        """Return the better of two random members: by front, then by crowding."""
        if self._ranked is None:
            self._ranked = _ranked(self.members)
        ranks, crowding = self._ranked
        a, b = (int(i) for i in self.rng.integers(len(self.members), size=2))
        return self.members[a if (ranks[a], -crowding[a]) <= (ranks[b], -crowding[b]) else b]

    def _learn(self, trial: Trial, result: Result) -> None:
        values = tuple(float(loss) for loss in losses([result], self.objectives)[0])
        violation = self._violation(result) if all(map(math.isfinite, values)) else math.inf
        if result.status == "infeasible":
            violation = self._violation(result) or math.inf
        self.children.append(Individual(trial.id, trial.architecture, values, violation))
        if len(self.children) == self.population:
            self._survive()

    def _violation(self, result: Result) -> float:
        """Return the sum of the relative excesses over the limits; infinity where a cost is missing or NaN."""
        total = 0.0
        for limit in self.constraints.limits if self.constraints else ():
            cost = result.costs.get(limit.cost, math.nan)
            if math.isnan(cost):
                return math.inf
            excess = cost - limit.value if limit.relation == "<=" else limit.value - cost
            total += max(0.0, excess / limit.value)
        return total

    def _survive(self) -> None:
        """Keep the best P of parents and children."""
        everyone = self.members + sorted(self.children, key=lambda child: child.trial)
        ranks, crowding = _ranked(everyone)
        order = np.lexsort((-crowding, ranks))[: self.population]
        self.members = [everyone[int(i)] for i in order]
        self.children, self.bred, self._ranked = [], [], None

    def _state(self) -> dict[str, Any]:
        return {
            "members": [_to_json(member) for member in self.members],
            "children": [_to_json(child) for child in self.children],
            "bred": list(self.bred),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.members = [self._individual(data) for data in state["members"]]
        self.children = [self._individual(data) for data in state["children"]]
        self.bred = list(state["bred"])
        self._ranked = None

    def _individual(self, data: Sequence[Any]) -> Individual:
        trial, architecture, values, violation = data
        numbers = tuple(number_from_json(value, "state.losses") for value in values)
        return Individual(
            int(trial), self._architecture(architecture), numbers, number_from_json(violation, "state.violation")
        )


def _ranked(members: Sequence[Individual]) -> tuple[np.ndarray, np.ndarray]:
    losses_NM = np.array([member.losses for member in members], dtype=np.float64)
    return ranks_and_crowding(losses_NM, np.array([member.violation for member in members]))


def _to_json(member: Individual) -> list[Any]:
    values = [number_to_json(value) for value in member.losses]
    return [member.trial, member.architecture.to_json(), values, number_to_json(member.violation)]
