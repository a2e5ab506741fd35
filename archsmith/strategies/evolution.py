"""Regularised (ageing) evolution: Real et al. 2019, arXiv 1802.01548, algorithm 1.

A population of the youngest P. Each step draws S of them, mutates the best of these, and the child takes the place of
the oldest. What is not in the paper: results may be pending (the population is whoever has a result), and a failed
candidate is never born, so the start asks for random ones until P have a result.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Objective, Result, Space, Trial
from archsmith.space.values import number_from_json, number_to_json
from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy

STRATEGIES = (
    {
        "name": "regularized-evolution",
        "class": "RegularizedEvolution",
        "title": "Evolution in which the oldest die",
        "paper": "arXiv 1802.01548",
        "extra": None,
    },
)

Mutation = Callable[[Space, Architecture, np.random.Generator], Architecture]
"""Returns a valid architecture that differs from the given one."""


def mutate_one(space: Space, architecture: Architecture, rng: np.random.Generator) -> Architecture:
    """Change one decision, uniformly: the default mutation."""
    return space.mutate(architecture, rng)


@dataclass(frozen=True)
class MutateWithin:
    """Changes one decision: first a group of paths uniformly, then a path of it, then another option.

    Args:
        groups: Paths of each group. Those that are inactive are passed over, and so is a group without active paths.

    NAS-Bench-201's mutation draws the target node, then the source node, then the operation:
    ``MutateWithin([[f"edge/{s}-{t}" for s in range(t)] for t in (1, 2, 3)])``.

    Raises:
        UserError: When called: no path of any group is active, or nothing else is allowed at the path.
    """

    groups: Sequence[Sequence[str]]

    def __call__(self, space: Space, architecture: Architecture, rng: np.random.Generator) -> Architecture:
        """Return the mutated architecture."""
        active = [paths for group in self.groups if (paths := [path for path in group if path in architecture])]
        if not active:
            raise UserError("groups", self.groups, allowed=f"paths of the architecture: {sorted(architecture)[:8]}")
        group = active[int(rng.integers(len(active)))]
        return space.mutate(architecture, rng, subtree=group[int(rng.integers(len(group)))])


@dataclass(frozen=True)
class Member:
    """One of the population: the trial it came from, and its loss (smaller is better)."""

    trial: int
    architecture: Architecture
    loss: float


class RegularizedEvolution(Strategy):
    """Mutates the winner of a small tournament; the oldest member dies.

    Args:
        space: Where to search.
        objectives: One.
        seed: Seed of samples, tournaments and mutations.
        population: P, the number alive. Paper: 100 of 20,000; NAS-Bench-201: 10.
        tournament: S, how many are drawn for a tournament. Paper: 25; NAS-Bench-201: 3.
        replacement: Whether a member may be drawn twice for one tournament (the paper's algorithm puts it back).
        mutation: How a child is made.
        drop: ``"oldest"`` (the paper), or ``"worst"`` for plain elitist evolution, its baseline.

    A trial's parent is the trial it was mutated from. Memory is the population.

    Raises:
        UserError: A size that is no integer from 1, or a tournament without replacement larger than the population.
    """

    def __init__(
        self,
        space: Space,
        *,
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
        population: int = 100,
        tournament: int = 25,
        replacement: bool = True,
        mutation: Mutation = mutate_one,
        drop: Literal["oldest", "worst"] = "oldest",
    ) -> None:
        super().__init__(space, objectives=objectives, seed=seed)
        for name, given in (("population", population), ("tournament", tournament)):
            if not isinstance(given, int) or isinstance(given, bool) or given < 1:
                raise UserError(name, given, allowed="an integer from 1")
        if not replacement and tournament > population:
            raise UserError("tournament", tournament, allowed=f"at most the population, {population}")
        if drop not in ("oldest", "worst"):
            raise UserError("drop", drop, allowed="'oldest' or 'worst'")
        self.population, self.tournament, self.replacement = population, tournament, replacement
        self.mutation = mutation
        self.drop = drop
        self.members: deque[Member] = deque()
        self.born = 0

    def _propose(self) -> Proposal | None:
        if self.born + len(self.pending) < self.population:
            return Proposal(self.space.sample(self.rng))
        if not self.members:
            return None
        parent = self._winner()
        return Proposal(self.mutation(self.space, parent.architecture, self.rng), parent=parent.trial)

    def _winner(self) -> Member:
        alive = len(self.members)
        if self.replacement:
            drawn = self.rng.integers(alive, size=self.tournament)
        else:
            drawn = self.rng.choice(alive, size=min(self.tournament, alive), replace=False)
        return min((self.members[int(i)] for i in drawn), key=lambda member: member.loss)

    def _learn(self, trial: Trial, result: Result) -> None:
        loss = self._loss(result)
        if math.isnan(loss):
            return
        self.born += 1
        self.members.append(Member(trial.id, trial.architecture, loss))
        if len(self.members) > self.population:
            if self.drop == "oldest":
                self.members.popleft()
            else:
                del self.members[max(range(len(self.members)), key=lambda i: self.members[i].loss)]

    def _state(self) -> dict[str, Any]:
        members = [[m.trial, m.architecture.to_json(), number_to_json(m.loss)] for m in self.members]
        return {"born": self.born, "members": members}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.born = int(state["born"])
        self.members = deque(
            Member(int(trial), self._architecture(data), number_from_json(loss, "state.loss"))
            for trial, data, loss in state["members"]
        )
