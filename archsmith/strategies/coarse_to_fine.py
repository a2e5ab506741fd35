"""Coarse-to-fine selection: a grid of tied choices first, then small mutations of the best of it, budget by budget.

BigNAS (arXiv 2003.11142) selects children of a trained supernet so. The coarse phase evaluates a grid with few values
for each kind of choice (all kernels alike, all depths alike, ...) and keeps the best of every budget, its skeleton. The
fine phase changes every decision of a skeleton with a small probability; the mutant takes the place of the skeleton
where it keeps the budget and is better. Evaluations are cheap there, and costs are exact and known beforehand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Budget, DeadEnd, Interval, Objective, Options, Result, Space, Trial, Value
from archsmith.space.deciders import Mask, Uniform, is_allowed
from archsmith.space.options import draw, option_count
from archsmith.space.values import number_from_json, number_to_json
from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy
from archsmith.strategies.unseen import unseen_sample

STRATEGIES = (
    {
        "name": "coarse-to-fine",
        "class": "CoarseToFine",
        "title": "A grid of tied choices, then small mutations of the best within each budget",
        "paper": "arXiv 2003.11142",
        "extra": None,
    },
)

MOST_SKELETONS = 10_000
"""Largest coarse grid."""

TRIES = 200
"""Mutants that may be known already, or too costly, before a turn is given up."""

Costs = Callable[[Architecture], Mapping[str, float]]
"""Costs of an architecture by name, as far as they are known beforehand, in the stored units of ``Budget``."""


@dataclass(frozen=True)
class Best:
    """The best of a budget: the trial it came from, and its loss (smaller is better)."""

    trial: int
    architecture: Architecture
    loss: float


class CoarseToFine(Strategy):
    """Evaluates a coarse grid, then mutates the best architecture of every budget in turn.

    Args:
        space: Where to search.
        objectives: One.
        seed: Seed of the mutations.
        limits: Budgets with absolute limits, each with a best of its own; one without limits when empty.
        costs: Costs known beforehand, asked before anything is proposed: what keeps no budget by them is never
            evaluated. Those that results carry are better known, and decide afterwards: exact costs are the same, a
            measured one (latency) takes the place of what was foretold. Without it the costs of results decide alone.
        coarse: The grid; ``coarse_grid(space, levels)`` when None.
        levels: Values of each kind of choice in the grid, or one number for each group of decisions.
        mutation_probability: With which each decision of a parent becomes another one.
        mutations: Trials of the fine phase, None for any number.

    Results of both phases count for every budget that they keep, and only improvements replace. The fine phase begins
    when all of the grid has been told. No architecture is evaluated twice, so memory grows with the search.

    Attributes:
        best: For each budget, in the order of ``limits``, its best; None while there is none.

    Raises:
        UserError: Relative limits, a probability outside (0, 1], a grid larger than ``MOST_SKELETONS``, or one of which
            nothing keeps any budget.
    """

    repeats = False

    def __init__(
        self,
        space: Space,
        *,
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
        limits: Sequence[Budget] = (),
        costs: Costs | None = None,
        coarse: Sequence[Architecture] | None = None,
        levels: int | Mapping[str, int] = 2,
        mutation_probability: float = 0.1,
        mutations: int | None = None,
    ) -> None:
        super().__init__(space, objectives=objectives, seed=seed)
        if not 0 < mutation_probability <= 1:
            raise UserError("mutation_probability", mutation_probability, allowed="a number above 0, at most 1")
        if mutations is not None and (not isinstance(mutations, int) or isinstance(mutations, bool) or mutations < 0):
            raise UserError("mutations", mutations, allowed="an integer from 0, or None")
        for budget in limits:
            if any(limit.relative for limit in budget.limits):
                raise UserError("limits", str(budget), allowed="absolute limits", hint="Call resolve() first.")
        self.limits = tuple(limits) or (Budget(),)
        self.costs = costs
        self.mutation_probability, self.mutations = mutation_probability, mutations
        grid = coarse_grid(space, levels) if coarse is None else [space.validate(each) for each in coarse]
        self.coarse = [skeleton for skeleton in grid if self._may_fit(skeleton)]
        if not self.coarse:
            raise UserError(
                "limits",
                [str(budget) for budget in self.limits],
                allowed="a budget that some architecture of the coarse grid keeps",
                hint=f"The grid has {len(grid)} architectures; give it smaller ones, or a larger budget.",
            )
        self.best: list[Best | None] = [None] * len(self.limits)
        self.seen: set[str] = set()
        self.next_coarse = 0
        self.mutated = 0
        self.turn = 0
        self.exhausted = False

    @property
    def phase(self) -> str:
        """Either "coarse", while the grid is asked or waited for, or "fine"."""
        waiting = any(trial.info.get("phase") == "coarse" for trial in self.pending.values())
        return "coarse" if self.next_coarse < len(self.coarse) or waiting else "fine"

    @property
    def done(self) -> bool:
        """Whether all mutations were asked, or nothing new is to be found."""
        asked = self.next_coarse == len(self.coarse) and self.mutated == self.mutations
        return asked or self.exhausted

    def _propose(self) -> Proposal | None:
        while self.next_coarse < len(self.coarse):
            skeleton = self.coarse[self.next_coarse]
            self.next_coarse += 1
            if skeleton.digest not in self.seen:
                self.seen.add(skeleton.digest)
                return Proposal(skeleton, info={"phase": "coarse"})
        if self.phase == "coarse" or self.done:
            return None
        for _ in self.limits:
            number = self.turn
            self.turn = (self.turn + 1) % len(self.limits)
            if (found := self._mutant(number)) is not None:
                return self._fine(found, number)
        if (other := self._elsewhere()) is not None:
            return self._fine(other, None)
        self.exhausted = True
        return None

    def _fine(self, architecture: Architecture, number: int | None) -> Proposal:
        self.mutated += 1
        self.seen.add(architecture.digest)
        parent = None if number is None else self.best[number]
        info = {"phase": "fine", "budget": number}
        return Proposal(architecture, parent=None if parent is None else parent.trial, info=info)

    def _mutant(self, number: int) -> Architecture | None:
        """Return a mutant of a budget's best that is new and may keep the budget; None when none comes."""
        parent = self.best[number]
        if parent is None:
            return None
        for _ in range(TRIES):
            mutant = mutate_each(self.space, parent.architecture, self.mutation_probability, self.rng)
            if mutant.digest not in self.seen and self._may_fit(mutant, number):
                return mutant
        return None

    def _elsewhere(self) -> Architecture | None:
        """Return a random architecture that is new and may keep some budget."""
        for _ in range(TRIES):
            architecture = unseen_sample(self.space, self.rng, self.seen)
            if architecture is None or self._may_fit(architecture):
                return architecture
        return None

    def _may_fit(self, architecture: Architecture, number: int | None = None) -> bool:
        """Return whether an architecture keeps a budget (any of them for None), as far as that is known beforehand."""
        if self.costs is None:
            return True
        costs = self.costs(architecture)
        asked = self.limits if number is None else (self.limits[number],)
        return any(not budget.violations(costs) for budget in asked)

    def _learn(self, trial: Trial, result: Result) -> None:
        loss = self._loss(result)
        if math.isnan(loss):
            return
        costs = dict(result.costs) if self.costs is None else {**self.costs(trial.architecture), **result.costs}
        for number, budget in enumerate(self.limits):
            best = self.best[number]
            if (best is None or loss < best.loss) and not budget.violations(costs):
                self.best[number] = Best(trial.id, trial.architecture, loss)

    def _state(self) -> dict[str, Any]:
        return {
            "best": [
                None if best is None else [best.trial, best.architecture.to_json(), number_to_json(best.loss)]
                for best in self.best
            ],
            "seen": sorted(self.seen),
            "next_coarse": self.next_coarse,
            "mutated": self.mutated,
            "turn": self.turn,
            "exhausted": self.exhausted,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.best = [
            None
            if row is None
            else Best(int(row[0]), self._architecture(row[1]), number_from_json(row[2], "state.loss"))
            for row in state["best"]
        ]
        self.seen = set(state["seen"])
        self.next_coarse, self.mutated, self.turn = (int(state[name]) for name in ("next_coarse", "mutated", "turn"))
        self.exhausted = bool(state["exhausted"])


def coarse_grid(space: Space, levels: int | Mapping[str, int] = 2) -> list[Architecture]:
    """Return a grid in which all decisions of a group stand at the same level: their n values are spread evenly.

    Args:
        space: Any space; groups are those of its decisions ("width", "kernel", ...).
        levels: How many levels each group has, or a number for each group by name (2 for the others). One level is the
            middle, two are the ends. A decision takes the allowed option nearest to its group's level.

    Returns:
        Each architecture once, in the order of the levels; the last group varies fastest.

    Raises:
        UserError: A number of levels below 1, or more than ``MOST_SKELETONS`` architectures.

    Example:
        >>> from archsmith.space import Ordinal, ProductSpace
        >>> kernels = {f"k{i}": Ordinal((3, 5, 7), group="kernel") for i in range(4)}
        >>> [tuple(a.values()) for a in coarse_grid(ProductSpace("toy", kernels))]
        [(3, 3, 3, 3), (7, 7, 7, 7)]
    """
    numbers = [levels] if isinstance(levels, int) else list(levels.values())
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in numbers):
        raise UserError("levels", levels, allowed="integers from 1")

    def count(group: str) -> int:
        return levels if isinstance(levels, int) else levels.get(group, 2)

    found: dict[str, Architecture] = {}
    for decide in _Levels.all(count):
        try:
            architecture = space.walk(decide)
        except DeadEnd:
            continue
        found.setdefault(architecture.digest, architecture)
        if len(found) > MOST_SKELETONS:
            raise UserError(
                "levels", levels, allowed=f"levels that give at most {MOST_SKELETONS} architectures", hint="Use fewer."
            )
    return list(found.values())


