"""Searching on predictors: a whole evolution between two measurements, for one, two or more objectives.

One objective: the best survive (a genetic algorithm). Two: NSGA-II, by front and crowding distance. Three and more:
U-NSGA-III, which keeps the last front spread along reference directions. All: binary tournaments, uniform crossover,
mutation gene by gene, parents and children together, no duplicate; what breaks a constraint ranks behind all that keep
them, by how much.

Sources: Deb et al. 2002 (doi 10.1109/4235.996017); Seada and Deb 2016, U-NSGA-III (doi 10.1109/TEVC.2015.2459718);
Blank, Deb et al. 2021, Riesz energy (doi 10.1109/TEVC.2020.2992387).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol, get_args

import numpy as np

from archsmith.core.errors import MissingExtra, UserError
from archsmith.strategies.breeding import Breeding
from archsmith.strategies.nsga2 import ranks_and_crowding

# N members, M objectives

Score = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From a population to its losses (N, M), smaller is better, finite, and its violations (N,), 0 where feasible."""

Directions = Literal["lattice", "energy"]

TRIES = 20
"""Generations that breed nothing new before an inner search ends early: a small space is through."""


@dataclass(frozen=True)
class Scored:
    """Everything an inner search looked at, each architecture once.

    Attributes:
        population: Its members, in the order they were scored.
        losses: Shape (N, M).
        violations: Shape (N,).
    """

    population: np.ndarray
    losses: np.ndarray
    violations: np.ndarray


class InnerSearch(Protocol):
    """Looks for good architectures by asking predictors."""

    def __call__(self, breeding: Breeding, score: Score, start: np.ndarray, rng: np.random.Generator) -> Scored:
        """Return what was scored.

        Args:
            breeding: How populations are bred.
            score: Scores a population; every member that is passed counts as one evaluation.
            start: Members to begin with (those that were measured and are good), possibly none.
            rng: Stream of all choices.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Evolution:
    """An evolution on predictors.

    Attributes:
        population: Members, and children of a generation.
        evaluations: J, what may be scored in one search; exactly that many are, unless the space is smaller.
        crossover: Probability that a child has two parents.
        mutation: Probability that a decision of a child changes; None for one over the number of decisions.
        elite: Share of the start that may come from the given members; the rest is random.
        directions: With three and more objectives, how reference directions are laid out: "lattice" or "energy".

    Raises:
        UserError: A setting out of its range.
    """

    population: int = 50
    evaluations: int = 5_000
    crossover: float = 0.9
    mutation: float | None = None
    elite: float = 0.5
    directions: Directions = "lattice"

    def __post_init__(self) -> None:
        if self.population < 2:
            raise UserError("inner.population", self.population, allowed="an integer from 2")
        if self.evaluations < self.population:
            raise UserError("inner.evaluations", self.evaluations, allowed=f"from the population, {self.population}")
        for name in ("crossover", "mutation", "elite"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"inner.{name}", value, allowed="a number in [0, 1]")
        if self.directions not in get_args(Directions):
            raise UserError("inner.directions", self.directions, allowed=f"one of {list(get_args(Directions))}")

    def __call__(self, breeding: Breeding, score: Score, start: np.ndarray, rng: np.random.Generator) -> Scored:
        """Return everything that the evolution scored."""
        seen = _Seen(breeding, score, self.evaluations)
        given = start[: round(self.elite * self.population)]
        drawn = breeding.sample(rng, self.population - len(given))
        members = seen.add(np.concatenate([given, drawn]) if len(given) else drawn)
        ranking = self._ranking(seen.scored().losses.shape[1])
        idle = 0
        while seen.left and idle < TRIES:
            pairs = rng.integers(len(members), size=(2, self.population, 2))
            winners = ranking.winners(*seen.at(members), pairs, rng)
            first, second = (seen.members(members[row]) for row in winners)
            fresh = seen.add(breeding.children(first, second, rng, crossover=self.crossover, mutation=self.mutation))
            idle = 0 if len(fresh) else idle + 1
            everyone = np.concatenate([members, fresh])
            members = everyone[ranking.survivors(*seen.at(everyone), self.population, rng)]
        return seen.scored()

    def _ranking(self, objectives: int) -> _Ranking:
        if objectives <= 2:
            return _Ranking()
        return _SpreadRanking(reference_directions(objectives, self.population, self.directions))


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Random architectures, scored by predictors: the simplest inner search, and a baseline.

    Attributes:
        evaluations: How many.
    """

    evaluations: int = 5_000

    def __call__(self, breeding: Breeding, score: Score, start: np.ndarray, rng: np.random.Generator) -> Scored:
        """Return random architectures with their scores."""
        seen = _Seen(breeding, score, self.evaluations)
        idle = 0
        while seen.left and idle < TRIES:
            idle = 0 if len(seen.add(breeding.sample(rng, min(1_000, seen.left)))) else idle + 1
        return seen.scored()


