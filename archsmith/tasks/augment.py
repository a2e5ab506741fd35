"""Batch augmentation on normalised image tensors, deterministic given a ``torch.Generator``.

Every function draws numbers whose count depends on the batch's shape and the settings only, never on its values, so
that two runs which see different images stay in step. Draws are made on the generator's device, then moved to the
inputs' device.

Legend: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from archsmith.core.errors import UserError
from archsmith.tasks.bounds import flag, real, whole


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Settings of the training step; the defaults change nothing.

    Attributes:
        crop: Random shift by up to this many pixels, done as padding and cropping.
        flip: Mirror left to right with probability 1/2.
        cutout: Side in pixels of a square set to the mean, at a random place, cut at the borders; 0 for none.
        mixup: Parameter of the Beta distribution that two examples are mixed by; 0 for none.
        label_smoothing: Share of the target probability spread evenly over *all* classes.

    Raises:
        UserError: A value is out of its bounds.

    Example:
        >>> Augment(crop=4, flip=True).label_smoothing
        0.0
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0
    mixup: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop", whole("crop", self.crop, low=0, high=256))
        object.__setattr__(self, "flip", flag("flip", self.flip))
        object.__setattr__(self, "cutout", whole("cutout", self.cutout, low=0, high=1024))
        object.__setattr__(self, "mixup", real("mixup", self.mixup, low=0.0, high=16.0))
        object.__setattr__(self, "label_smoothing", real("label_smoothing", self.label_smoothing, low=0.0, high=0.99))

    def fitting(self, height: int, width: int) -> Augment:
        """Return the settings after checking that they make sense on images of this size.

        Raises:
            UserError: The shift reaches half of the image, or the cutout square covers it.
        """
        side = min(height, width)
        if self.crop and 2 * self.crop >= side:
            raise UserError(
                "crop", self.crop, allowed=f"less than half of the image, 0 to {(side - 1) // 2} at {height}x{width}"
            )
        if self.cutout and self.cutout >= side:
            raise UserError("cutout", self.cutout, allowed=f"less than the image, 0 to {side - 1} at {height}x{width}")
        return replace(self)


def random_crop(inputs_BCHW: Tensor, padding: int, generator: torch.Generator, *, fill: Tensor | None = None) -> Tensor:
    """Shift each image by its own whole offset in ``-padding..padding`` along both axes.

    Args:
        inputs_BCHW: Images.
        padding: Largest shift in pixels, at least 1.
        generator: Draws two integers per image.
        fill: Value per channel ``(C,)`` that moves in at the borders, zero when None. The normalised value of black is
            ``-mean / std``.

    Returns:
        New tensor of the same shape, dtype and memory format.
    """
    batch, channels, height, width = inputs_BCHW.shape
    offsets = torch.randint(0, 2 * padding + 1, (2, batch), generator=generator, device=generator.device)
    down, right = offsets.to(inputs_BCHW.device)
    background = inputs_BCHW.new_zeros(channels) if fill is None else fill.to(inputs_BCHW)
    padded = background[None, :, None, None].repeat(batch, 1, height + 2 * padding, width + 2 * padding)
    padded[:, :, padding : padding + height, padding : padding + width] = inputs_BCHW
    # A view of every crop of every image; indexing it copies only the chosen one.
    crops = padded.unfold(2, height, 1).unfold(3, width, 1)
    chosen = crops[torch.arange(batch, device=inputs_BCHW.device), :, down, right]
    return chosen.contiguous(memory_format=_memory_format(inputs_BCHW))


def random_flip(inputs_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2; draws one number per image."""
    drawn = torch.rand(len(inputs_BCHW), generator=generator, device=generator.device).to(inputs_BCHW.device)
    return torch.where((drawn < 0.5)[:, None, None, None], inputs_BCHW.flip(3), inputs_BCHW)


