"""A search step whose weights also learn from a vote of the supernet's earlier selves.

Every earlier self is a pair of weights and logits as it was before a step, so the newest teacher of step ``t`` is the
supernet before step ``t - 1``, and the first step has none.

Source: Zhu, Li, Liu, Wang, arXiv 2302.05629.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from archsmith.core.errors import UserError
from archsmith.core.rng import seed_of
from archsmith.supernet.relaxed import RelaxedSupernet
from archsmith.supernet.teachers import Snapshot, TeacherQueue
from archsmith.supernet.updaters import Loss, Tensors
from archsmith.train.bilevel import Bilevel, Order, StepContext
from archsmith.train.distill import Vote, distillation, ramp, voted


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """How the earlier selves teach.

    Attributes:
        teachers: Earlier selves that are kept; 0 for none.
        weight: Of the distillation term; 0 for none.
        temperature: Of student and teachers.
        vote: How teachers are joined.
        ramp_steps: Steps over which the weight rises linearly from 0.
        every: An earlier self is kept every so many steps or epochs.
        unit: "step", or "epoch" (at its first step).
        logits_too: Whether the logits, too, learn from the vote, on their own batch.
    """

    teachers: int = 3
    weight: float = 0.5
    temperature: float = 2.0
    vote: Vote = "soft"
    ramp_steps: float = 0.0
    every: int = 1
    unit: Literal["step", "epoch"] = "step"
    logits_too: bool = False

    @property
    def happens(self) -> bool:
        """Whether anything differs from the plain step."""
        return self.teachers > 0 and self.weight > 0


class Taught(Bilevel):
    """The step of DARTS, whose loss for the weights has a distillation term.

    ``L = task loss + weight * temperature^2 * KL(vote || softmax(student / temperature))``. An unrolled gradient of the
    logits looks through a step on the task loss alone, as DARTS has it. Without teachers or weight it is ``Bilevel``,
    bit for bit.

    Args:
        order: How the gradient of the logits is taken.
        teaching: How the earlier selves teach.

    Raises:
        UserError: A negative number of teachers.
    """

    def __init__(self, order: Order, teaching: Teaching) -> None:
        super().__init__(order)
        if teaching.teachers < 0:
            raise UserError("teachers", teaching.teachers, allowed="an integer from 0")
        self.teaching = teaching
        self.queue = TeacherQueue(max(1, teaching.teachers))
        self._supernet: RelaxedSupernet | None = None
        self._seen: _Seen | None = None
        self._term = 0.0

    def begin_(self, supernet: RelaxedSupernet, optimizer: torch.optim.Optimizer, *, fresh: bool) -> None:
        """See ``Updater.begin_``; teachers stay over the phases of a search."""
        self._supernet = supernet

    def step(self, context: StepContext) -> dict[str, float]:
        """Take a step, and keep the supernet as it was before it; the figures have the term's value, too."""
        if not self.teaching.happens:
            return super().step(context)
        before = Snapshot.of(context.supernet, context.total) if self._due(context) else None
        self._term = 0.0
        with _watched(context.supernet.network) as self._seen:
            figures = super().step(self._with_taught_logits(context) if self.teaching.logits_too else context)
        self._seen = None
        if before is not None:
            self.queue.push(before)
        return {**figures, "distillation": self._term}

    def weight_loss(self, context: StepContext, loss: Tensor) -> Tensor:
        """Return the loss plus what the vote says about the same batch."""
        term = self._taught(context, "weights")
        if term is None:
            return loss
        self._term = float(term.detach())
        return loss + term

    def _taught(self, context: StepContext, name: str) -> Tensor | None:
        """Return the weighted term for the batch that the network saw last; None where nobody teaches yet."""
        weight = self.teaching.weight * ramp(context.total, self.teaching.ramp_steps)
        if weight == 0.0 or not len(self.queue):
            return None
        assert self._seen is not None
        inputs, student = self._seen.inputs, self._seen.output

        def generator(number: int) -> torch.Generator:
            return torch.Generator().manual_seed(seed_of(context.step.seed, "teacher", name, number, *context.where))

        answers = self.queue.logits(context.supernet, inputs, generator)
        vote = voted(answers, self.teaching.temperature, self.teaching.vote)
        return weight * distillation(student, vote, self.teaching.temperature)

    def _with_taught_logits(self, context: StepContext) -> StepContext:
        values = {field.name: getattr(context, field.name) for field in fields(context)}
        return _TaughtLogits(**values, updater=self)

    def _due(self, context: StepContext) -> bool:
        epoch, step = context.where
        if self.teaching.unit == "step":
            return context.total % self.teaching.every == 0
        return step == 0 and epoch % self.teaching.every == 0

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the queue."""
        return self.queue.state()

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue with the queue of a ``state``."""
        assert self._supernet is not None
        self.queue.load(self._supernet, tensors, state)


@dataclass(frozen=True, kw_only=True)
class _TaughtLogits(StepContext):
    """A context whose loss for the logits has the distillation term, too."""

    updater: Taught

    def logit_loss(self) -> tuple[Loss, dict[str, Tensor]]:
        """See ``StepContext.logit_loss``."""
        plain, metrics = super().logit_loss()

        def loss(weights: Tensors, logits: Tensors) -> Tensor:
            value = plain(weights, logits)
            term = self.updater._taught(self, "logits")
            return value if term is None else value + term

        return loss, metrics


@dataclass
class _Seen:
    """The last call of a network: what went in and what came out."""

    inputs: Tensor
    output: Tensor


@contextmanager
def _watched(network: nn.Module) -> Iterator[_Seen]:
    """Keep the last input and output of a network within the block."""
    seen = _Seen(torch.empty(0), torch.empty(0))

    def keep(module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        seen.inputs, seen.output = given[0], output

    handle = network.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
