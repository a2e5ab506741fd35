"""Exhaustive search: every architecture once, in the order of the decisions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from archsmith.core.errors import UserError
from archsmith.space import Objective, Space
from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy

STRATEGIES = (
    {
        "name": "grid",
        "class": "GridSearch",
        "title": "Every architecture once, in the order of the decisions",
        "paper": None,
        "extra": None,
    },
)


class GridSearch(Strategy):
    """Proposes ``space.enumerate()``, lazily: the last decision varies fastest.

    Args:
        space: A finite space.
        objectives: Not used; any number.
        seed: Seed of the trials; the order has no randomness.

    The state is the last architecture, and going on behind it costs one walk, however far the search is.

    Raises:
        UserError: The space is infinite.
    """

    repeats = False
    objectives_allowed = None
    learns = False

    def __init__(self, space: Space, *, objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,), seed: int = 0) -> None:
        super().__init__(space, objectives=objectives, seed=seed)
        if space.size == math.inf:
            raise UserError(
                "space", space.name, allowed="a finite space", hint="It has real dimensions: use RandomSearch instead."
            )
        self._rest = space.enumerate()
        self.upcoming = next(self._rest, None)

    @property
    def done(self) -> bool:
        """Whether all was proposed."""
        return self.upcoming is None

    def _propose(self) -> Proposal | None:
        if (architecture := self.upcoming) is None:
            return None
        self.upcoming = next(self._rest, None)
        return Proposal(architecture)

    def _state(self) -> dict[str, Any]:
        return {"upcoming": None if self.upcoming is None else self.upcoming.to_json()}

    def _load(self, state: Mapping[str, Any]) -> None:
        if state["upcoming"] is None:
            self.upcoming, self._rest = None, iter(())
        else:
            self.upcoming = self._architecture(state["upcoming"])
            self._rest = self.space.enumerate(after=self.upcoming)
