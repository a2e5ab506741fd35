"""The blocks of sharpDARTS: balanced separable convolutions, poolings that may change the width, a padded reduction.

In DARTS a dilated convolution is one round and a separable one two, so that some primitives are cheaper by accident.
Here one block stands behind all of them: always two rounds, with a middle width of its own.

Source: Hundt, Jain, Hager, "sharpDARTS: Faster and More Accurate Differentiable Architecture Search", arXiv 1903.09900;
sizes and paddings are those of its released networks.
"""

# B batch, C channels, H height, W width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from archsmith.layers.darts import DartsPrimitives, DenseLayers, ReluConvBn, Zeros

SHARP_CONVOLUTIONS = {
    "sep_conv_3x3": (3, 1, 1),
    "sep_conv_5x5": (5, 1, 1),
    "sep_conv_7x7": (7, 1, 1),
    "dil_conv_3x3": (3, 2, 1),
    "dil_conv_5x5": (5, 2, 1),
    "flood_conv_3x3": (3, 1, 4),
    "flood_conv_5x5": (5, 1, 4),
    "dil_flood_conv_3x3": (3, 2, 4),
    "choke_conv_3x3": (3, 1, 0),
    "dil_choke_conv_3x3": (3, 2, 0),
}
"""Kernel, dilation of the first round, and width of the middle as a multiple of the output's; 0: a fixed width."""

CHOKE = 32
"""The fixed middle width of choke convolutions; narrower networks are flooded by it."""


class SharpSepConv(nn.Module):
    """Two rounds of ReLU, depthwise convolution, pointwise convolution and batch normalisation.

    Stride and dilation are those of the first depthwise convolution; the second has neither. The pointwise one of the
    first round leads to the middle width, that of the second to the output's.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        out_channels: Channels of the output.
        kernel: Size of both depthwise kernels, odd.
        stride: 1 or 2; sides are halved rounding up.
        dilation: Of the first depthwise convolution.
        middle: Channels between the rounds; the output's if None.
        affine: Whether normalisations have a scale and a shift.
        layers: Makes the convolutions, ordinary ones by default.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        dilation: int = 1,
        middle: int | None = None,
        affine: bool = True,
        layers: DenseLayers | None = None,
    ) -> None:
        super().__init__()
        layers = DenseLayers() if layers is None else layers
        middle = out_channels if middle is None else middle
        reach = dilation * (kernel // 2)
        self.first = ReluConvBn(
            (
                layers.convolution(in_channels, in_channels, kernel, stride, reach, dilation, in_channels),
                layers.convolution(in_channels, middle, 1),
            ),
            middle,
            affine,
        )
        self.second = ReluConvBn(
            (
                layers.convolution(middle, middle, kernel, 1, kernel // 2, 1, middle),
                layers.convolution(middle, out_channels, 1),
            ),
            out_channels,
            affine,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        y: Tensor = self.second(self.first(x))
        return y


class ResizablePool(nn.Module):
    """3x3 pooling; where the width changes, a 1x1 convolution and a normalisation follow.

    An average counts the zeros of the border, unlike that of DARTS.

    Args:
        kind: "max" or "avg".
        in_channels: Channels of the input (B, C, H, W).
        out_channels: Channels of the output.
        stride: 1 or 2; sides are halved rounding up.
        affine: Whether the normalisation has a scale and a shift.
        layers: Makes the convolution, an ordinary one by default.
    """

    def __init__(
        self,
        kind: str,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        affine: bool = True,
        layers: DenseLayers | None = None,
    ) -> None:
        super().__init__()
        self.pool: nn.Module = nn.MaxPool2d(3, stride, 1) if kind == "max" else nn.AvgPool2d(3, stride, 1)
        self.resize: nn.Module = nn.Identity()
        if in_channels != out_channels:
            layers = DenseLayers() if layers is None else layers
            norm = nn.BatchNorm2d(out_channels, eps=1e-3, affine=affine)
            self.resize = nn.Sequential(layers.convolution(in_channels, out_channels, 1), norm)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        y: Tensor = self.resize(self.pool(x))
        return y


class PaddedReduce(nn.Module):
    """Halve the resolution of any size, rounding up: the factorised reduction of DARTS, padded right and below.

    The second of its convolutions reads the image shifted by one pixel, whose last row and column are zeros. On even
    sides it never reads those, and the whole is the reduction of DARTS.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        out_channels: Channels of the output, even; each convolution makes half of them.
        affine: Whether the normalisation has a scale and a shift.
        layers: Makes the convolutions.

    Raises:
        ValueError: ``out_channels`` is odd.
    """

    def __init__(self, in_channels: int, out_channels: int, affine: bool, layers: DenseLayers) -> None:
        super().__init__()
        if out_channels % 2:
            raise ValueError(f"channels: got {out_channels}; allowed: an even number, where a cell halves.")
        self.relu = nn.ReLU()
        self.even = layers.convolution(in_channels, out_channels // 2, 1, 2)
        self.odd = layers.convolution(in_channels, out_channels // 2, 1, 2)
        self.norm = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2))."""
        x = self.relu(x)
        shifted = functional.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        y: Tensor = self.norm(torch.cat([self.even(x), self.odd(shifted)], dim=1))
        return y


