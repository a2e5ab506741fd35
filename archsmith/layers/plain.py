"""Plain networks: convolutions in blocks with pools between, the global average, linear layers, a classifier.

Every layer but the classifier is a linear map without bias, a batch normalisation and a ReLU, in this order: so the
output of a layer is never negative, and an identity can stand behind it.

Source: Cai et al. 2018, "Efficient Architecture Search by Network Transformation", arXiv 1707.04873.
"""

# B batch, C channels, H height, W width, N features

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

PlainConvs = tuple[tuple[tuple[int, int], ...], ...]
"""By block, (filters, kernel size) of each convolution."""


class ConvNormRelu(nn.Module):
    """Convolution without bias, batch normalisation, ReLU; the size of the maps stays.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        filters: Channels of the output.
        kernel: Kernel size, odd.
        norm_eps: Epsilon of the normalisation.
        norm_momentum: Momentum of its running statistics.
    """

    def __init__(self, in_channels: int, filters: int, kernel: int, norm_eps: float, norm_momentum: float) -> None:
        super().__init__()
        self.linear = nn.Conv2d(in_channels, filters, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(filters, eps=norm_eps, momentum=norm_momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, filters, H, W)."""
        return functional.relu(self.norm(self.linear(x)))


class LinearNormRelu(nn.Module):
    """Linear map without bias, batch normalisation, ReLU.

    Args:
        in_features: Features of the input (B, N).
        units: Features of the output.
        norm_eps: Epsilon of the normalisation.
        norm_momentum: Momentum of its running statistics.
    """

    def __init__(self, in_features: int, units: int, norm_eps: float, norm_momentum: float) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, units, bias=False)
        self.norm = nn.BatchNorm1d(units, eps=norm_eps, momentum=norm_momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N) to (B, units)."""
        return functional.relu(self.norm(self.linear(x)))


class PlainNetwork(nn.Module):
    """A plain network.

    Args:
        in_channels: Channels of the images.
        convs: By block, (filters, kernel size) of each convolution. Behind each block but the last the maximum over
            2x2 windows halves the maps (rounding up), behind the last stands the global average.
        units: Features of the linear layers.
        num_classes: Number of classes.
        norm_eps: Epsilon of the normalisations.
        norm_momentum: Momentum of their running statistics.

    Attributes:
        blocks: One list of layers for each block of convolutions, then one for the linear layers.
    """

    def __init__(
        self,
        in_channels: int,
        convs: PlainConvs,
        units: tuple[int, ...],
        num_classes: int,
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.in_channels, self.num_classes = in_channels, num_classes
        self.convs, self.units = convs, units
        self.norm_eps, self.norm_momentum = norm_eps, norm_momentum
        self.blocks = nn.ModuleList()
        width = in_channels
        for layers in convs:
            block = nn.ModuleList()
            for filters, kernel in layers:
                block.append(ConvNormRelu(width, filters, kernel, norm_eps, norm_momentum))
                width = filters
            self.blocks.append(block)
        tail = nn.ModuleList()
        for features in units:
            tail.append(LinearNormRelu(width, features, norm_eps, norm_momentum))
            width = features
        self.blocks.append(tail)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, num_classes)."""
        last = len(self.convs) - 1
        for number, block in enumerate(self.blocks):
            assert isinstance(block, nn.ModuleList)
            for layer in block:
                x = layer(x)
            if number < last:
                x = functional.max_pool2d(x, 2, ceil_mode=True)
            elif number == last:
                x = x.mean(dim=(2, 3))
        logits: Tensor = self.classifier(x)
        return logits

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this structure."""
        names = ("in_channels", "convs", "units", "num_classes", "norm_eps", "norm_momentum")
        return {name: getattr(self, name) for name in names}
