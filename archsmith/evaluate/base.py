"""The contract of an evaluator: from a trial to a result; trained, one-shot, zero-cost, predictor, table alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from archsmith.space import Result, Trial

if TYPE_CHECKING:  # tables need no torch
    from torch import Tensor


@runtime_checkable
class WeightStore(Protocol):
    """Keeps trained weights under the digest of their content."""

    def put(self, tensors: Mapping[str, Tensor]) -> str:
        """Keep the tensors and return their key; the same content has the same key."""
        ...

    def get(self, key: str) -> dict[str, Tensor]:
        """Return the tensors of a key.

        Raises:
            KeyError: Nothing is kept under it.
        """
        ...


@runtime_checkable
class Evaluator(Protocol):
    """Turns a trial into a result; safe to send to another process when it pickles.

    ``metrics`` of an ok result are numbers by name ("valid_accuracy" as a fraction unless the evaluator's class says
    percent), ``costs`` follow ``archsmith.space.COSTS``, ``seconds`` is the time spent, measured or simulated.
    The evaluation depends on the trial (architecture, fidelity, seed, parent) and nothing else.
    """

    def evaluate(self, trial: Trial, *, weights: WeightStore | None = None) -> Result:
        """Evaluate one trial.

        Args:
            trial: What, at which fidelity, with which seed.
            weights: Where inherited weights are read and trained ones kept; None for neither.

        Raises:
            UserError: The architecture is not of the evaluator's space, or the fidelity is none it has. What goes wrong
                *inside* an evaluation (divergence, a crash of the candidate) is a failed ``Result``, not an exception.
        """
        ...