class _Seen:
    """What was scored so far; members are named by their position."""

    def __init__(self, breeding: Breeding, score: Score, budget: int) -> None:
        self._breeding, self._score, self.left = breeding, score, budget
        self._keys: set[bytes | str] = set()
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._all: Scored | None = None
        self._count = 0

    def add(self, population: np.ndarray) -> np.ndarray:
        """Score those that are new, as far as the budget goes, and return their positions."""
        fresh: list[int] = []
        for at, key in enumerate(self._breeding.keys(population)):
            if key not in self._keys and len(fresh) < self.left:
                self._keys.add(key)
                fresh.append(at)
        if not fresh:
            return np.empty(0, dtype=np.int64)
        chosen = population[fresh]
        self._parts.append((chosen, *self._score(chosen)))
        self._all = None
        self.left -= len(fresh)
        self._count += len(fresh)
        return np.arange(self._count - len(fresh), self._count)

    def scored(self) -> Scored:
        if self._all is None:
            self._all = Scored(*(np.concatenate(column) for column in zip(*self._parts, strict=True)))
            self._parts = [(self._all.population, self._all.losses, self._all.violations)]
        return self._all

    def members(self, positions: np.ndarray) -> np.ndarray:
        return np.asarray(self.scored().population[positions])

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        everything = self.scored()
        return everything.losses[positions], everything.violations[positions]


class _Ranking:
    """Who wins and who survives: by loss (one objective), or by front and crowding distance (NSGA-II)."""

    def winners(
        self, losses_NM: np.ndarray, violations_N: np.ndarray, pairs: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Return the winner of each pair of positions, shape of ``pairs`` without its last axis."""
        place = np.empty(len(losses_NM), dtype=np.int64)
        place[order(losses_NM, violations_N)] = np.arange(len(losses_NM))  # 0 is the best
        one, two = pairs[..., 0], pairs[..., 1]
        return np.where(place[one] <= place[two], one, two)

    def survivors(
        self, losses_NM: np.ndarray, violations_N: np.ndarray, keep: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Return the positions of those that survive."""
        return order(losses_NM, violations_N)[:keep]


class _SpreadRanking(_Ranking):
    """U-NSGA-III: the last front is thinned out evenly along reference directions; rivals meet in their niche only."""

    def __init__(self, directions: np.ndarray) -> None:
        try:
            from pymoo.algorithms.moo import nsga3
            from pymoo.core.population import Population
        except ImportError as error:
            raise MissingExtra("pymoo", "evolve", "three or more objectives") from error
        self._population, self._associate = Population, nsga3.associate_to_niches
        self._directions, self._survival = directions, nsga3.ReferenceDirectionSurvival(directions)

    def winners(
        self, losses_NM: np.ndarray, violations_N: np.ndarray, pairs: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Return the winner of each pair: in one niche the better front, then the nearer; else a coin."""
        one, two = pairs[..., 0], pairs[..., 1]
        low, high = losses_NM.min(axis=0), losses_NM.max(axis=0)
        niche, distance, _ = self._associate(losses_NM, self._directions, low, np.maximum(high, low + 1e-12))
        ranks, _ = ranks_and_crowding(losses_NM, violations_N)
        better = (ranks[one] < ranks[two]) | ((ranks[one] == ranks[two]) & (distance[one] <= distance[two]))
        rivals = (niche[one] == niche[two]) | ((violations_N[one] != 0) | (violations_N[two] != 0))
        return np.where(np.where(rivals, better, rng.random(one.shape) < 0.5), one, two)

    def survivors(
        self, losses_NM: np.ndarray, violations_N: np.ndarray, keep: int, rng: np.random.Generator
    ) -> np.ndarray:
        """Return the positions of those that survive; what breaks a constraint only fills up."""
        feasible = np.flatnonzero(violations_N == 0)
        if len(feasible) <= keep:
            return np.argsort(violations_N, kind="stable")[:keep]
        population = self._population.new(F=losses_NM[feasible])
        population.set("place", np.arange(len(feasible)))
        kept = self._survival._do(None, population, n_survive=keep, random_state=rng)
        return feasible[np.array(kept.get("place"), dtype=np.int64)]


def order(losses_NM: np.ndarray, violations_N: np.ndarray) -> np.ndarray:
    """Return positions from the best on: feasible first, by loss (one objective), or by front and crowding."""
    if losses_NM.shape[1] == 1:
        return np.lexsort((losses_NM[:, 0], violations_N))
    ranks, crowding = ranks_and_crowding(losses_NM, violations_N)
    return np.lexsort((-crowding, ranks))


@lru_cache(maxsize=8)
def reference_directions(objectives: int, count: int, kind: Directions = "lattice") -> np.ndarray:
    """Return directions on the unit simplex, float64 of shape (at most ``count``, objectives).

    Args:
        objectives: Number of objectives.
        count: How many at most; "energy" gives exactly as many, "lattice" the largest lattice that is not larger.
        kind: "lattice": the regular one of Das and Dennis. "energy": spread by their Riesz energy, in seconds.

    Raises:
        MissingExtra: pymoo is not installed.
    """
    try:
        from pymoo.util.ref_dirs import get_reference_directions
    except ImportError as error:
        raise MissingExtra("pymoo", "evolve", "three or more objectives") from error
    if kind == "energy":
        return np.asarray(get_reference_directions("energy", objectives, count, seed=1))
    parts = 1
    while math.comb(parts + objectives, objectives - 1) <= count:
        parts += 1
    return np.asarray(get_reference_directions("das-dennis", objectives, n_partitions=parts))
