"""The one training of a single-stage supernet: its learning rate, and the step that all its children share.

Yu et al. 2020, "BigNAS", arXiv 2003.11142. Shorter trainings keep the published proportions of warm-up, decay and
constant tail.
"""

from __future__ import annotations

from typing import Any

import torch

from archsmith.train.children import ChildrenStep
from archsmith.train.distill import soft_cross_entropy
from archsmith.train.schedules import staircase_to_floor

PUBLISHED_EPOCHS = 360
"""Of the schedule whose proportions shorter trainings keep."""


def single_stage_rate(
    step: int,
    *,
    peak: float,
    epochs: int,
    steps_per_epoch: int,
    decay: float,
    floor: float,
    warmup_epochs: float | None = None,
    decay_epochs: float | None = None,
) -> float:
    """Return the rate after ``step`` steps: linear rise, exponential stairs, constant tail.

    Args:
        step: Steps done.
        peak: Largest rate.
        epochs: Epochs of the training.
        steps_per_epoch: Steps in each.
        decay: Factor of each stair.
        floor: Part of the peak at which the rate stays constant.
        warmup_epochs: Length of the rise; 5 in 360 epochs, and in proportion in others, if None.
        decay_epochs: Width of a stair; 2.4 in 360 epochs, and in proportion in others, if None.
    """
    share = epochs / PUBLISHED_EPOCHS
    return staircase_to_floor(
        step,
        peak=peak,
        steps_per_epoch=steps_per_epoch,
        warmup_epochs=5.0 * share if warmup_epochs is None else warmup_epochs,
        decay=decay,
        every_epochs=2.4 * share if decay_epochs is None else decay_epochs,
        floor=floor,
    )


def single_stage_step(
    supernet: Any, optimizer: torch.optim.Optimizer, *, weight_decay: float, clip_value: float, clip_norm: float = 0.0
) -> ChildrenStep:
    """Return the step: in-place distillation, decay and dropout for the largest child alone, one optimiser step.

    Args:
        supernet: An ``nn.Module`` and a ``Supernet``.
        optimizer: Of its weights, without a decay of its own.
        weight_decay: L2 in the largest child's pass.
        clip_value: Largest absolute entry of the gradient, 0 for none.
        clip_norm: Largest norm of the gradient, 0 for none.
    """
    return ChildrenStep(
        supernet,
        optimizer,
        distance=soft_cross_entropy,
        weight_decay=weight_decay,
        clip_value=clip_value,
        clip_norm=clip_norm,
    )
