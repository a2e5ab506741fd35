"""The contract of a strategy: ``ask`` for trials, ``tell`` their results.

A strategy decides *what* to evaluate next. It knows a space and objectives, no networks and no torch; who evaluates,
where and how long is somebody else's business. Everything a strategy draws comes from its own stream, so that the same
seed and the same results give the same trials, and ``state_dict`` is all it takes to go on elsewhere.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from archsmith.core.errors import UserError
from archsmith.core.rng import numpy_stream, seed_of
from archsmith.space import Architecture, Objective, Result, Space, Trial

STATE_VERSION = 1
"""Of ``state_dict``; newer code reads older states."""

DEFAULT_OBJECTIVE = Objective("valid_accuracy")


@dataclass(frozen=True)
class Proposal:
    """What a strategy wants evaluated, before it has a number.

    Attributes:
        architecture: A valid point of the space.
        fidelity: How much of a full evaluation, None for full (``Trial.fidelity``).
        parent: Id of the trial that it continues or inherits from.
        info: The strategy's own notes: plain finite JSON.
    """

    architecture: Architecture
    fidelity: float | None = None
    parent: int | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


class Strategy(ABC):
    """Base of all strategies; final classes implement ``_propose`` and, where they learn, ``_learn`` and the state.

    Args:
        space: Where to search.
        objectives: What to improve, at least one; most strategies take exactly one and say so.
        seed: Seed of everything the strategy draws, and of the trials' own seeds.

    Trials are numbered from 1 in the order of ``ask``. A strategy keeps pending trials and what it needs to decide,
    never more: memory does not grow with the length of a search unless the strategy is a model of all it has seen.

    Raises:
        UserError: No objective, or more than the strategy can take.
    """

    repeats: bool = True
    """Whether an architecture may be proposed more than once at the same fidelity."""

    learns: ClassVar[bool] = True
    """Whether results change what is asked next; such a strategy is expected to beat random search on an easy space."""

    objectives_allowed: ClassVar[int | None] = 1
    """Largest number of objectives, None for any number."""

    def __init__(self, space: Space, *, objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,), seed: int = 0) -> None:
        self.space = space
        self.objectives = tuple(objectives)
        limit = self.objectives_allowed
        if not self.objectives or (limit is not None and len(self.objectives) > limit):
            allowed = "at least one Objective" if limit is None else f"1 to {limit} for {type(self).__name__}"
            raise UserError("objectives", [each.metric for each in self.objectives], allowed=allowed)
        self.seed = seed
        self.rng = numpy_stream(seed, "strategy", type(self).__name__)
        self.asked = 0
        self.told = 0
        self.pending: dict[int, Trial] = {}

    @property
    def objective(self) -> Objective:
        """The first objective."""
        return self.objectives[0]

    def ask(self, n: int = 1) -> list[Trial]:
        """Return up to ``n`` new trials; fewer, or none, when the strategy has to wait for results or has no more.

        Raises:
            UserError: ``n`` is not a positive integer.
        """
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise UserError("ask(n)", n, allowed="an integer from 1")
        trials: list[Trial] = []
        while len(trials) < n and (proposal := self._propose()) is not None:
            self.asked += 1
            trial = Trial(
                id=self.asked,
                architecture=proposal.architecture,
                fidelity=proposal.fidelity,
                parent=proposal.parent,
                seed=seed_of(self.seed, "trial", self.asked) >> 31,  # 32 bits: what every library takes as a seed
                info=proposal.info,
            )
            self.pending[trial.id] = trial
            trials.append(trial)
        return trials

    def tell(self, trial_id: int, result: Result) -> None:
        """Take in the result of a pending trial; failed and infeasible results are results.

        Results may be told in any order; strategies that promise reproducible searches need them in the order of
        ``ask``.

        Raises:
            UserError: No pending trial has this id (never asked, or told already).
        """
        if trial_id not in self.pending:
            why = "told already" if 1 <= trial_id <= self.asked else "never asked"
            raise UserError(
                "trial_id",
                trial_id,
                allowed=f"a pending trial, one of {sorted(self.pending)[:8]}",
                hint=f"It was {why}.",
            )
        trial = self.pending.pop(trial_id)
        self.told += 1
        self._learn(trial, result)

    @property
    def done(self) -> bool:
        """Whether no further trial will ever be asked (a grid that is through); False while that is unknown."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the complete state as plain JSON; with the constructor's arguments it restores the strategy."""
        return {
            "version": STATE_VERSION,
            "kind": type(self).__name__,
            "rng": self.rng.bit_generator.state,
            "asked": self.asked,
            "told": self.told,
            "pending": [trial.to_json() for trial in self.pending.values()],
            "own": self._state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict`` of a strategy made with the same arguments.

        Raises:
            UserError: The state is another strategy's, or of a newer version.
        """
        if state.get("kind") != type(self).__name__:
            raise UserError("state.kind", state.get("kind"), allowed=f"{type(self).__name__!r}")
        if not isinstance(version := state.get("version"), int) or not 1 <= version <= STATE_VERSION:
            raise UserError("state.version", version, allowed=f"1 to {STATE_VERSION}")
        self.rng.bit_generator.state = state["rng"]
        self.asked, self.told = int(state["asked"]), int(state["told"])
        trials = [self._restored(Trial.from_json(row)) for row in state["pending"]]
        self.pending = {trial.id: trial for trial in trials}
        self._load(state["own"])

    def _restored(self, trial: Trial) -> Trial:
        """Give a trial's architecture back its space (a canonical form cannot follow through JSON)."""
        return replace(trial, architecture=self.space.validate(trial.architecture))

    def _architecture(self, data: Mapping[str, Any]) -> Architecture:
        """Return the architecture of the space that ``to_json`` wrote into a state."""
        return self.space.validate(Architecture.from_json(data))

    def _loss(self, result: Result, objective: Objective | None = None) -> float:
        """Return what is to be minimised: the objective, negated where larger is better; NaN when there is none."""
        objective = self.objective if objective is None else objective
        value = objective.value(result)
        return -value if objective.direction == "maximize" else value

    @abstractmethod
    def _propose(self) -> Proposal | None:
        """Return what to evaluate next, or None to wait for results (or for ever)."""

    def _learn(self, trial: Trial, result: Result) -> None:  # noqa: B027
        """Take in a result; nothing to do for strategies that do not learn."""

    def _state(self) -> dict[str, Any]:
        """Return the strategy's own state as plain JSON."""
        return {}

    def _load(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore what ``_state`` returned."""
