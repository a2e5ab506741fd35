"""Scores of many subnets of one trained supernet on one validation set that is kept in memory.

A subnet is activated and run, never built: no copy, no surgery, no loading. The batches are resized once for each
resolution, and a subnet that was scored before is not run again. Latency is none of its business: that is measured on
the extracted network.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError
from archsmith.evaluate.base import WeightStore
from archsmith.space import Architecture, Result, Trial
from archsmith.supernet.elastic import Elastic
from archsmith.supernet.elastic_memo import Beginnings, comparable
from archsmith.train.calibration import calibrate_, called

Batches = Sequence[tuple[Any, Tensor]]
"""Inputs (a tensor, a tuple of arguments or a mapping by name) and labels (B,)."""


SHARED_CHECKS = 3
"""Results with shared outputs that are computed plainly as well."""


class SubnetEvaluator:
    """Scores architectures of an elastic network by classification.

    Args:
        elastic: Trained network; its weights never change, its running statistics only with ``calibration``. The
            architecture that was scored last stays active.
        batches: Validation inputs and labels, on the network's device.
        calibration: Training inputs; a subnet's running statistics are taken from them before it is scored. Needed
            where there are batch normalisations that were trained without accumulating.
        logits: Gives the logits from what the network returns; the identity for a tensor.

    Attributes:
        sharing: Whether ``metrics_of`` shares what subnets have in common.

    ``metrics`` of a result are ``valid_accuracy`` (a fraction) and ``valid_loss`` (mean cross-entropy), ``costs``
    exact ``macs`` and ``params``.

    Raises:
        UserError: No batch, or an empty one.
    """

    def __init__(
        self,
        elastic: Elastic,
        batches: Batches,
        *,
        calibration: Sequence[Any] = (),
        logits: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if not batches or not all(len(labels) for _, labels in batches):
            raise UserError("batches", Shown("none, or an empty one"), allowed="at least one batch with examples")
        self.elastic = elastic
        self.batches, self.calibration = tuple(batches), tuple(calibration)
        self.logits = logits or _itself
        self.sharing = True
        self._resized: dict[int | None, Batches] = {}
        self._known: dict[tuple[int, ...], dict[str, float]] = {}
        self._costs: dict[tuple[int, ...], dict[str, int]] = {}

    def metrics(self, architecture: Mapping[str, Any]) -> dict[str, float]:
        """Return the metrics of an architecture.

        Raises:
            UserError: It is not of the space.
        """
        key = tuple(self.elastic.canonical(architecture).values())
        if key not in self._known:
            self.elastic.activate(architecture)
            if self.calibration:
                calibrate_(self.elastic, self.calibration)
            self._known[key] = classified(self.elastic, self._at(architecture.get("resolution")), self.logits)
        return dict(self._known[key])

    def metrics_of(self, architectures: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
        """Return the metrics of many architectures, in their order; what they have in common is computed once.

        Without ``calibration``, subnets that agree up to a block share its output (``supernet.elastic_memo``).
        The first shared results are computed plainly as well; should they differ, nothing is shared.

        Raises:
            UserError: One is not of the space.
        """
        todo: dict[tuple[int, ...], Mapping[str, Any]] = {}
        for architecture in architectures:
            key = tuple(self.elastic.canonical(architecture).values())
            if key not in self._known:
                todo.setdefault(key, architecture)
        if len(todo) > 1 and not self.calibration and self.sharing:
            self._known.update(self._shared(todo))
        return [self.metrics(architecture) for architecture in architectures]

    @torch.no_grad()
    def _shared(self, todo: Mapping[tuple[int, ...], Mapping[str, Any]]) -> dict[tuple[int, ...], dict[str, float]]:
        """Score subnets batch by batch, those with long common beginnings after each other."""
        beginnings = Beginnings(self.elastic.slices)
        order = []
        for key, architecture in todo.items():
            self.elastic.activate(architecture)
            assert self.elastic.slices.choices is not None
            order.append((beginnings.key(self.elastic.slices.choices), key, architecture))
        order.sort(key=lambda item: item[0])
        sums: dict[tuple[int, ...], list[float]] = {key: [0.0, 0.0, 0.0] for key in todo}
        checks = SHARED_CHECKS
        self.elastic.eval()
        for number in range(len(self.batches)):
            with beginnings.watching():
                for _, key, architecture in order:
                    inputs, labels = self._at(architecture.get("resolution"))[number]
                    self.elastic.activate(architecture)
                    before = beginnings.hits
                    beginnings.begin((number, architecture.get("resolution")))
                    logits = self.logits(called(self.elastic, inputs))
                    if checks and beginnings.hits > before:
                        checks -= 1
                        beginnings.begin((number, "plainly", checks))
                        if not comparable(self.logits(called(self.elastic, inputs)), logits):
                            self.sharing = False
                            return {}
                    sums[key][0] += int((logits.argmax(-1) == labels).sum())
                    sums[key][1] += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
                    sums[key][2] += len(labels)
        return {k: {"valid_accuracy": c / n, "valid_loss": loss / n} for k, (c, loss, n) in sums.items()}

    def forget(self) -> None:
        """Forget all scores: the weights have changed."""
        self._known.clear()

    def evaluate(self, trial: Trial, *, weights: WeightStore | None = None) -> Result:
        """Evaluate one trial.

        Args:
            trial: What to evaluate. Nothing is random, the seed does not count.
            weights: Not used.

        Returns:
            A result with metrics and costs, or a failed one where the loss is not finite.

        Raises:
            UserError: The architecture is not of the space, or a fidelity is asked for; there is only one.
        """
        if trial.fidelity is not None:
            raise UserError("trial.fidelity", trial.fidelity, allowed="None: a subnet's score has no fidelity")
        architecture = self.elastic.space.validate(trial.architecture)
        start = time.perf_counter()
        metrics = self.metrics(architecture)
        costs = self.costs(architecture)
        seconds = time.perf_counter() - start
        if not math.isfinite(metrics["valid_loss"]):
            return Result.failed(f"the validation loss is {metrics['valid_loss']}", seconds=seconds)
        return Result(metrics=metrics, costs=costs, seconds=seconds)

    def costs(self, architecture: Architecture) -> dict[str, int]:
        """Return the exact costs of an architecture, counted once."""
        key = tuple(self.elastic.canonical(architecture).values())
        if key not in self._costs:
            self._costs[key] = self.elastic.costs(architecture)
        return dict(self._costs[key])

    def _at(self, resolution: int | None) -> Batches:
        """Return the batches at a resolution; they are resized once."""
        if resolution not in self._resized:
            self._resized[resolution] = [
                (inputs if resolution is None else self.elastic.resized(inputs, resolution), labels)
                for inputs, labels in self.batches
            ]
        return self._resized[resolution]


@torch.no_grad()
def classified(network: nn.Module, batches: Batches, logits: Callable[[Any], Tensor] | None = None) -> dict[str, float]:
    """Return ``valid_accuracy`` (a fraction) and ``valid_loss`` of any classifier, which ends in evaluation mode.

    Args:
        network: Called with every batch's inputs.
        batches: See ``Batches``.
        logits: See ``SubnetEvaluator``.
    """
    network.eval()
    correct, loss, total = 0, 0.0, 0
    for inputs, labels in batches:
        found = (logits or _itself)(called(network, inputs))
        correct += int((found.argmax(-1) == labels).sum())
        loss += float(F.cross_entropy(found.double(), labels, reduction="sum"))
        total += len(labels)
    return {"valid_accuracy": correct / total, "valid_loss": loss / total}


def _itself(found: Any) -> Tensor:
    assert isinstance(found, Tensor), f"logits= must take a tensor out of a {type(found).__name__}"
    return found
