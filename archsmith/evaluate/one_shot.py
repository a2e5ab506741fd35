"""One-shot evaluation: the validation accuracy of an architecture with the shared weights of a supernet."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from archsmith.core.errors import Shown, UserError
from archsmith.evaluate.base import WeightStore
from archsmith.space import Result, Trial
from archsmith.supernet import Supernet

Norm = Literal["batch", "recalibrated", "running"]

Batches = Sequence[tuple[Tensor, Tensor]]


class OneShotEvaluator:
    """Scores architectures inside a trained supernet.

    Args:
        supernet: Trained supernet, an ``nn.Module``. Its weights and statistics are never changed; the path that was
            evaluated last stays active.
        batches: Validation images (B, C, H, W) and labels (B,).
        norm: What batch normalisations do. ``batch``: normalise every validation batch by its own statistics, as the
            NAS-Bench-201 searches do; the score then depends on how the images are batched. ``recalibrated``: take new
            running statistics of the path over ``calibration`` first. ``running``: use those that training left, which
            mix all paths that shared a normalisation.
        calibration: Training images, batch by batch, for ``recalibrated``.

    ``metrics`` are ``valid_accuracy`` (a fraction) and ``valid_loss`` (mean cross-entropy). ``seconds`` is the time
    spent. Which normalisation was used changes rankings a good deal: report it.

    Raises:
        UserError: No supernet, no batch, an unknown ``norm``, or no calibration where it is needed.
    """

    def __init__(
        self, supernet: Supernet, batches: Batches, *, norm: Norm = "batch", calibration: Sequence[Tensor] = ()
    ) -> None:
        if not isinstance(supernet, nn.Module) or not isinstance(supernet, Supernet):
            raise UserError(
                "supernet",
                Shown(f"a {type(supernet).__name__}"),
                allowed="an nn.Module with space, activate and extract",
            )
        _check(batches, norm, calibration)
        self.supernet = supernet
        self._network: nn.Module = supernet
        self.batches = tuple(batches)
        self.norm: Norm = norm
        self.calibration = tuple(calibration)

    def evaluate(self, trial: Trial, *, weights: WeightStore | None = None) -> Result:
        """Evaluate one trial.

        Args:
            trial: What to evaluate. Nothing is random, the seed does not count.
            weights: Not used.

        Returns:
            A result with the metrics, or a failed one where the path crashes or its loss is not finite.

        Raises:
            UserError: The architecture is not of the supernet's space, or a fidelity is asked for; there is only one.
        """
        if trial.fidelity is not None:
            raise UserError("trial.fidelity", trial.fidelity, allowed="None: a one-shot score has no fidelity")
        architecture = self.supernet.space.validate(trial.architecture)
        start = time.perf_counter()
        try:
            self.supernet.activate(architecture)
            metrics = validation_metrics(self._network, self.batches, norm=self.norm, calibration=self.calibration)
        except Exception as error:  # whatever a candidate does is a result, see Evaluator
            return Result.failed(f"{type(error).__name__}: {error}", seconds=time.perf_counter() - start)
        seconds = time.perf_counter() - start
        if not math.isfinite(metrics["valid_loss"]):
            return Result.failed(f"the validation loss is {metrics['valid_loss']}", seconds=seconds)
        return Result(metrics=metrics, seconds=seconds)


def validation_metrics(
    network: nn.Module, batches: Batches, *, norm: Norm = "running", calibration: Sequence[Tensor] = ()
) -> dict[str, float]:
    """Return ``valid_accuracy`` (a fraction) and ``valid_loss`` (mean cross-entropy) of a classifier.

    Args:
        network: Any classifier, the active path of a supernet included. Mode and statistics are the same afterwards.
        batches: Images (B, C, H, W) and labels (B,).
        norm: What batch normalisations do, see ``OneShotEvaluator``. Everything else is in evaluation mode.
        calibration: Image batches for ``recalibrated``; the statistics are their plain averages over the batches.

    Raises:
        UserError: No batch, an unknown ``norm``, or no calibration where it is needed.
    """
    _check(batches, norm, calibration)
    correct, loss, total = 0, 0.0, 0
    with _statistics_kept(network) as norms, torch.no_grad():
        network.eval()
        if norm == "recalibrated":
            for layer in norms:
                layer.reset_running_stats()
                layer.momentum = None  # cumulative average
                layer.train()
            for images in calibration:
                network(images)
        for layer in norms:
            layer.train(norm == "batch")
        for images, labels in batches:
            logits = network(images)
            correct += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
            total += len(labels)
    return {"valid_accuracy": correct / total, "valid_loss": loss / total}


def _check(batches: Batches, norm: str, calibration: Sequence[Tensor]) -> None:
    if norm not in get_args(Norm):
        raise UserError("norm", norm, allowed=" or ".join(get_args(Norm)))
    if not batches or not all(len(labels) for _, labels in batches):
        raise UserError("batches", [], allowed="at least one batch of validation images and labels, none of them empty")
    if norm == "recalibrated" and not calibration:
        raise UserError("calibration", [], allowed="at least one batch of training images for norm 'recalibrated'")


@contextmanager
def _statistics_kept(network: nn.Module) -> Iterator[list[_BatchNorm]]:
    """Give the batch normalisations, and put modes, momenta and statistics back afterwards."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    modes = {module: module.training for module in network.modules()}
    kept = [({name: buffer.clone() for name, buffer in layer.named_buffers()}, layer.momentum) for layer in norms]
    try:
        yield norms
    finally:
        for layer, (buffers, momentum) in zip(norms, kept, strict=True):
            layer.momentum = momentum
            for name, buffer in layer.named_buffers():
                buffer.copy_(buffers[name])
        for module, training in modes.items():
            module.training = training
