"""REINFORCE and proximal policy optimisation with the recurrent controller: the search of NASNet.

Each batch of finished architectures moves the controller (``archsmith.strategies.controller``) up the gradient of

    REINFORCE   mean_b A_b log p(b) + w H            (Williams 1992)
    PPO         mean_b min(r_b A_b, clip(r_b, 1 - e, 1 + e) A_b) + w H,   r_b = p_new(b) / p_old(b)   (arXiv 1707.06347)

by Adam. The advantage is ``A = R - b``; b is an exponential moving average of the rewards before this batch.

Source: Zoph et al., arXiv 1707.07012, appendix A: PPO, learning rate 3.5e-4, entropy bonus 1e-5, average with decay
0.95, batches of 20. Not stated there and chosen here: the clip range (0.2), the number of updates for each batch (1),
Adam, and that the average starts at the mean of the first batch.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Objective, Result, Space, Trial
from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy
from archsmith.strategies.controller import Adam, Controller

STRATEGIES = (
    {
        "name": "ppo",
        "class": "PPO",
        "title": "Proximal policy optimisation of a recurrent controller",
        "paper": "arXiv 1707.07012",
        "extra": None,
    },
    {
        "name": "reinforce-controller",
        "class": "ReinforceController",
        "title": "REINFORCE with a recurrent controller",
        "paper": "arXiv 1611.01578",
        "extra": None,
    },
)


def clipped_surrogate(ratios: np.ndarray, advantages: np.ndarray, clip: float) -> np.ndarray:
    """Return ``min(r A, clip(r, 1 - e, 1 + e) A)``, to be maximised; any shape."""
    return np.minimum(ratios * advantages, np.clip(ratios, 1.0 - clip, 1.0 + clip) * advantages)


def surrogate_slopes(ratios: np.ndarray, advantages: np.ndarray, clip: float) -> np.ndarray:
    """Return the derivative of ``clipped_surrogate`` by the new log-probability: ``r A``, or 0 where it is clipped."""
    open_ = ratios * advantages <= np.clip(ratios, 1.0 - clip, 1.0 + clip) * advantages
    return np.where(open_, ratios * advantages, 0.0)


def moved_baseline(baseline: float, rewards: Sequence[float], decay: float) -> float:
    """Return the exponential moving average after ``rewards``, one by one in their order."""
    for reward in rewards:
        baseline = decay * baseline + (1.0 - decay) * reward
    return baseline


class _ControllerSearch(Strategy):
    """What both have in common: sampling, rewards, batches, the baseline, the state."""

    def __init__(
        self,
        space: Space,
        *,
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
        learning_rate: float = 3.5e-4,
        entropy_weight: float = 1e-5,
        baseline_decay: float = 0.95,
        batch: int = 20,
        units: int = 100,
    ) -> None:
        super().__init__(space, objectives=objectives, seed=seed)
        for name, value in (("learning_rate", learning_rate), ("entropy_weight", entropy_weight)):
            if not (value >= 0 and math.isfinite(value)):
                raise UserError(name, value, allowed="a number from 0")
        if not 0 <= baseline_decay < 1:
            raise UserError("baseline_decay", baseline_decay, allowed="a number from 0, below 1")
        _positive("batch", batch)
        self.entropy_weight, self.baseline_decay, self.batch = entropy_weight, baseline_decay, batch
        self.controller = Controller(space, seed=seed, units=units)
        self.optimizer = Adam(learning_rate)
        self.baseline: float | None = None
        self.worst: float | None = None
        self.finished: list[tuple[Architecture, float, float]] = []
        self.updates = 0

    def _propose(self) -> Proposal:
        architecture, logs = self.controller.draw(self.rng)
        info = {"log_prob": math.fsum(logs), "log_probs": logs, "updates": self.updates}
        return Proposal(architecture, info=info)

    def _learn(self, trial: Trial, result: Result) -> None:
        value = self.objective.value(result)
        if math.isfinite(value):
            reward = value if self.objective.direction == "maximize" else -value
            self.worst = reward if self.worst is None else min(self.worst, reward)
        elif self.worst is not None:
            reward = self.worst
        else:
            return  # nothing is known yet that this could be worse than
        self.finished.append((trial.architecture, float(trial.info["log_prob"]), reward))
        if len(self.finished) >= self.batch:
            batch, self.finished = self.finished[: self.batch], self.finished[self.batch :]
            self._update(batch)

    def _update(self, batch: Sequence[tuple[Architecture, float, float]]) -> None:
        """Move the controller by one batch of (architecture, log-probability when sampled, reward)."""
        rewards = [reward for _, _, reward in batch]
        baseline = math.fsum(rewards) / len(rewards) if self.baseline is None else self.baseline
        advantages = np.array(rewards) - baseline
        self.baseline = moved_baseline(baseline, rewards, self.baseline_decay)
        steps = [self.controller.steps(architecture) for architecture, _, _ in batch]
        self._climb(steps, np.array([log_prob for _, log_prob, _ in batch]), advantages)
        self.updates += 1

    @abstractmethod
    def _climb(self, steps: list[Any], old_log_probs: np.ndarray, advantages: np.ndarray) -> None:
        """Change the controller's weights along the gradient of the class's objective."""

    def _ascend(self, scored: Any, slopes: np.ndarray) -> None:
        """Make one step of Adam, given the derivative of each architecture's term by its log-probability."""
        size = len(slopes)
        gradient = self.controller.gradient(scored, slopes / size, self.entropy_weight / size)
        self.optimizer.ascend_(self.controller.weights, gradient)
        self.controller.changed_()

    def _state(self) -> dict[str, Any]:
        return {
            "controller": self.controller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "baseline": self.baseline,
            "worst": self.worst,
            "finished": [[architecture.to_json(), log, reward] for architecture, log, reward in self.finished],
            "updates": self.updates,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self.controller.load_state_dict(state["controller"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.baseline, self.worst, self.updates = state["baseline"], state["worst"], int(state["updates"])
        self.finished = [
            (self.space.validate(Architecture.from_json(architecture)), float(log), float(reward))
            for architecture, log, reward in state["finished"]
        ]


class ReinforceController(_ControllerSearch):
    """REINFORCE with the recurrent controller.

    Args:
        space: Where to search.
        objectives: One.
        seed: Seed of weights and samples.
        learning_rate: Of Adam.
        entropy_weight: w, factor of the entropy bonus.
        baseline_decay: Decay of the average reward, per finished architecture.
        batch: Finished architectures for one update.
        units: Width of the LSTM.

    ``Trial.info`` has ``log_prob``, ``log_probs`` (of each decision) and ``updates`` (of the controller so far). A
    failed or infeasible trial, or one whose metric is not finite, has the lowest reward seen so far; before there is
    any it teaches nothing. Memory is constant, but for pending trials.

    Raises:
        UserError: A setting out of its range, or more than one objective.
    """

    def _climb(self, steps: list[Any], old_log_probs: np.ndarray, advantages: np.ndarray) -> None:
        self._ascend(self.controller.score(steps), advantages)


class PPO(_ControllerSearch):
    """Proximal policy optimisation of the recurrent controller, as NASNet searches.

    Args:
        space: Where to search.
        objectives: One.
        seed: Seed of weights and samples.
        learning_rate: Of Adam.
        entropy_weight: w, factor of the entropy bonus.
        baseline_decay: Decay of the average reward, per finished architecture.
        batch: Finished architectures for one batch.
        units: Width of the LSTM.
        clip: e, how far the ratio may leave 1 before it stops counting.
        updates_per_batch: Steps on each batch, all against the probabilities at the time of sampling.

    Trials, failures and memory are as for ``ReinforceController``. Results may come late: the ratio compares with the
    log-probability that the trial carries.

    Raises:
        UserError: A setting out of its range, or more than one objective.
    """

    def __init__(
        self,
        space: Space,
        *,
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
        learning_rate: float = 3.5e-4,
        entropy_weight: float = 1e-5,
        baseline_decay: float = 0.95,
        batch: int = 20,
        units: int = 100,
        clip: float = 0.2,
        updates_per_batch: int = 1,
    ) -> None:
        super().__init__(
            space,
            objectives=objectives,
            seed=seed,
            learning_rate=learning_rate,
            entropy_weight=entropy_weight,
            baseline_decay=baseline_decay,
            batch=batch,
            units=units,
        )
        if not 0 < clip < 1:
            raise UserError("clip", clip, allowed="a number above 0, below 1")
        _positive("updates_per_batch", updates_per_batch)
        self.clip, self.updates_per_batch = clip, updates_per_batch

    def _climb(self, steps: list[Any], old_log_probs: np.ndarray, advantages: np.ndarray) -> None:
        for _ in range(self.updates_per_batch):
            scored = self.controller.score(steps)
            ratios = np.exp(scored.log_probs_B - old_log_probs)
            self._ascend(scored, surrogate_slopes(ratios, advantages, self.clip))


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(name, value, allowed="an integer from 1")
