"""Once-for-All's MobileNetV3 as a plain network: one kernel and one expansion for each block, no elastic layer left.

Source: Cai et al. 2020, arXiv 1908.09791; MobileNetV3-Large, Howard et al. 2019, arXiv 1905.02244.
"""

# B batch, C channels, H height, W width

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def hard_activation(name: str) -> nn.Module:
    """Return "relu" or "hard_swish" (x times a piecewise linear sigmoid)."""
    if name == "relu":
        return nn.ReLU(inplace=True)
    if name == "hard_swish":
        return nn.Hardswish(inplace=True)
    raise ValueError(f"activation: got {name!r}; allowed: 'relu', 'hard_swish'.")


class HardConv(nn.Module):
    """Convolution without bias, batch normalisation, activation.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        out_channels: Channels of the output.
        kernel: Odd kernel size; the padding is ``(kernel - 1) / 2``.
        stride: Stride of the convolution.
        groups: Groups of the convolution.
        activation: "relu", "hard_swish", or "" for none.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, activation: str = ""
    ) -> None:
        super().__init__()
        padding = (kernel - 1) // 2
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.activation = hard_activation(activation) if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        return self.activation(self.norm(self.conv(x)))


class HardSqueeze(nn.Module):
    """Squeeze-and-excitation with a hard sigmoid.

    Args:
        channels: Channels that are scaled.
        hidden: Width of the bottleneck.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.activation = nn.ReLU(inplace=True)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.gate = nn.Hardsigmoid(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W) scaled channel by channel."""
        return x * self.gate(self.expand(self.activation(self.reduce(self.pool(x)))))


class OfaBlock(nn.Module):
    """Inverted residual block: 1x1 expansion, depthwise convolution, squeeze-and-excitation, 1x1 projection.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        out_channels: Channels of the output.
        kernel: Depthwise kernel size, odd.
        stride: 1 or 2.
        hidden: Channels between expansion and projection; equal to ``in_channels`` for a block without expansion.
        squeeze: Width of the bottleneck of squeeze-and-excitation, 0 for none.
        activation: "relu" or "hard_swish".

    The input is added where the shape stays the same.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        hidden: int,
        squeeze: int,
        activation: str,
    ) -> None:
        super().__init__()
        self.residual = stride == 1 and in_channels == out_channels
        widen = hidden != in_channels
        self.expand = HardConv(in_channels, hidden, 1, activation=activation) if widen else nn.Identity()
        self.depthwise = HardConv(hidden, hidden, kernel, stride, hidden, activation)
        self.squeeze = HardSqueeze(hidden, squeeze) if squeeze else nn.Identity()
        self.project = HardConv(hidden, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        y = self.project(self.squeeze(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class OfaMobileNet(nn.Module):
    """Image classifier: stem, first block, five units, 1x1 convolution, pooling, 1x1 feature mix, linear.

    Args:
        in_channels: Channels of the images, (B, C, H, W).
        num_classes: Width of the output (B, num_classes).
        stem: Channels of the stem.
        stem_stride: Its stride.
        first: Channels of the first block, which has kernel 3 and no expansion.
        units: For every block ``(out_channels, kernel, stride, hidden, squeeze, activation)``, unit by unit.
        last: Channels of the 1x1 convolution in front of the pooling.
        mix: Channels of the feature mix behind it.
        dropout: Drop probability in front of the classifier.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        stem: int,
        stem_stride: int,
        first: int,
        units: tuple[tuple[tuple[int, int, int, int, int, str], ...], ...],
        last: int,
        mix: int,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.plan = units
        self.stem = HardConv(in_channels, stem, 3, stem_stride, activation="hard_swish")
        self.first = OfaBlock(stem, first, 3, 1, stem, 0, "relu")
        self.units = nn.ModuleList()
        channels = first
        for unit in units:
            blocks = nn.Sequential()
            for out_channels, kernel, stride, hidden, squeeze, activation in unit:
                blocks.append(OfaBlock(channels, out_channels, kernel, stride, hidden, squeeze, activation))
                channels = out_channels
            self.units.append(blocks)
        self.last = HardConv(channels, last, 1, activation="hard_swish")
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.mix = nn.Conv2d(last, mix, 1, bias=False)
        self.activation = nn.Hardswish(inplace=True)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(mix, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, C, H, W)."""
        x = self.first(self.stem(x))
        for unit in self.units:
            x = unit(x)
        x = self.activation(self.mix(self.pool(self.last(x)))).flatten(1)
        return self.classifier(self.dropout(x))

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this structure."""
        return {
            "in_channels": self.stem.conv.in_channels,
            "num_classes": self.classifier.out_features,
            "stem": self.stem.conv.out_channels,
            "stem_stride": self.stem.conv.stride[0],
            "first": self.first.project.conv.out_channels,
            "units": self.plan,
            "last": self.last.conv.out_channels,
            "mix": self.mix.out_channels,
            "dropout": self.dropout.p,
        }
