"""Training with a second classifier in the middle of the network."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from archsmith.tasks.base import Batch, Forward, Task


@runtime_checkable
class AuxiliaryNetwork(Protocol):
    """A network that may have an auxiliary head."""

    @property
    def auxiliary(self) -> Any:
        """The head, or None."""

    def forward_with_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the logits and those of the head, None without one."""


class WithAuxiliary(Task):
    """A task whose loss has the auxiliary head's loss added; all else is the task's own.

    Args:
        task: The task.
        network: Whose auxiliary head takes part; one without a head changes nothing.
        weight: Factor of its loss.
    """

    def __init__(self, task: Task, network: AuxiliaryNetwork, weight: float) -> None:
        self.task, self.network, self.weight = task, network, weight
        for name in Task.__annotations__:
            setattr(self, name, getattr(task, name))

    def loss(self, forward: Forward, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the task's loss of both heads, on the same augmented images, and the metrics of the main one."""
        if self.network.auxiliary is None or not self.weight:
            return self.task.loss(forward, batch, generator)
        before, seconds = generator.get_state(), list[Tensor]()

        def both(inputs: Tensor) -> Tensor:
            logits, second = self.network.forward_with_auxiliary(inputs)
            assert second is not None
            seconds.append(second)
            return logits

        loss, metrics = self.task.loss(both, batch, generator)
        after = generator.get_state()
        generator.set_state(before)  # the same augmentation again, so that the targets fit
        extra, _ = self.task.loss(lambda inputs: seconds.pop(0), batch, generator)
        generator.set_state(after)
        return loss + self.weight * extra, metrics

    def size(self, split: str) -> int:
        """Return the task's own answer."""
        return self.task.size(split)

    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the task's own answer."""
        return self.task.steps_per_epoch(batch_size)

    def batches(self, split: str, **options: Any) -> Any:
        """Return the task's own batches."""
        return self.task.batches(split, **options)

    def evaluate(self, forward: Forward, split: str, *, batch_size: int = 256) -> dict[str, float | int]:
        """Return the task's own scores."""
        return self.task.evaluate(forward, split, batch_size=batch_size)

    def plain_inputs(self, n: int = 1) -> Tensor:
        """Return the task's own inputs."""
        return self.task.plain_inputs(n)

    def examples(self, n: int, split: str = "test") -> Tensor:
        """Return the task's own examples."""
        return self.task.examples(n, split)
