"""A supernet's earlier selves: copies of its weights and logits, and what they say about a batch.

A copy is the pair (weights, logits) of one moment, because weights alone, under later logits, were never a network that
was trained. Copies answer without gradient, with the statistics of the batch (running ones of a search mean nothing),
and leave every buffer and every random stream as it was.

Source: the voting teachers of Zhu, Li, Liu, Wang, arXiv 2302.05629.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from archsmith.core.errors import UserError
from archsmith.graph import evaluating
from archsmith.supernet.relaxed import RelaxedSupernet, batch_statistics


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A supernet at one moment; its tensors belong to nobody else.

    Attributes:
        step: When it was taken, as the taker counts.
        weights: All parameters of the network by name, frozen ones included.
        logits: Logits by group.
    """

    step: int
    weights: Mapping[str, Tensor]
    logits: Mapping[str, Tensor]

    @classmethod
    def of(cls, supernet: RelaxedSupernet, step: int) -> Snapshot:
        """Return a copy of what the supernet is now; its gradients and buffers are not part of it."""
        return cls(step, _copies(supernet.network.named_parameters()), _copies(supernet.logits.items()))


class TeacherQueue:
    """The newest snapshots of a supernet, oldest first.

    Args:
        size: How many are kept; from 1.

    Raises:
        UserError: A size below 1.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise UserError("teachers", size, allowed="an integer from 1")
        self._snapshots: deque[Snapshot] = deque(maxlen=size)

    @property
    def size(self) -> int:
        """How many are kept at most."""
        assert self._snapshots.maxlen is not None
        return self._snapshots.maxlen

    def __len__(self) -> int:
        return len(self._snapshots)

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self._snapshots)

    def push(self, snapshot: Snapshot) -> None:
        """Add one; when there are too many, the oldest goes."""
        self._snapshots.append(snapshot)

    @torch.no_grad()
    def logits(
        self, supernet: RelaxedSupernet, x: Tensor, generator: Callable[[int], torch.Generator] | None = None
    ) -> list[Tensor]:
        """Return what each snapshot says about a batch, oldest first; nothing of ``supernet`` changes.

        Args:
            supernet: Lends its modules.
            x: Input.
            generator: For relaxations that sample: makes the source of randomness of snapshot ``k``. The relaxation
                draws from torch's global generator without it.
        """
        with evaluating(supernet), batch_statistics(supernet):
            return [
                supernet.functional(
                    x, each.weights, each.logits, generator=None if generator is None else generator(number)
                )
                for number, each in enumerate(self)
            ]

    def state(self) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
        """Return tensors by name and plain JSON values for a checkpoint."""
        tensors: dict[str, Tensor] = {}
        for number, each in enumerate(self):
            for kind, named in (("weights", each.weights), ("logits", each.logits)):
                tensors.update({f"teacher.{number}.{kind}.{name}": tensor for name, tensor in named.items()})
        return tensors, {"steps": [each.step for each in self]}

    def load(self, supernet: RelaxedSupernet, tensors: Mapping[str, Tensor], values: Mapping[str, list[int]]) -> None:
        """Continue from a checkpoint, bit for bit and in the memory layout of ``supernet``'s tensors.

        Raises:
            UserError: A tensor of a snapshot is not there.
        """
        self._snapshots.clear()
        for number, step in enumerate(values["steps"]):
            weights, logits = (
                {name: _like(own, tensors, f"teacher.{number}.{kind}.{name}") for name, own in named}
                for kind, named in (
                    ("weights", supernet.network.named_parameters()),
                    ("logits", supernet.logits.items()),
                )
            )
            self.push(Snapshot(step, weights, logits))


def _copies(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone(memory_format=torch.preserve_format) for name, tensor in named}


def _like(own: Tensor, tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise UserError("checkpoint", name, allowed="the tensors of every teacher that it names")
    return torch.empty_like(own, memory_format=torch.preserve_format).copy_(tensors[name]).detach()
