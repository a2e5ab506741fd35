"""Plain networks of published pruning results: VGG with batch normalisation, and residual networks.

Their names are those of common code (``feature.3``, ``layer2.0.conv1``), so published per-layer tables fit.
"""

# B batch, C channels, H height, W width

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

VGG = {
    "vgg11": (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512),
    "vgg13": (64, 64, 0, 128, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512),
    "vgg16": (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512),
}
"""Widths of the 3x3 convolutions of the CIFAR networks (Simonyan and Zisserman 2015); 0 halves the resolution."""


class PlainVgg(nn.Module):
    """3x3 convolutions with batch normalisation and ReLU, global average, one linear layer.

    Args:
        widths: Filters of each convolution; 0 is a max-pooling by two.
        in_channels: Channels of the input (B, C, H, W).
        num_classes: Classes.
    """

    def __init__(self, widths: tuple[int, ...], in_channels: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for width in widths:
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.feature = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to logits (B, classes)."""
        return cast(Tensor, self.classifier(self.feature(x).mean((2, 3))))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, or with ``bottleneck`` 1x1, 3x3, 1x1 to four times the width; added to the input.

    Args:
        in_channels: Channels of the input.
        width: Filters of the 3x3 convolution.
        stride: Of the 3x3 convolution (the first of two).
        bottleneck: The form of three convolutions.
    """

    def __init__(self, in_channels: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out = 4 * width if bottleneck else width
        self.conv3: nn.Module | None = None
        if bottleneck:
            self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
            self.conv3 = nn.Conv2d(width, out, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(out)
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.conv3 is not None:
            y = self.bn3(self.conv3(functional.relu(y)))
        return functional.relu(y + self.shortcut(x))


class PlainResNet(nn.Module):
    """Residual network of four stages (He et al. 2016, arXiv 1512.03385).

    Args:
        blocks: Blocks of each stage.
        widths: Filters of each stage; every stage but the first halves the resolution.
        bottleneck: Which form the blocks have.
        imagenet_stem: 7x7 with stride 2 and a max-pooling; else a 3x3 convolution.
        in_channels: Channels of the input (B, C, H, W).
        num_classes: Classes.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        widths: tuple[int, ...],
        bottleneck: bool,
        imagenet_stem: bool,
        in_channels: int,
        num_classes: int,
    ) -> None:
        super().__init__()
        stem = widths[0]
        if imagenet_stem:
            self.conv1 = nn.Conv2d(in_channels, stem, 7, 2, padding=3, bias=False)
            self.pool: nn.Module = nn.MaxPool2d(3, 2, padding=1)
        else:
            self.conv1 = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
            self.pool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(stem)
        channels = stem
        self.stages = len(blocks)
        for number, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stage = []
            for block in range(count):
                stride = 2 if number and not block else 1
                stage.append(ResidualBlock(channels, width, stride, bottleneck))
                channels = 4 * width if bottleneck else width
            self.add_module(f"layer{number + 1}", nn.Sequential(*stage))
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to logits (B, classes)."""
        x = self.pool(functional.relu(self.bn1(self.conv1(x))))
        for number in range(self.stages):
            x = self.get_submodule(f"layer{number + 1}")(x)
        return cast(Tensor, self.linear(torch.flatten(x.mean((2, 3)), 1)))
