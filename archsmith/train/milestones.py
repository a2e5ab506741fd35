"""A training of unknown length: the learning rate falls where the validation loss no longer does, and then it ends.

Source: the schedule of all stages of ST-NAS, arXiv 2011.05649, as its released code has it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from archsmith.core.errors import UserError

Verdict = Literal["continue", "new best", "stop"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When a plateau is one.

    Attributes:
        lr: First learning rate.
        lr_stop: A decay below it ends the training instead; ``lr`` itself never decays.
        free_epochs: So many epochs at the beginning only note the smallest loss.
        look_ahead: Epochs without improvement, in all since the last one, from which on each epoch decays.
        gamma: Factor of a decay.
        min_improve: An improvement is more than this below the best loss. Losses of supernets are noisy, their paths
            being drawn: 0 would take luck for progress.

    Raises:
        UserError: A value is out of its bounds.
    """

    lr: float
    lr_stop: float
    free_epochs: int = 0
    look_ahead: int = 3
    gamma: float = 0.1
    min_improve: float = 0.5

    def __post_init__(self) -> None:
        for name, fine, allowed in (
            ("lr", self.lr > 0, "a number above 0"),
            ("lr_stop", 0 < self.lr_stop <= self.lr, f"above 0, at most lr = {self.lr:g}"),
            ("free_epochs", self.free_epochs >= 0, "0 or more"),
            ("look_ahead", self.look_ahead >= 1, "1 or more"),
            ("gamma", 0 < self.gamma < 1, "between 0 and 1"),
            ("min_improve", self.min_improve >= 0, "0 or more"),
        ):
            if not fine:
                raise UserError(name, getattr(self, name), allowed=allowed)


class Milestones:
    """The state of one such training.

    Args:
        rule: Stays as it is, and goes into the checkpoint too: a run that is resumed stops by the rule it began with.

    Attributes:
        lr: Learning rate of the next epoch.
        epoch: Epochs told so far.
        best: Loss that is to be improved upon; infinite before there is any.
        bad: Epochs without improvement since the last one; a decay does not reset it.
        stopped: Whether it is over.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.lr = rule.lr
        self.epoch = 0
        self.best = math.inf
        self.bad = 0
        self.stopped = False

    def tell(self, loss: float) -> Verdict:
        """Take in an epoch's validation loss and set the learning rate of the next one.

        Returns:
            "new best": this epoch's weights are those to keep. "stop": the training is over. Else "continue".

        Raises:
            UserError: The loss is NaN, or the training was over already.
        """
        if math.isnan(loss) or self.stopped:
            raise UserError("loss", loss, allowed="a number, and none behind the end of a training")
        self.epoch += 1
        if self.epoch <= self.rule.free_epochs:
            self.best = min(self.best, loss)
            return "continue"
        if loss < self.best - self.rule.min_improve:
            self.best, self.bad = loss, 0
            return "new best"
        self.bad += 1
        if self.bad < self.rule.look_ahead:
            return "continue"
        lower = self.lr * self.rule.gamma
        if lower < self.rule.lr_stop * (1 - 1e-9):  # rounding of gamma's powers is no decay
            self.stopped = True
            return "stop"
        self.lr = lower
        return "continue"

    def state(self) -> dict[str, Any]:
        """Return everything as JSON values, the rule included."""
        return {
            "rule": asdict(self.rule),
            "lr": self.lr,
            "epoch": self.epoch,
            "best": None if math.isinf(self.best) else self.best,
            "bad": self.bad,
            "stopped": self.stopped,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Milestones:
        """Return the training that ``state`` described, rule included."""
        restored = cls(Rule(**state["rule"]))
        restored.lr, restored.epoch, restored.bad = state["lr"], state["epoch"], state["bad"]
        restored.best = math.inf if state["best"] is None else state["best"]
        restored.stopped = state["stopped"]
        return restored
