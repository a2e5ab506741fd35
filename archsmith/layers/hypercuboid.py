"""A network that is one path through a grid of widths and operations: a plain chain.

Source: Hundt, Jain, Hager, "sharpDARTS: Faster and More Accurate Differentiable Architecture Search", arXiv 1903.09900.
"""

# B batch, C channels, H height, W width

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from archsmith.layers.darts import DenseLayers
from archsmith.layers.sharp import CHOKE, SharpSepConv, make_sharp_primitive


class PathNetwork(nn.Module):
    """Stem, operations of stride 1 and 2 in turn, a separable block, global average pooling, classifier.

    Args:
        in_channels: Channels of the images (B, C, H, W), of any size.
        num_classes: Width of the output (B, num_classes).
        widths: Channels behind the stem, a 3x3 convolution, and behind every operation.
        operations: Names of the operations, see ``make_sharp_primitive``; the first has stride 1, the second 2, and so
            on.
        filters: Channels of the block in front of the classifier.
        choke: The fixed middle width of choke convolutions.
        layers: Makes convolutions and classifier, ordinary ones by default.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: tuple[int, ...],
        operations: tuple[str, ...],
        filters: int = 768,
        choke: int = CHOKE,
        layers: DenseLayers | None = None,
    ) -> None:
        super().__init__()
        self.arguments = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "widths": widths,
            "operations": operations,
            "filters": filters,
            "choke": choke,
        }
        self.layers = layers = DenseLayers() if layers is None else layers
        self.stem = grid_stem(in_channels, widths[0], layers)
        self.operations = nn.ModuleList(
            make_sharp_primitive(name, widths[index], widths[index + 1], 1 + index % 2, True, layers, choke)
            for index, name in enumerate(operations)
        )
        self.tail = SharpSepConv(widths[-1], filters, 3, layers=layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = layers.linear(filters, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, C, H, W)."""
        x = self.stem(x)
        for operation in self.operations:
            x = operation(x)
        logits: Tensor = self.classifier(self.pool(self.tail(x)).flatten(1))
        return logits

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this structure."""
        dense = type(self.layers) is DenseLayers
        return {**self.arguments, **({} if dense else {"layers": self.layers})}


def grid_stem(in_channels: int, width: int, layers: DenseLayers) -> nn.Sequential:
    """Return a 3x3 convolution of the image to a width, and its normalisation."""
    return nn.Sequential(layers.convolution(in_channels, width, 3, 1, 1), nn.BatchNorm2d(width))