class _Levels:
    """Answers by the level of the decision's group; ``all`` runs through the levels of the groups that are asked."""

    def __init__(self, prefix: list[int], count: Callable[[str], int]) -> None:
        self.prefix, self.count = prefix, count
        self.groups: list[str] = []

    @classmethod
    def all(cls, count: Callable[[str], int]) -> Iterator[_Levels]:
        """Yield a decider for every combination; each must have been used for a walk before the next is asked for."""
        prefix: list[int] = []
        for walks in itertools.count():
            if walks > 100 * MOST_SKELETONS:
                raise UserError("levels", walks, allowed="fewer combinations", hint="Too many groups of decisions.")
            decide = cls(prefix, count)
            yield decide
            taken = [*prefix, *(0 for _ in decide.groups[len(prefix) :])]
            while taken and taken[-1] + 1 == count(decide.groups[len(taken) - 1]):
                taken.pop()
            if not taken:
                return
            prefix = [*taken[:-1], taken[-1] + 1]

    def __call__(self, path: str, options: Options, mask: Mask, group: str) -> Value:
        """Return the allowed option nearest to the group's level."""
        if group not in self.groups:
            self.groups.append(group)
        position = self.groups.index(group)
        level = self.prefix[position] if position < len(self.prefix) else 0
        levels = self.count(group)
        part = level / (levels - 1) if levels > 1 else 0.5
        if isinstance(options, Interval):
            return options.at(part)
        if mask is None:
            return options[round(part * (int(option_count(options)) - 1))]
        allowed = np.flatnonzero(mask)
        return options[int(allowed[round(part * (len(allowed) - 1))])]


def mutate_each(space: Space, architecture: Architecture, probability: float, rng: np.random.Generator) -> Architecture:
    """Return a copy in which each decision is changed with a probability of its own, and at least one is.

    Args:
        space: The architecture's.
        architecture: The parent.
        probability: Of each change; a changed decision becomes one of the other allowed options, uniformly.
        rng: Source of everything drawn.
    """
    for _ in range(TRIES):
        try:
            mutant = space.walk(_Changed(architecture, probability, rng))
        except DeadEnd:
            continue
        if mutant != architecture:
            return mutant
    return space.mutate(architecture, rng)


@dataclass(frozen=True)
class _Changed:
    """Repeats stored decisions, some of them changed; where none is allowed, draws."""

    decisions: Mapping[str, Value]
    probability: float
    rng: np.random.Generator

    def __call__(self, path: str, options: Options, mask: Mask, group: str) -> Value:
        if path not in self.decisions or not is_allowed(self.decisions[path], options, mask):
            return Uniform(self.rng)(path, options, mask, group)
        kept = self.decisions[path]
        if self.rng.random() >= self.probability:
            return kept
        for _ in range(TRIES):
            if (other := draw(options, mask, self.rng)) != kept:
                return other
        return kept
