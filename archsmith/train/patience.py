"""When to lower the learning rate and when to stop: patience, as a pure state machine.

On an improvement both counters start again; after ``rate_patience`` bad epochs the rate is multiplied and its counter
starts again; after ``stop_patience`` bad epochs, or when the time is over, training ends.

Source: Negrinho and Gordon 2017, "DeepArchitect", arXiv 1704.08792 (the evaluator).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from archsmith.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Patience:
    """The rule.

    Args:
        rate_patience: Epochs without improvement after which the rate is lowered.
        rate_mult: Factor of the rate then, in (0, 1].
        rate_min: The rate never becomes smaller.
        stop_patience: Epochs without improvement after which training stops.
        seconds: Training stops at the first epoch that ends later; None for no limit.

    Rates are counted in factors: the rule gives what the recipe's own rate is multiplied by, but the floor is absolute.
    The published search tunes the first two and has ``stop_patience`` 64 and ``rate_min`` 1e-9.

    Raises:
        UserError: A value out of its range.
    """

    rate_patience: int = 8
    rate_mult: float = 0.5
    rate_min: float = 1e-9
    stop_patience: int = 64
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("rate_patience", "stop_patience"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"patience.{name}", value, allowed="an integer from 1")
        if not 0 < self.rate_mult <= 1:
            raise UserError("patience.rate_mult", self.rate_mult, allowed="a factor above 0, at most 1")
        if not (0 <= self.rate_min < math.inf):
            raise UserError("patience.rate_min", self.rate_min, allowed="a learning rate from 0")
        if self.seconds is not None and not self.seconds > 0:
            raise UserError("patience.seconds", self.seconds, allowed="a number above 0, or None for no limit")

    def start(self, rate: float) -> PatienceState:
        """Return the state before the first epoch at a learning rate."""
        return PatienceState(rate=rate)

    def after_epoch(self, state: PatienceState, score: float, *, seconds: float = 0.0) -> PatienceState:
        """Return the state after one more epoch.

        Args:
            state: Before it.
            score: Validation accuracy, or anything else where more is better; NaN never improves.
            seconds: Training time up to now.
        """
        if score > state.best:
            after = replace(state, best=score, best_epoch=state.epochs, bad_for_rate=0, bad_for_stop=0)
        else:
            after = replace(state, bad_for_rate=state.bad_for_rate + 1, bad_for_stop=state.bad_for_stop + 1)
        if after.bad_for_rate >= self.rate_patience:
            floor = min(self.rate_min, after.rate)  # a rate that starts below the floor is not raised
            after = replace(after, rate=max(after.rate * self.rate_mult, floor), bad_for_rate=0)
        reason = ""
        if after.bad_for_stop >= self.stop_patience:
            reason = f"no improvement in {self.stop_patience} epochs"
        elif self.seconds is not None and seconds >= self.seconds:
            reason = f"the time limit of {self.seconds:g} s"
        return replace(after, epochs=state.epochs + 1, stopped=reason)


@dataclass(frozen=True, kw_only=True)
class PatienceState:
    """Where a training stands.

    Attributes:
        rate: Present learning rate.
        best: Best score so far, minus infinity before the first.
        best_epoch: Epoch of the best score, from 0; -1 before.
        epochs: Epochs done.
        bad_for_rate: Epochs since the last improvement or lowering.
        bad_for_stop: Epochs since the last improvement.
        stopped: Why training ends, empty while it goes on.
    """

    rate: float
    best: float = -math.inf
    best_epoch: int = -1
    epochs: int = 0
    bad_for_rate: int = 0
    bad_for_stop: int = 0
    stopped: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain finite values (``best`` is None before the first epoch); ``from_json`` is the way back."""
        values = dict(vars(self))
        return {**values, "best": None if self.best == -math.inf else self.best}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> PatienceState:
        """Return the state that ``to_json`` wrote."""
        return cls(**{**data, "best": -math.inf if data["best"] is None else data["best"]})
