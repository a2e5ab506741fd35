"""The interface of every task: batches, the training step's loss, the evaluation.

A task owns the data and the loss; it knows no network. Networks enter as ``forward``, any callable from inputs to
outputs, so that a plain module, a supernet with an active path and an exported file are all served alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from archsmith.core.errors import UserError

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's examples.

    Attributes:
        inputs: Network inputs; for images float32 ``(B, C, H, W)``, normalised; for text int64 ``(B, T)``.
        targets: What is to be predicted; for classification int64 ``(B,)`` in ``0..num_classes-1``.
        context: Side information by name (lengths, masks, edge lists); read only.
    """

    inputs: Tensor
    targets: Tensor
    context: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on ``device``; tensors in ``context`` move along."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.context.items()}
        return Batch(self.inputs.to(device), self.targets.to(device), MappingProxyType(moved))


class Task(ABC):
    """What is to be learned.

    Attributes:
        name: Name as given to ``open_task``, or chosen by the user.
        kind: What families must be for, ``"images"``, ``"speech"`` or ``"text"``.
        input_shape: ``(C, H, W)`` of one example; for speech planes of features, bands and frames; for text ``(T,)``.
        num_classes: Number of classes.
        class_names: One name per class, in the order of the labels.
        metric: Name of the metric that ``evaluate`` returns and searches maximise, ``"accuracy"``.
        digest: SHA-256 in hexadecimal digits; equal digests mean equal data and equal split.
        normalisation: ``{"mean": [...], "std": [...]}`` per channel: an input is ``(x - mean) / std`` for ``x`` in
            [0, 1]; empty lists for text.
        splits: Names of the parts the task has: ``("train", "valid")``, mostly with ``"test"`` as the third.
        resume_note: What a resumed run cannot reproduce, as a sentence for the user; empty when resuming is exact.
    """

    name: str
    kind: str = "images"
    input_shape: tuple[int, ...]
    num_classes: int
    class_names: tuple[str, ...]
    metric: str
    digest: str
    normalisation: Mapping[str, list[float]]
    splits: tuple[str, ...]
    resume_note: str

    @abstractmethod
    def size(self, split: str) -> int:
        """Return the number of examples of a split.

        Raises:
            UserError: The task has no such split.
        """

    @abstractmethod
    def steps_per_epoch(self, batch_size: int) -> int:
        """Return the number of training batches of one epoch, at least 1.

        Raises:
            UserError: ``batch_size`` is not positive, or larger than the training part.
        """

    @abstractmethod
    def batches(self, split: str, *, batch_size: int, seed: int = 0, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Return an iterator over the batches of one pass.

        Args:
            split: ``"train"``: shuffled by ``(seed, epoch)``, a last incomplete batch is dropped. Others: in order, all
                examples, the last batch may be smaller.
            batch_size: Examples per batch.
            seed: Seed of the run.
            epoch: Number of the epoch, from 0.
            start: First step to return: ``start=k`` gives exactly what is left after ``k`` batches.

        Raises:
            UserError: An argument is out of its range; raised by the call itself, not by the first ``next``.
        """

    @abstractmethod
    def loss(self, forward: Forward, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Run one training step forwards.

        Args:
            forward: Called once or more with (augmented) inputs.
            batch: One batch of ``batches("train")``, on the network's device.
            generator: Source of all randomness; how much is drawn depends on the batch's shape, never on its values.

        Returns:
            The loss, a differentiable scalar, and detached scalar metrics, ``"accuracy"`` among them.
        """

    @abstractmethod
    def evaluate(self, forward: Forward, split: str, *, batch_size: int = 256) -> dict[str, float | int]:
        """Score ``forward`` on all examples of a split, without gradients and without augmentation.

        The caller puts its network into evaluation mode and counts reads of ``"test"``.

        Returns:
            ``{"accuracy": float in [0, 1], "loss": mean cross-entropy, "examples": int}``.
        """

    @property
    def image(self) -> tuple[int, int, int]:
        """The shape of an example with three axes.

        Raises:
            UserError: Examples have others: what asks is made for images.
        """
        if len(self.input_shape) != 3:
            raise UserError("task", self.name, allowed=f"a task of images; examples of {self.kind} are other inputs")
        channels, height, width = self.input_shape
        return channels, height, width

    def plain_inputs(self, n: int = 1) -> Tensor:
        """Return ``n`` inputs of the task's shape and type whose values mean nothing, to count and to time with."""
        return torch.zeros(n, *self.input_shape)

    @abstractmethod
    def examples(self, n: int, split: str = "test") -> Tensor:
        """Return the first ``n`` inputs of a split, ``(n, *input_shape)``, as ``batches`` gives them.

        Raises:
            UserError: ``n`` is not in 1..``size(split)``, or there is no such split.
        """
