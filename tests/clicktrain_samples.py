"""The small network of the stage test, and a task of the digits without augmentation."""

from __future__ import annotations

import torch
from torch import nn

from archsmith.tasks.catalogue import open_task
from archsmith.tasks.vision import ImageClassification


def small_network(channels: int, *, seed: int, widths: tuple[int, ...] = (24, 32, 48, 48)) -> nn.Sequential:
    """Return four 3x3 convolutions with batch normalisation; the second and the fourth have stride 2."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    before = channels
    for number, width in enumerate(widths):
        layers += [nn.Conv2d(before, width, 3, 1 + number % 2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def digits() -> ImageClassification:
    """Return the digits, not augmented, with their usual split."""
    return open_task("digits", augment=False)