def make_sharp_primitive(
    name: str,
    in_channels: int,
    out_channels: int,
    stride: int,
    affine: bool,
    layers: DenseLayers,
    choke: int = CHOKE,
) -> nn.Module:
    """Return a primitive.

    Args:
        name: ``none``, ``skip_connect`` (a padded reduction at stride 2), ``max_pool_3x3``, ``avg_pool_3x3`` or a name
            of ``SHARP_CONVOLUTIONS``.
        in_channels: Channels of the input.
        out_channels: Channels of the output; the input's for ``none`` and a skip of stride 1.
        stride: 1 or 2.
        affine: Whether normalisations have a scale and a shift.
        layers: Makes the convolutions.
        choke: The fixed middle width of choke convolutions.

    Raises:
        ValueError: Unknown name, or one that cannot change the width.
    """
    if name in SHARP_CONVOLUTIONS:
        kernel, dilation, multiple = SHARP_CONVOLUTIONS[name]
        middle = out_channels * multiple if multiple else choke
        return SharpSepConv(in_channels, out_channels, kernel, stride, dilation, middle, affine, layers)
    if name in ("max_pool_3x3", "avg_pool_3x3"):
        return ResizablePool(name[:3], in_channels, out_channels, stride, affine, layers)
    if name == "skip_connect" and stride == 2:
        return PaddedReduce(in_channels, out_channels, affine, layers)
    if name in ("none", "skip_connect") and in_channels == out_channels:
        return Zeros(stride) if name == "none" else nn.Identity()
    raise ValueError(
        f"operation: got {name!r} from {in_channels} to {out_channels} channels; "
        f"allowed: none and skip_connect, which keep them, max_pool_3x3, avg_pool_3x3, {', '.join(SHARP_CONVOLUTIONS)}."
    )


def sharp_size(name: str, in_channels: int, out_channels: int, choke: int = CHOKE) -> tuple[int, int]:
    """Return the multiply-accumulates of a primitive for one pixel of its output, and its parameters.

    Args:
        name: A pooling or a name of ``SHARP_CONVOLUTIONS``.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        choke: The fixed middle width of choke convolutions.
    """
    if name in SHARP_CONVOLUTIONS:
        kernel, _, multiple = SHARP_CONVOLUTIONS[name]
        middle = out_channels * multiple if multiple else choke
        macs = (kernel**2 + middle) * in_channels + (kernel**2 + out_channels) * middle
        return macs, macs + 2 * middle + 2 * out_channels
    resized = 0 if in_channels == out_channels else in_channels * out_channels
    return resized, resized + (2 * out_channels if resized else 0)


class SharpPrimitives(DartsPrimitives):
    """Gives cells the operations of sharpDARTS in place of those of DARTS.

    Args:
        choke: The fixed middle width of choke convolutions.
    """

    auxiliary_norm = True

    def __init__(self, choke: int = CHOKE) -> None:
        super().__init__()
        self.choke = choke

    def operation(
        self, name: str, channels: int, stride: int, affine: bool, layers: DenseLayers, pool_norm: bool = False
    ) -> nn.Module:
        """Return an operation of an edge, a pooling followed by a plain normalisation where ``pool_norm``."""
        primitive = make_sharp_primitive(name, channels, channels, stride, affine, layers, self.choke)
        if pool_norm and isinstance(primitive, ResizablePool):
            return nn.Sequential(primitive, nn.BatchNorm2d(channels, affine=False))
        return primitive

    def halving(self, in_channels: int, out_channels: int, affine: bool, layers: DenseLayers) -> nn.Module:
        """Return what halves an input of a cell, also one of odd sides."""
        return PaddedReduce(in_channels, out_channels, affine, layers)

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this."""
        return {"choke": self.choke}
