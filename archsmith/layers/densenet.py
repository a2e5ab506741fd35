"""DenseNet-BC: miniblocks that each read everything before them in their block, and transitions between blocks.

Normalisation and ReLU stand *before* each convolution. A miniblock is a 1x1 convolution to a multiple of its growth and
a 3x3 convolution to its growth; both may differ from miniblock to miniblock.

Source: Huang et al. 2017, "Densely Connected Convolutional Networks", arXiv 1608.06993; growth rates by miniblock as
in Cai et al. 2018, arXiv 1707.04873.
"""

# B batch, C channels, H height, W width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Miniblock(nn.Module):
    """Normalisation, ReLU, 1x1 convolution, normalisation, ReLU, 3x3 convolution; no biases.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        growth: Channels of the output.
        bottleneck: Channels between the convolutions, for each one of the output.
        norm_eps: Epsilon of the normalisations.
        norm_momentum: Momentum of their running statistics.
    """

    def __init__(self, in_channels: int, growth: int, bottleneck: int, norm_eps: float, norm_momentum: float) -> None:
        super().__init__()
        inner = bottleneck * growth
        self.norm1 = nn.BatchNorm2d(in_channels, eps=norm_eps, momentum=norm_momentum)
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner, eps=norm_eps, momentum=norm_momentum)
        self.conv2 = nn.Conv2d(inner, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, growth, H, W)."""
        return self.conv2(functional.relu(self.norm2(self.conv1(functional.relu(self.norm1(x))))))


class DenseTransition(nn.Module):
    """Normalisation, ReLU, 1x1 convolution without bias, mean over 2x2 windows.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        out_channels: Channels of the output.
        norm_eps: Epsilon of the normalisation.
        norm_momentum: Momentum of its running statistics.

    A side of one pixel stays; of an odd side the last pixel is left out.
    """

    def __init__(self, in_channels: int, out_channels: int, norm_eps: float, norm_momentum: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels, eps=norm_eps, momentum=norm_momentum)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, out_channels, H // 2, W // 2), with at least one pixel."""
        window = (min(2, int(x.shape[2])), min(2, int(x.shape[3])))
        return functional.avg_pool2d(self.conv(functional.relu(self.norm(x))), window)


class DenseNetwork(nn.Module):
    """A DenseNet-BC.

    Args:
        in_channels: Channels of the images.
        stem: Filters of the first convolution, 3x3 without normalisation.
        growths: By block, the growth of each miniblock.
        transitions: Channels behind each block but the last.
        num_classes: Number of classes.
        bottleneck: Channels inside a miniblock, for each one of its output.
        norm_eps: Epsilon of the normalisations.
        norm_momentum: Momentum of their running statistics.

    Raises:
        ValueError: Not one transition fewer than blocks.
    """

    def __init__(
        self,
        in_channels: int,
        stem: int,
        growths: tuple[tuple[int, ...], ...],
        transitions: tuple[int, ...],
        num_classes: int,
        bottleneck: int = 4,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if len(transitions) != len(growths) - 1:
            raise ValueError(f"transitions: got {transitions}; allowed: one between each two of {len(growths)} blocks.")
        self.in_channels, self.num_classes, self.bottleneck = in_channels, num_classes, bottleneck
        self.growths, self.transition_widths = growths, transitions
        self.norm_eps, self.norm_momentum = norm_eps, norm_momentum
        self.stem = nn.Conv2d(in_channels, stem, 3, padding=1, bias=False)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        width = stem
        for number, rates in enumerate(growths):
            block = nn.ModuleList()
            for growth in rates:
                block.append(Miniblock(width, growth, bottleneck, norm_eps, norm_momentum))
                width += growth
            self.blocks.append(block)
            if number < len(transitions):
                self.transitions.append(DenseTransition(width, transitions[number], norm_eps, norm_momentum))
                width = transitions[number]
        self.norm = nn.BatchNorm2d(width, eps=norm_eps, momentum=norm_momentum)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, num_classes)."""
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            assert isinstance(block, nn.ModuleList)
            for miniblock in block:
                x = torch.cat([x, miniblock(x)], dim=1)
            if number < len(self.transitions):
                x = self.transitions[number](x)
        return self.classifier(functional.relu(self.norm(x)).mean(dim=(2, 3)))

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this structure."""
        names = ("in_channels", "growths", "num_classes", "bottleneck", "norm_eps", "norm_momentum")
        own = {"stem": self.stem.out_channels, "transitions": self.transition_widths}
        return {**{name: getattr(self, name) for name in names}, **own}
