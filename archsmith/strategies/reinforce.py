"""REINFORCE over decisions: tables of logits that follow the reward.

Williams 1992; as a searcher on a table: Dong and Yang 2020 (NAS-Bench-201, arXiv 2001.00326), whose settings are the
defaults: logits 1e-3 * normal, Adam, a bias-corrected moving average (0.9) of the reward as the baseline, updated
before it is subtracted. One step for each result:

    logits += Adam((reward - baseline) * d log p(architecture) + entropy_weight * d entropy)

What differs: tables that a walk did not meet are left alone, their moments too (with every table met in every walk, as
in a flat space, this is ordinary Adam).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space import Objective, Result, Space, Trial
from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy
from archsmith.strategies.policy import TablePolicy, entropy

STRATEGIES = (
    {
        "name": "reinforce",
        "class": "Reinforce",
        "title": "REINFORCE over tables of logits, one for each decision",
        "paper": "Williams 1992; arXiv 2001.00326",
        "extra": None,
    },
)


class Adam:
    """Adam (arXiv 1412.6980) ascending on named arrays, each with its own step count.

    Args:
        learning_rate: Step size.
        betas: Decay of the two moments.
        epsilon: Added to the root of the second moment.
    """

    def __init__(self, learning_rate: float, betas: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-8) -> None:
        self.learning_rate, self.betas, self.epsilon = learning_rate, betas, epsilon
        self.moments: dict[str, tuple[int, np.ndarray, np.ndarray]] = {}

    def ascend_(self, name: str, values: np.ndarray, gradient: np.ndarray) -> None:
        """Change ``values`` in place by one step along ``gradient``."""
        zero = np.zeros_like(values)
        step, first, second = self.moments.get(name, (0, zero, zero))
        step += 1
        first = self.betas[0] * first + (1 - self.betas[0]) * gradient
        second = self.betas[1] * second + (1 - self.betas[1]) * gradient**2
        self.moments[name] = (step, first, second)
        unbiased = first / (1 - self.betas[0] ** step)
        scale = np.sqrt(second / (1 - self.betas[1] ** step)) + self.epsilon
        values += self.learning_rate * unbiased / scale

    def state_dict(self) -> dict[str, Any]:
        """Return step counts and moments as plain JSON."""
        return {name: [step, m.tolist(), v.tolist()] for name, (step, m, v) in self.moments.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.moments = {name: (int(step), np.array(m), np.array(v)) for name, (step, m, v) in state.items()}


class Reinforce(Strategy):
    """Samples from a policy and moves it towards what was rewarded.

    Args:
        space: Where to search.
        objectives: One; the reward is its value, negated when it is minimised.
        seed: Seed of samples and initial logits.
        learning_rate: Of Adam; the published script's 0.5 suits rewards in percent on a short budget.
        baseline_decay: Decay of the moving average of rewards, in [0, 1).
        entropy_weight: Weight of the entropy of the visited tables, 0 for none.
        init_scale: Standard deviation of the initial logits.

    Failed results, and those without a finite value, teach nothing. With trials pending, a result moves the policy as
    it is when the result comes.

    Raises:
        UserError: A setting out of its range.
    """

    def __init__(
        self,
        space: Space,
        *,
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
        learning_rate: float = 0.5,
        baseline_decay: float = 0.9,
        entropy_weight: float = 0.0,
        init_scale: float = 1e-3,
    ) -> None:
        super().__init__(space, objectives=objectives, seed=seed)
        if not learning_rate > 0:
            raise UserError("learning_rate", learning_rate, allowed="a positive number")
        if not 0 <= baseline_decay < 1:
            raise UserError("baseline_decay", baseline_decay, allowed="a number in [0, 1)")
        if not entropy_weight >= 0 or not init_scale >= 0:
            raise UserError("entropy_weight, init_scale", (entropy_weight, init_scale), allowed="numbers from 0")
        self.policy = TablePolicy(space, seed=seed, init_scale=init_scale)
        self.adam = Adam(learning_rate)
        self.baseline_decay = baseline_decay
        self.entropy_weight = entropy_weight
        self.average, self.weight = 0.0, 0.0  # of past rewards; their quotient is free of the bias towards zero

    def _propose(self) -> Proposal:
        architecture, log_prob = self.policy.sample(self.rng)
        return Proposal(architecture, info={"log_prob": log_prob})

    def _learn(self, trial: Trial, result: Result) -> None:
        reward = -self._loss(result)
        if not math.isfinite(reward):
            return
        self.average = self.baseline_decay * self.average + (1 - self.baseline_decay) * reward
        self.weight = self.baseline_decay * self.weight + (1 - self.baseline_decay)
        advantage = reward - self.average / self.weight
        for part, index in self.policy.chosen(trial.architecture):
            probabilities = self.policy.probabilities(part)
            gradient = -advantage * probabilities  # of log p: one at the choice, minus the probabilities
            gradient[index] += advantage
            if self.entropy_weight:
                gradient += self.entropy_weight * entropy_gradient(probabilities)
            self.adam.ascend_(part.name, self.policy.table(part), gradient)

    def _state(self) -> dict[str, Any]:
        return {
            "policy": self.policy.state_dict(),
            "adam": self.adam.state_dict(),
            "average": self.average,
            "weight": self.weight,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.adam.load_state_dict(state["adam"])
        self.average, self.weight = float(state["average"]), float(state["weight"])


def entropy_gradient(probabilities: np.ndarray) -> np.ndarray:
    """Return the gradient of the entropy in the logits: -p (log p + entropy)."""
    logs = np.log(np.where(probabilities > 0, probabilities, 1.0))
    return -probabilities * (logs + entropy(probabilities))
