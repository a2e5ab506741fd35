"""Local search: hill climbing over neighbours, from random starts.

White, Nolen and Savani 2020, "Exploring the Loss Landscape in Neural Architecture Search" (arXiv 2005.02960): evaluate
all neighbours of an architecture, go to the best of them if it is better, else start again elsewhere; or go as soon as
one is better. What a neighbour is, the space's dimensions say (one decision, one small step).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Objective, Result, Space, Trial
from archsmith.space.values import number_from_json, number_to_json
from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy
from archsmith.strategies.unseen import unseen_sample

STRATEGIES = (
    {
        "name": "local-search",
        "class": "LocalSearch",
        "title": "Hill climbing over neighbours, from random starts",
        "paper": "arXiv 2005.02960",
        "extra": None,
    },
)


class LocalSearch(Strategy):
    """Climbs from a start until no neighbour is better, then starts again.

    Args:
        space: Where to search.
        objectives: One.
        seed: Seed of starts and of the order of neighbours.
        improvement: ``"best"`` looks at all neighbours before it moves; ``"first"`` moves to the first better one.
        starts: Random architectures before each climb; it starts from the best of them.

    No architecture is evaluated twice: what is known of a neighbour is used. So memory grows with the search, and a
    finite space is searched until it is through. Trials without a number count as worse than all others.

    Raises:
        UserError: An unknown improvement, or a number of starts below 1.
    """

    repeats = False

    def __init__(
        self,
        space: Space,
        *,
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
        improvement: Literal["best", "first"] = "best",
        starts: int = 1,
    ) -> None:
        super().__init__(space, objectives=objectives, seed=seed)
        if improvement not in ("best", "first"):
            raise UserError("improvement", improvement, allowed="'best' or 'first'")
        if not isinstance(starts, int) or isinstance(starts, bool) or starts < 1:
            raise UserError("starts", starts, allowed="an integer from 1")
        self.improvement, self.starts = improvement, starts
        self.known: dict[str, tuple[int, float | None]] = {}  # digest: trial, and loss; None while pending
        self.starting: list[Architecture] = []  # the random architectures before a climb
        self.current: Architecture | None = None
        self.neighbours: list[Architecture] = []  # of the current one, in random order
        self.next_neighbour = 0
        self.exhausted = False

    @property
    def done(self) -> bool:
        """Whether all of a finite space was proposed."""
        return self.exhausted

    def _propose(self) -> Proposal | None:
        while not self.exhausted:
            if self.current is None:
                if len(self.starting) < self.starts:
                    return self._start()
                if any(self._is_pending(architecture) for architecture in self.starting):
                    return None
                self._move(min(self.starting, key=self._loss_of))
            if (proposal := self._next()) is not None:
                return proposal
            if any(self._is_pending(neighbour) for neighbour in self.neighbours):
                return None
            self._climb()
        return None

    def _start(self) -> Proposal | None:
        """Propose a random architecture that is not known yet."""
        if (architecture := unseen_sample(self.space, self.rng, self.known)) is None:
            self.exhausted = True
            return None
        self.starting.append(architecture)
        return self._asked(architecture, None)

    def _next(self) -> Proposal | None:
        """Propose the next neighbour that is not known yet, if there is one."""
        while self.next_neighbour < len(self.neighbours):
            neighbour = self.neighbours[self.next_neighbour]
            self.next_neighbour += 1
            assert self.current is not None
            if neighbour.digest not in self.known:
                return self._asked(neighbour, self.known[self.current.digest][0])
            if self.improvement == "first" and self._loss_of(neighbour) < self._loss_of(self.current):
                self._move(neighbour)
        return None

    def _asked(self, architecture: Architecture, parent: int | None) -> Proposal:
        self.known[architecture.digest] = (self.asked + 1, None)
        return Proposal(architecture, parent=parent)

    def _is_pending(self, architecture: Architecture) -> bool:
        return self.known[architecture.digest][1] is None

    def _loss_of(self, architecture: Architecture) -> float:
        loss = self.known[architecture.digest][1]
        return math.inf if loss is None else loss

    def _move(self, architecture: Architecture) -> None:
        """Make an architecture the current one, its neighbours in random order."""
        found = list(dict.fromkeys(self.space.neighbours(architecture)))
        self.neighbours = [found[int(i)] for i in self.rng.permutation(len(found))]
        self.current, self.next_neighbour, self.starting = architecture, 0, []

    def _climb(self) -> None:
        """Go to the best neighbour, or give up this summit."""
        assert self.current is not None
        best = min(self.neighbours, key=self._loss_of, default=self.current)
        if self._loss_of(best) < self._loss_of(self.current):
            self._move(best)
        else:
            self.current, self.neighbours = None, []

    def _learn(self, trial: Trial, result: Result) -> None:
        loss = self._loss(result)
        self.known[trial.architecture.digest] = (trial.id, math.inf if math.isnan(loss) else loss)
        if self.improvement == "first" and self.current is not None and loss < self._loss_of(self.current):
            self._move(trial.architecture)

    def _state(self) -> dict[str, Any]:
        return {
            "known": [
                [digest, trial, None if loss is None else number_to_json(loss)]
                for digest, (trial, loss) in self.known.items()
            ],
            "starting": [architecture.to_json() for architecture in self.starting],
            "current": None if self.current is None else self.current.to_json(),
            "neighbours": [architecture.to_json() for architecture in self.neighbours],
            "next_neighbour": self.next_neighbour,
            "exhausted": self.exhausted,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.known = {
            digest: (int(trial), None if loss is None else number_from_json(loss, "state.loss"))
            for digest, trial, loss in state["known"]
        }
        self.starting = [self._architecture(data) for data in state["starting"]]
        self.current = None if state["current"] is None else self._architecture(state["current"])
        self.neighbours = [self._architecture(data) for data in state["neighbours"]]
        self.next_neighbour = int(state["next_neighbour"])
        self.exhausted = bool(state["exhausted"])
