"""Any strategy for one objective, on a constrained or scalarised problem.

The wrapped strategy sees one metric, the formulation's score of a result, and knows nothing of costs or limits. What a
formulation rejects is told as infeasible. A Lagrangian's multipliers move with every result in the order of ``tell``;
scores that were told before are not told again, so a strategy with a long memory compares scores of different
multipliers (policies and small populations forget them).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from archsmith.core.errors import UserError
from archsmith.space import Objective, Result, Space, Trial
from archsmith.space.formulations import Formulation
from archsmith.strategies.base import Proposal, Strategy

STRATEGIES = (
    {
        "name": "scalarised",
        "class": "Scalarised",
        "title": "Any single-objective strategy under limits, or on a weighted sum, product or Chebyshev distance",
        "paper": "2101.09336",
        "extra": None,
    },
)

SCORE = Objective("score")
"""The one metric that the wrapped strategy sees, larger is better."""


class MakeInner(Protocol):
    """Makes the wrapped strategy: a class of a strategy is one, ``functools.partial`` adds settings."""

    def __call__(self, space: Space, *, objectives: Sequence[Objective], seed: int) -> Strategy:
        """Return the strategy."""
        ...


class Scalarised(Strategy):
    """Searches with another strategy on the scores of a formulation.

    Args:
        space: Where to search.
        formulation: Turns a result into one number (``archsmith.space.formulations``).
        inner: Makes the wrapped strategy, ``RegularizedEvolution``, say.
        seed: Seed of the wrapped strategy.

    Attributes:
        formulation: As it is now: a Lagrangian's multipliers move.
        inner: The wrapped strategy. Trials have the same ids inside and outside.

    ``objectives`` are the formulation's, so that reports speak of accuracies and costs, not of scores; the first of
    them alone does not say which trial is best. ``archsmith.methods.hw_nas_survey.optimum`` does.

    Example:
        >>> from archsmith.families.cell_spaces import nas_bench_201_space
        >>> from archsmith.space.formulations import Rejected, at_most
        >>> from archsmith.strategies import LocalSearch
        >>> problem = Rejected(objective=Objective("valid_accuracy"), limits=(at_most("latency", 5.0),))
        >>> strategy = Scalarised(nas_bench_201_space(), formulation=problem, inner=LocalSearch)
        >>> (trial,) = strategy.ask()
        >>> strategy.tell(trial.id, Result(metrics={"valid_accuracy": 91.0}, costs={"latency": 4.2}))
    """

    objectives_allowed = None

    def __init__(self, space: Space, *, formulation: Formulation, inner: MakeInner, seed: int = 0) -> None:
        super().__init__(space, objectives=formulation.objectives, seed=seed)
        self.formulation = formulation
        self.inner = inner(space, objectives=(SCORE,), seed=seed)
        if self.inner.space is not space or self.inner.objectives != (SCORE,) or self.inner.asked:
            raise UserError("inner", self.inner, allowed="a fresh strategy with the space and objectives it was given")
        self.repeats = self.inner.repeats

    @property
    def done(self) -> bool:
        """Whether the wrapped strategy is done."""
        return self.inner.done

    def _propose(self) -> Proposal | None:
        trials = self.inner.ask()
        if not trials:
            return None
        (trial,) = trials
        return Proposal(trial.architecture, trial.fidelity, trial.parent, trial.info)

    def _learn(self, trial: Trial, result: Result) -> None:
        self.inner.tell(trial.id, self.scored(result))
        self.formulation = self.formulation.after(result)

    def scored(self, result: Result) -> Result:
        """Return what the wrapped strategy is told of a result: one metric, the score as it is now."""
        if result.status == "failed":
            return result
        score = self.formulation.score(result)
        if score == -math.inf:
            return Result.infeasible("the formulation rejects it", costs=result.costs)
        if result.status == "infeasible":
            return result
        return replace(result, metrics={SCORE.metric: score})

    def _state(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "formulation": list(self.formulation.state)}

    def _load(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.formulation = self.formulation.with_state(state["formulation"])
