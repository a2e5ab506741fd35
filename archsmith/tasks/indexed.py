"""What tasks over examples in memory share: splits as index arrays, order of batches, halves of the training part."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Self

import numpy as np
import torch
from torch import Tensor

from archsmith.core.errors import UserError
from archsmith.tasks.base import Batch, Task
from archsmith.tasks.bounds import whole
from archsmith.tasks.split import Indices, halved, shuffled


class IndexedTask(Task):
    """A task over examples in memory; which of them a split has is an index array.

    A subclass sets ``_indices`` and makes batches of chosen examples. The order of training examples is a function of
    seed and epoch, so that a run resumes exactly in the middle of an epoch.
    """

    _indices: dict[str, Tensor]

    @abstractmethod
    def batch_of(self, chosen: Tensor) -> Batch:
        """Return the examples of these indices as a batch."""

    def size(self, split: str) -> int:
        """See ``Task.size``."""
        return len(self._of(split))

    def steps_per_epoch(self, batch_size: int) -> int:
        """See ``Task.steps_per_epoch``."""
        whole("batch_size", batch_size, low=1, high=2**31)
        size = self.size("train")
        if batch_size > size:
            raise UserError(
                "batch_size", batch_size, allowed=f"1 to {size}, the size of the training part of {self.name}"
            )
        return size // batch_size

    def batches(self, split: str, *, batch_size: int, seed: int = 0, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """See ``Task.batches``."""
        indices = self._of(split)
        if split == "train":
            steps = self.steps_per_epoch(batch_size)
            indices = self.ordered(indices, batch_size=batch_size, seed=seed, epoch=epoch)
        else:
            whole("batch_size", batch_size, low=1, high=2**31)
            steps = -(-len(indices) // batch_size)
        whole("start", start, low=0, high=steps)
        return self._pass(indices, batch_size, start, steps)

    def ordered(self, indices: Tensor, *, batch_size: int, seed: int, epoch: int) -> Tensor:
        """Return the training indices in the order of an epoch, a function of the arguments alone."""
        return indices[torch.from_numpy(shuffled(len(indices), seed, "shuffle", epoch))]

    def examples(self, n: int, split: str = "test") -> Tensor:
        """See ``Task.examples``."""
        indices = self._of(split)
        return self.batch_of(indices[: whole("n", n, low=1, high=len(indices))]).inputs

    def split_indices(self, split: str) -> Indices:
        """Return a copy of the index array of a split, ascending, into the examples that the task was made of."""
        return self._of(split).numpy().copy()

    def with_splits(self, splits: Mapping[str, Indices]) -> Self:
        """Return the task with other examples in some of its splits; all else is shared, the normalisation too.

        Args:
            splits: Index arrays as of ``split_indices``, by split.
        """
        other = copy.copy(self)
        changed = {split: torch.from_numpy(np.sort(indices)) for split, indices in splits.items()}
        other._indices = {**self._indices, **changed}
        return other

    def training_halves(self, seed: int) -> tuple[Self, Self]:
        """Return the task twice, with one random half of its training part each; the odd example belongs to the first.

        Everything else is shared: examples, other splits, normalisation, augmentation.

        Args:
            seed: Seed of the halves.

        Raises:
            UserError: There is a single training example.
        """
        if self.size("train") < 2:
            raise UserError("task", self.name, allowed="at least 2 training examples, to be halved")
        first, second = halved(self.split_indices("train"), seed)
        return self.with_splits({"train": first}), self.with_splits({"train": second})

    def _of(self, split: str) -> Tensor:
        if split not in self._indices:
            raise UserError("split", split, allowed=", ".join(self._indices))
        return self._indices[split]

    def _pass(self, indices: Tensor, batch_size: int, start: int, steps: int) -> Iterator[Batch]:
        for step in range(start, steps):
            yield self.batch_of(indices[step * batch_size : (step + 1) * batch_size])
