"""Random search: the baseline that every comparison needs."""

from __future__ import annotations

from collections.abc import Sequence

from archsmith.space import Objective, Space
from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy


class RandomSearch(Strategy):
    """Proposes independent samples of the space; takes any number of objectives and learns nothing.

    Args:
        space: Where to search.
        objectives: Not used; any number.
        seed: Seed of the samples.

    How samples are distributed the space says (``space.sample``); repetitions are possible. Memory is constant.
    """

    objectives_allowed = None

    def __init__(self, space: Space, *, objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,), seed: int = 0) -> None:
        super().__init__(space, objectives=objectives, seed=seed)

    def _propose(self) -> Proposal:
        return Proposal(self.space.sample(self.rng))