def cutout(inputs_BCHW: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Set a square of each image to zero, the mean of normalised inputs.

    The centre is uniform over all pixels and the square is cut at the borders (DeVries and Taylor 2017,
    arXiv:1708.04552); draws two integers per image.
    """
    batch, _, height, width = inputs_BCHW.shape
    centre_row = torch.randint(0, height, (batch, 1), generator=generator, device=generator.device)
    centre_column = torch.randint(0, width, (batch, 1), generator=generator, device=generator.device)
    rows = torch.arange(height, device=generator.device) - (centre_row - side // 2)
    columns = torch.arange(width, device=generator.device) - (centre_column - side // 2)
    hit_BHW = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
    # torch.where, because masked_fill forgets the memory format when the mask is broadcast.
    return torch.where(hit_BHW[:, None].to(inputs_BCHW.device), 0.0, inputs_BCHW)


def mixup(
    inputs_BCHW: Tensor, targets_B: Tensor, *, alpha: float, num_classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mix each example with another one of the batch, in one proportion per batch.

    ``x' = l x + (1 - l) x[perm]`` and the same for the one-hot targets, with ``l ~ Beta(alpha, alpha)`` (Zhang et al.
    2018, arXiv:1710.09412).

    Returns:
        Mixed inputs and float32 target probabilities ``(B, K)``.
    """
    order = torch.randperm(len(inputs_BCHW), generator=generator, device=generator.device).to(inputs_BCHW.device)
    # Rejection samplers draw a varying count; a sub-stream keeps the generator in step.
    draw = torch.randint(0, 2**62, (1,), generator=generator, device=generator.device)
    share = float(np.random.default_rng(int(draw)).beta(alpha, alpha))
    soft_BK = functional.one_hot(targets_B, num_classes).to(torch.float32)
    mixed = torch.lerp(inputs_BCHW[order], inputs_BCHW, share)
    return mixed, torch.lerp(soft_BK[order], soft_BK, share)


def smoothed_cross_entropy(logits_BK: Tensor, targets: Tensor, *, smoothing: float) -> Tensor:
    """Return the cross-entropy of each example, ``(B,)``, with the target ``(1 - e) * target + e / K``.

    Args:
        logits_BK: Unnormalised scores.
        targets: Class numbers ``(B,)`` int64, or probabilities ``(B, K)``.
        smoothing: The share ``e``, spread over all classes, the right one included.
    """
    return functional.cross_entropy(logits_BK, targets, reduction="none", label_smoothing=smoothing)


def augmented(
    inputs_BCHW: Tensor,
    targets_B: Tensor,
    *,
    augment: Augment,
    num_classes: int,
    fill: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Apply the settings in their fixed order: crop, flip, cutout, mixup.

    Returns:
        Inputs of the same shape, and the targets: unchanged ``(B,)``, or probabilities ``(B, K)`` when mixing.
    """
    if augment.crop:
        inputs_BCHW = random_crop(inputs_BCHW, augment.crop, generator, fill=fill)
    if augment.flip:
        inputs_BCHW = random_flip(inputs_BCHW, generator)
    if augment.cutout:
        inputs_BCHW = cutout(inputs_BCHW, augment.cutout, generator)
    if augment.mixup:
        return mixup(inputs_BCHW, targets_B, alpha=augment.mixup, num_classes=num_classes, generator=generator)
    return inputs_BCHW, targets_B


@contextmanager
def changed_augment(task: object, **changes: Any) -> Iterator[None]:
    """Let the training step of a task augment differently inside the block.

    For trainings whose augmentation changes on the way (mixup from some epoch on).

    Args:
        task: Has an ``augment``, as the image tasks do; it gets its own back at the end.
        changes: Fields of ``Augment``; without any the task may be anything.

    Raises:
        UserError: The task has no ``augment``, or a value is out of its bounds.
    """
    before = getattr(task, "augment", None)
    if not changes:
        yield
        return
    if not isinstance(before, Augment):
        raise UserError("task", type(task).__name__, allowed="a task with `augment`, as the image tasks have")
    holder: Any = task
    holder.augment = replace(before, **changes)
    try:
        yield
    finally:
        holder.augment = before


def _memory_format(tensor: Tensor) -> torch.memory_format:
    """Return the memory format that ``tensor`` has now; plain contiguous when both would fit."""
    if tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last
