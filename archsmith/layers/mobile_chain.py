"""A chain of inverted residual blocks, each with one kernel size and one expansion; some places may be empty.

Source: ProxylessNAS, arXiv 1812.00332; the block is that of MobileNetV2, arXiv 1801.04381.
"""

# B batch, C channels, H height, W width

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from archsmith.layers.mobile import ConvNormAct, MixedInvertedResidual


def inverted_residual(
    in_channels: int,
    out_channels: int,
    stride: int,
    kernel: int,
    expansion: int,
    activation: str = "relu6",
    norm_eps: float = 1e-3,
    norm_momentum: float = 0.1,
    shortcut: bool = True,
) -> MixedInvertedResidual:
    """Return an inverted residual block of one kernel: 1x1 expansion, depthwise, 1x1 projection, each normalised.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        out_channels: Channels of the output.
        stride: 1 or 2.
        kernel: Depthwise kernel size, odd.
        expansion: Hidden channels for each input channel; 1 leaves out the first 1x1 convolution.
        activation: "relu", "relu6" or "swish".
        norm_eps: Epsilon of all normalisations.
        norm_momentum: Momentum of their running statistics.
        shortcut: Whether the input is added where the shape stays the same.
    """
    atoms = ((kernel, in_channels * expansion),)
    expand = expansion != 1
    return MixedInvertedResidual(
        in_channels, out_channels, stride, atoms, expand, 0, activation, norm_eps, norm_momentum, shortcut
    )


class MobileChain(nn.Module):
    """Image classifier: stem 3x3, blocks, 1x1 convolution, global average pooling, dropout, linear.

    Args:
        in_channels: Channels of the images, (B, C, H, W).
        num_classes: Width of the output (B, num_classes).
        stem_channels: Width of the first convolution.
        stem_stride: Its stride.
        blocks: For every place ``(out_channels, stride, kernel, expansion)``, or None where there is no block.
        last_channels: Width of the 1x1 convolution before pooling.
        activation: "relu", "relu6" or "swish", everywhere.
        dropout: Drop probability in front of the classifier.
        norm_eps: Epsilon of every normalisation.
        norm_momentum: Momentum of every running statistic.

    Blocks are called by their places: ``blocks.3`` is the fourth place's, whether the third is empty or not.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        stem_channels: int,
        stem_stride: int,
        blocks: tuple[tuple[int, int, int, int] | None, ...],
        last_channels: int,
        activation: str = "relu6",
        dropout: float = 0.0,
        norm_eps: float = 1e-3,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.plan = blocks
        self.settings = {
            "activation": activation,
            "dropout": dropout,
            "norm_eps": norm_eps,
            "norm_momentum": norm_momentum,
        }
        self.stem = ConvNormAct(in_channels, stem_channels, 3, stem_stride, activation, norm_eps, norm_momentum)
        self.blocks = nn.ModuleDict()
        channels = stem_channels
        for place, block in enumerate(blocks):
            if block is not None:
                out_channels, stride, kernel, expansion = block
                self.blocks[str(place)] = inverted_residual(
                    channels, out_channels, stride, kernel, expansion, activation, norm_eps, norm_momentum
                )
                channels = out_channels
        self.last = ConvNormAct(channels, last_channels, 1, 1, activation, norm_eps, norm_momentum)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(last_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, C, H, W)."""
        x = self.stem(x)
        for block in self.blocks.values():
            x = block(x)
        x = self.pool(self.last(x)).flatten(1)
        return self.classifier(self.dropout(x))

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this structure."""
        return {
            "in_channels": self.stem.conv.in_channels,
            "num_classes": self.classifier.out_features,
            "stem_channels": self.stem.conv.out_channels,
            "stem_stride": self.stem.conv.stride[0],
            "blocks": self.plan,
            "last_channels": self.last.conv.out_channels,
            **self.settings,
        }
