"""Evaluation of untrained sub-networks of one parent: many masks at once, no gradients, the same data for all."""

# L lanes (candidates at once), B examples, K classes

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import cross_entropy

from archsmith.atoms.masks import UnitMasks
from archsmith.atoms.units import UnitGroup
from archsmith.core.errors import UserError
from archsmith.evaluate.base import WeightStore
from archsmith.space import Result, Space, Trial
from archsmith.tasks.base import Batch, Task

_ONE_AT_A_TIME = threading.Lock()
"""``functional_call`` swaps the tensors of a module while it runs, so threads must take turns."""


class MaskedFamily(Protocol):
    """What is asked of a family here (``archsmith.families.subnetworks.SubnetworkFamily`` is one)."""

    @property
    def parent(self) -> nn.Module:
        """The network whose units are masked."""

    @property
    def groups(self) -> tuple[UnitGroup, ...]:
        """Its units."""

    @property
    def space(self) -> Space:
        """The space whose points say which of them stay."""

    def masks(self, architecture: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return by group one bool for each unit: whether it stays."""


class MaskedEvaluator:
    """Scores sub-networks of a parent as they are, without training or cutting anything.

    Args:
        family: Parent, groups and space.
        batch: The examples on which every candidate is scored, of the training part: float inputs (B, ...) and int64
            targets (B,).
        lanes: Candidates that are computed at once. Each takes as much memory as the parent and its activations.
        chunk: Examples that are computed at once.

    ``metrics``: the mean cross-entropy "loss", and "accuracy" as a fraction, in evaluation mode. They are functions of
    the architecture: every computation has exactly ``lanes`` candidates (a short one is filled up with repeats), so
    that neither company nor order nor the number of workers can change the last bit. No random stream is touched. The
    trial's seed is not used, since the weights are the parent's, of which a copy is kept. Threads take turns.

    Raises:
        UserError: Groups that masks cannot express (see ``UnitMasks``), or a batch without examples.
    """

    def __init__(self, family: MaskedFamily, batch: Batch, *, lanes: int = 8, chunk: int = 1_000) -> None:
        if lanes < 1 or chunk < 1:
            raise UserError("lanes, chunk", (lanes, chunk), allowed="at least one candidate and one example at once")
        if len(batch) < 1:
            raise UserError("batch", len(batch), allowed="at least one example")
        self.family, self.batch, self.lanes, self.chunk = family, batch, lanes, chunk
        network = copy.deepcopy(family.parent).eval()
        self.masked = UnitMasks(network, family.groups)
        device = next(network.parameters()).device
        self._device, self._batch = device, batch.to(device)

    def evaluate(self, trial: Trial, *, weights: WeightStore | None = None) -> Result:
        """Score one trial.

        Args:
            trial: What to score.
            weights: Not used.

        Raises:
            UserError: The architecture is not of the family's space, or a fidelity is asked for; there is only one.
        """
        if trial.fidelity is not None:
            raise UserError("trial.fidelity", trial.fidelity, allowed="None: an untrained score has no fidelity")
        return self.evaluate_many([trial.architecture])[0]

    def evaluate_many(self, architectures: Sequence[Mapping[str, Any]]) -> list[Result]:
        """Score many sub-networks, ``lanes`` at once; each result is the one that ``evaluate`` gives.

        ``seconds`` of a result is its share of the time.

        Raises:
            UserError: An architecture is not of the family's space.
        """
        valid = [self.family.space.validate(each) for each in architectures]
        results: list[Result] = []
        for start in range(0, len(valid), self.lanes):
            began = time.perf_counter()
            some = valid[start : start + self.lanes]
            lanes = [self.family.masks(each) for each in [*some, *[some[-1]] * (self.lanes - len(some))]]
            masks = {name: torch.stack([lane[name] for lane in lanes]).to(self._device) for name in lanes[0]}
            loss_L, accuracy_L = self._scores(masks)
            seconds = (time.perf_counter() - began) / len(some)
            results += [
                Result(metrics={"loss": loss, "accuracy": accuracy}, seconds=seconds)
                for loss, accuracy in zip(loss_L[: len(some)], accuracy_L[: len(some)], strict=True)
            ]
        return results

    @torch.no_grad()
    def _scores(self, masks: Mapping[str, Tensor]) -> tuple[list[float], list[float]]:
        losses = torch.zeros(self.lanes, dtype=torch.float64, device=self._device)
        hits = torch.zeros_like(losses)
        with _ONE_AT_A_TIME:
            tensors = vmap(self.masked.tensors)(masks)
            for start in range(0, len(self._batch), self.chunk):
                inputs = self._batch.inputs[start : start + self.chunk]
                targets = self._batch.targets[start : start + self.chunk]
                logits_LBK = vmap(self.masked.call, in_dims=(None, 0))(inputs, tensors)
                wanted_LB = targets.expand(self.lanes, -1)
                each_LB = cross_entropy(logits_LBK.transpose(1, 2), wanted_LB, reduction="none")
                losses += each_LB.double().sum(1)
                hits += (logits_LBK.argmax(2) == wanted_LB).double().sum(1)
        count = len(self._batch)
        return (losses / count).tolist(), (hits / count).tolist()


def scoring_batch(task: Task, examples: int, *, seed: int) -> Batch:
    """Return training examples to score candidates on: a draw without replacement, not augmented.

    Args:
        task: Whose training part is drawn from.
        examples: How many.
        seed: Seed of the draw.

    Raises:
        UserError: More than the training part has.
    """
    return next(task.batches("train", batch_size=examples, seed=seed))
