"""Random search: the baseline that every comparison needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from archsmith.space import Objective, Space
from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy
from archsmith.strategies.unseen import unseen_sample

STRATEGIES = (
    {
        "name": "random",
        "class": "RandomSearch",
        "title": "Independent samples of the space, the baseline of every comparison",
        "paper": "Bergstra and Bengio 2012; for architectures arXiv 1902.07638",
        "extra": None,
    },
)


class RandomSearch(Strategy):
    """Proposes independent samples of the space; takes any number of objectives and learns nothing.

    Args:
        space: Where to search.
        objectives: Not used; any number.
        seed: Seed of the samples.
        unique: Never propose an architecture twice. Costs memory, 64 bytes and more for each one; a finite space is
            then searched until it is through.

    How samples are distributed the space says (``space.sample``). Without ``unique`` memory is constant.
    """

    objectives_allowed = None
    learns = False

    def __init__(
        self,
        space: Space,
        *,
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
        unique: bool = False,
    ) -> None:
        super().__init__(space, objectives=objectives, seed=seed)
        self.repeats = not unique
        self.seen: dict[str, None] = {}  # digests in order of appearance: a set with a stable order
        self.exhausted = False

    @property
    def done(self) -> bool:
        """Whether all of a finite space was proposed."""
        return self.exhausted

    def _propose(self) -> Proposal | None:
        if self.repeats:
            return Proposal(self.space.sample(self.rng))
        if self.exhausted or (architecture := unseen_sample(self.space, self.rng, self.seen)) is None:
            self.exhausted = True
            return None
        self.seen[architecture.digest] = None
        self.exhausted = math.isfinite(self.space.size) and len(self.seen) >= self.space.size
        return Proposal(architecture)

    def _state(self) -> dict[str, Any]:
        return {"seen": list(self.seen), "exhausted": self.exhausted}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.seen = dict.fromkeys(state["seen"])
        self.exhausted = bool(state["exhausted"])
