"""The training step and the evaluation that every classification task shares."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from archsmith.core.errors import Shown, UserError
from archsmith.tasks.augment import Augment, augmented, smoothed_cross_entropy
from archsmith.tasks.base import Batch, Forward


def classification_loss(
    forward: Forward, batch: Batch, *, augment: Augment, num_classes: int, fill: Tensor, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """Augment a batch, run it forwards, return the mean (smoothed) cross-entropy and the accuracy.

    Args:
        forward: From inputs ``(B, C, H, W)`` to logits ``(B, K)``.
        batch: Normalised inputs and class numbers.
        augment: What the step does to them.
        num_classes: ``K``.
        fill: Normalised value of black per channel, for the borders of shifted images.
        generator: Source of the augmentation's randomness.

    Returns:
        The loss and ``{"accuracy": scalar}``; with mixup an example counts as right when its larger share is predicted.

    Raises:
        UserError: ``forward`` returned another shape than ``(B, K)``.
    """
    inputs, targets = augmented(
        batch.inputs, batch.targets, augment=augment, num_classes=num_classes, fill=fill, generator=generator
    )
    logits = checked_logits(forward(inputs), len(inputs), num_classes)
    targets = targets.to(logits.device)
    loss = smoothed_cross_entropy(logits, targets, smoothing=augment.label_smoothing).mean()
    classes = targets if targets.ndim == 1 else targets.argmax(1)
    right = (logits.detach().argmax(1) == classes).float().mean()
    return loss, {"accuracy": right}


@torch.no_grad()
def classification_scores(forward: Forward, batches: Iterable[Batch], *, num_classes: int) -> dict[str, float | int]:
    """Return accuracy, mean cross-entropy and the number of examples over all batches, without gradients.

    The sums are kept in float64, so that the accuracy is exact and the loss hardly depends on the batch size.

    Raises:
        UserError: ``forward`` returned another shape than ``(B, K)``.
    """
    right = examples = 0
    total = 0.0
    for batch in batches:
        logits = checked_logits(forward(batch.inputs), len(batch), num_classes)
        targets = batch.targets.to(logits.device)
        right += int((logits.argmax(1) == targets).sum())
        total += float(functional.cross_entropy(logits.float(), targets, reduction="none").double().sum())
        examples += len(batch)
    return {"accuracy": right / examples, "loss": total / examples, "examples": examples}


def checked_logits(output: Tensor, batch: int, num_classes: int) -> Tensor:
    """Return ``output`` if it is a tensor of shape ``(batch, num_classes)``.

    Raises:
        UserError: It is not.
    """
    if not isinstance(output, Tensor) or output.shape != (batch, num_classes):
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UserError(
            "network output",
            Shown(f"{given}" if isinstance(output, Tensor) else f"a {given}"),
            allowed=f"logits of shape ({batch}, {num_classes}), one column per class",
        )
    return output
