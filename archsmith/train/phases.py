"""Trainings in consecutive phases, as pruning methods have them (train, regularise, prune; pretrain, score, finetune).

A phase is a name and a length; what it means (which tensors are trained, which penalty is on) belongs to the method.
The schedule is a pure function of the epoch: it has no state, so a resumed run asks it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from archsmith.core.errors import UserError


@dataclass(frozen=True)
class Phase:
    """One part of a training.

    Attributes:
        name: As the method calls it.
        epochs: Its length; 0 leaves it out, None has no end (only the last phase).
        trains: Groups of tensors that learn in it, by the method's names ("weights", "scores", "alphas"); the others
            are frozen.
    """

    name: str
    epochs: int | None
    trains: tuple[str, ...] = ("weights",)


class PhaseSchedule:
    """Phases in their order.

    Args:
        phases: At least one; names differ.

    Raises:
        UserError: No phase, a name twice, a negative length, or an endless phase that is not the last.

    Example:
        >>> schedule = PhaseSchedule([Phase("train", 3), Phase("regularise", 4), Phase("prune", None)])
        >>> [schedule.at(epoch).name for epoch in (0, 3, 7, 99)]
        ['train', 'regularise', 'prune', 'prune']
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        names = [phase.name for phase in phases]
        if not phases or len({*names}) < len(names):
            raise UserError("phases", names, allowed="one or more phases with different names")
        for phase in phases[:-1]:
            if phase.epochs is None:
                raise UserError(f"phases.{phase.name}", None, allowed="a length; only the last phase may be endless")
        for phase in phases:
            if phase.epochs is not None and phase.epochs < 0:
                raise UserError(f"phases.{phase.name}", phase.epochs, allowed="a number of epochs from 0")
        self.phases = tuple(phases)
        self._starts = (0, *accumulate(phase.epochs or 0 for phase in phases[:-1]))

    @property
    def epochs(self) -> int | None:
        """Length of all phases together, None when the last is endless."""
        last = self.phases[-1].epochs
        return None if last is None else self._starts[-1] + last

    def start(self, name: str) -> int:
        """Return the first epoch of a phase, counted from 0.

        Raises:
            UserError: There is no such phase.
        """
        for phase, start in zip(self.phases, self._starts, strict=True):
            if phase.name == name:
                return start
        raise UserError("phase", name, allowed=", ".join(phase.name for phase in self.phases))

    def at(self, epoch: int) -> Phase:
        """Return the phase of an epoch (from 0); after the end it is the last one that has a length."""
        reached = [
            phase
            for phase, start in zip(self.phases, self._starts, strict=True)
            if start <= epoch and phase.epochs != 0
        ]
        return reached[-1] if reached else self.phases[-1]

    def __iter__(self) -> Iterator[Phase]:
        return iter(self.phases)
