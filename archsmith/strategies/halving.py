"""Successive halving and Hyperband: many short evaluations, few long ones.

Jamieson and Talwalkar 2016 (arXiv 1502.07943), Li et al. 2018 (arXiv 1603.06560). A bracket starts n architectures at a
low fidelity and promotes the best n/eta of each rung to the next; Hyperband runs brackets that start at every rung, so
that no guess is needed of how far a short evaluation can be trusted. A promoted trial names the one it continues as its
``parent`` and, where that one kept weights, their key as ``info["weights"]``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Objective, Result, Space, Trial
from archsmith.space.values import number_from_json, number_to_json
from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy

STRATEGIES = (
    {
        "name": "hyperband",
        "class": "Hyperband",
        "title": "Successive halving from every rung in turn",
        "paper": "arXiv 1603.06560",
        "extra": None,
    },
    {
        "name": "successive-halving",
        "class": "SuccessiveHalving",
        "title": "Many short evaluations, the best of them longer",
        "paper": "arXiv 1502.07943",
        "extra": None,
    },
)


def geometric_fidelities(lowest: float, highest: float, eta: float = 3.0) -> tuple[float, ...]:
    """Return fidelities that grow by ``eta`` up to ``highest``, none below ``lowest``.

    Example:
        >>> geometric_fidelities(1, 81, 3)
        (1.0, 3.0, 9.0, 27.0, 81.0)

    Raises:
        UserError: Not 0 < lowest <= highest, or ``eta`` not above 1.
    """
    if not 0 < lowest <= highest < math.inf:
        raise UserError("lowest, highest", (lowest, highest), allowed="0 < lowest <= highest, finite")
    if not 1 < eta < math.inf:
        raise UserError("eta", eta, allowed="a number above 1")
    rungs = int(math.log(highest / lowest, eta) + 1e-9)
    return tuple(highest / eta**below for below in range(rungs, -1, -1))


@dataclass
class Entry:
    """One architecture of a rung: its trial, the trial it continues, and its loss (``None`` while pending).

    ``weights`` is the key of weights: those it goes on from while pending, then those it left.
    """

    architecture: Architecture
    parent: int | None = None
    trial: int | None = None
    loss: float | None = None
    weights: str | None = None


@dataclass
class Bracket:
    """One run of successive halving.

    Attributes:
        number: Of the bracket, from 0.
        rung: Position of the present fidelity.
        entries: Those of the present rung, asked or not.
        wanted: How many the present rung has in all; more than ``entries`` only at the start.
    """

    number: int
    rung: int
    wanted: int
    entries: list[Entry] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        """Whether all of the present rung have a result."""
        return len(self.entries) == self.wanted and all(entry.loss is not None for entry in self.entries)


class Halving(Strategy):
    """Brackets of successive halving; subclasses say where bracket i starts, with how many, and where those come from.

    See the subclasses for the arguments.
    """

    def __init__(
        self,
        space: Space,
        *,
        fidelities: Sequence[float | None],
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
        eta: float = 3.0,
        open_brackets: int = 1,
    ) -> None:
        super().__init__(space, objectives=objectives, seed=seed)
        self.fidelities = _checked(fidelities)
        if not 1 < eta < math.inf:
            raise UserError("eta", eta, allowed="a number above 1")
        if not isinstance(open_brackets, int) or isinstance(open_brackets, bool) or open_brackets < 1:
            raise UserError("open_brackets", open_brackets, allowed="an integer from 1")
        self.eta, self.open_brackets = eta, open_brackets
        self.brackets: list[Bracket] = []
        self.opened = 0

    @abstractmethod
    def _plan(self, number: int) -> tuple[int, int] | None:
        """Return the first rung of bracket ``number`` and how many start there; ``None`` when there is no such one."""

    def _fresh(self) -> Architecture:
        """Return an architecture for the start of a bracket."""
        return self.space.sample(self.rng)

    @property
    def done(self) -> bool:
        """Whether all brackets are through."""
        return not self.brackets and self._plan(self.opened) is None

    def _propose(self) -> Proposal | None:
        for bracket in self.brackets:
            if (proposal := self._from(bracket)) is not None:
                return proposal
        if len(self.brackets) < self.open_brackets and (plan := self._plan(self.opened)) is not None:
            bracket = Bracket(self.opened, *plan)
            self.brackets.append(bracket)
            self.opened += 1
            return self._from(bracket)
        return None

    def _from(self, bracket: Bracket) -> Proposal | None:
        """Return the next trial of a bracket, ``None`` when all of its rung are asked."""
        entry = next((entry for entry in bracket.entries if entry.trial is None), None)
        if entry is None:
            if len(bracket.entries) == bracket.wanted:
                return None
            entry = Entry(self._fresh())
            bracket.entries.append(entry)
        entry.trial = self.asked + 1
        info: dict[str, Any] = {"bracket": bracket.number, "rung": bracket.rung}
        if entry.weights is not None:
            info["weights"] = entry.weights
        return Proposal(entry.architecture, self.fidelities[bracket.rung], entry.parent, info)

    def _learn(self, trial: Trial, result: Result) -> None:
        bracket = next(each for each in self.brackets if each.number == trial.info["bracket"])
        entry = next(entry for entry in bracket.entries if entry.trial == trial.id)
        loss = self._loss(result)
        entry.loss = math.inf if math.isnan(loss) else loss
        entry.weights = result.weights
        if bracket.is_complete:
            self._promote(bracket)

    def _promote(self, bracket: Bracket) -> None:
        """Lift the best 1/eta to the next rung; a bracket without a next rung, or without anyone to lift, is over."""
        alive = [entry for entry in bracket.entries if entry.loss != math.inf]
        alive.sort(key=lambda entry: (entry.loss, entry.trial))
        best = alive[: int(bracket.wanted / self.eta + 1e-9)]
        if bracket.rung + 1 == len(self.fidelities) or not best:
            self.brackets.remove(bracket)
            return
        bracket.rung += 1
        bracket.wanted = len(best)
        bracket.entries = [Entry(entry.architecture, parent=entry.trial, weights=entry.weights) for entry in best]

    def _state(self) -> dict[str, Any]:
        return {"opened": self.opened, "brackets": [_bracket_to_json(bracket) for bracket in self.brackets]}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.opened = int(state["opened"])
        self.brackets = [self._bracket(data) for data in state["brackets"]]

    def _bracket(self, data: Mapping[str, Any]) -> Bracket:
        entries = [
            Entry(
                self._architecture(architecture),
                parent,
                trial,
                None if loss is None else number_from_json(loss, "state.loss"),
                *weights,  # absent in states without weights
            )
            for architecture, parent, trial, loss, *weights in data["entries"]
        ]
        return Bracket(int(data["number"]), int(data["rung"]), int(data["wanted"]), entries)


def _bracket_to_json(bracket: Bracket) -> dict[str, Any]:
    entries = [
        [
            *(e.architecture.to_json(), e.parent, e.trial, None if e.loss is None else number_to_json(e.loss)),
            *([] if e.weights is None else [e.weights]),
        ]
        for e in bracket.entries
    ]
    return {"number": bracket.number, "rung": bracket.rung, "wanted": bracket.wanted, "entries": entries}


def _checked(fidelities: Sequence[float | None]) -> tuple[float | None, ...]:
    rungs = tuple(fidelities) if isinstance(fidelities, Sequence) and not isinstance(fidelities, str) else ()
    numbers = [math.inf if rung is None else rung for rung in rungs]
    good = all(isinstance(n, int | float) and not isinstance(n, bool) and n > 0 for n in numbers)
    if not rungs or not good or None in rungs[:-1] or any(a >= b for a, b in pairwise(numbers)):
        raise UserError(
            "fidelities",
            fidelities,
            allowed="positive numbers that rise, the last one may be None for a full evaluation",
            hint="geometric_fidelities(lowest, highest, eta) makes them.",
        )
    return rungs


class SuccessiveHalving(Halving):
    """Starts ``width`` architectures at the lowest fidelity and promotes the best 1/eta, rung by rung.

    Args:
        space: Where to search.
        fidelities: Of the rungs, rising; the last may be None for a full evaluation.
        objectives: One.
        seed: Seed of the samples.
        width: Architectures that start; ``None`` for the least with which one reaches the top, eta ** (rungs - 1).
        brackets: How often it is done; ``None`` for ever.
        eta: One in so many is promoted.
        open_brackets: How many may be under way at once. With 1 the strategy waits for the last results of a rung.

    A rung's failures are never promoted. Memory is what is under way.

    Raises:
        UserError: Fidelities that do not rise, or a setting out of its range.
    """

    def __init__(
        self,
        space: Space,
        *,
        fidelities: Sequence[float | None],
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
        width: int | None = None,
        brackets: int | None = None,
        eta: float = 3.0,
        open_brackets: int = 1,
    ) -> None:
        super().__init__(
            space, fidelities=fidelities, objectives=objectives, seed=seed, eta=eta, open_brackets=open_brackets
        )
        for name, given in (("width", width), ("brackets", brackets)):
            if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
                raise UserError(name, given, allowed="an integer from 1, or None")
        self.width = math.ceil(eta ** (len(self.fidelities) - 1) - 1e-9) if width is None else width
        self.limit = brackets

    def _plan(self, number: int) -> tuple[int, int] | None:
        return (0, self.width) if self.limit is None or number < self.limit else None


class Hyperband(Halving):
    """Successive halving that starts at the lowest rung, then at the next, up to the top, and round again.

    Args:
        space: Where to search.
        fidelities: Of the rungs, rising; the last may be None for a full evaluation.
        objectives: One.
        seed: Seed of the samples.
        rounds: How often all brackets are run; ``None`` for ever.
        eta: One in so many is promoted.
        open_brackets: How many brackets may be under way at once. With 1 the strategy waits for the last results of a
            rung.

    With R rungs, the bracket that starts s rungs below the top starts ceil(R / (s + 1) * eta**s) architectures.

    Raises:
        UserError: Fidelities that do not rise, or a setting out of its range.
    """

    def __init__(
        self,
        space: Space,
        *,
        fidelities: Sequence[float | None],
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
        rounds: int | None = None,
        eta: float = 3.0,
        open_brackets: int = 1,
    ) -> None:
        super().__init__(
            space, fidelities=fidelities, objectives=objectives, seed=seed, eta=eta, open_brackets=open_brackets
        )
        self.rounds = checked_rounds(rounds)

    def _plan(self, number: int) -> tuple[int, int] | None:
        return hyperband_plan(number, len(self.fidelities), self.eta, self.rounds)


def hyperband_plan(number: int, rungs: int, eta: float, rounds: int | None) -> tuple[int, int] | None:
    """Return the first rung of Hyperband's bracket ``number`` and how many start there; ``None`` after the last."""
    if rounds is not None and number >= rounds * rungs:
        return None
    below = rungs - 1 - number % rungs
    return rungs - 1 - below, math.ceil(rungs / (below + 1) * eta**below - 1e-9)


def checked_rounds(rounds: int | None) -> int | None:
    """Return ``rounds``.

    Raises:
        UserError: Neither None nor an integer from 1.
    """
    if rounds is not None and (not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1):
        raise UserError("rounds", rounds, allowed="an integer from 1, or None")
    return rounds
