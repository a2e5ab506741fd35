"""Inverted residual blocks with a shortcut around every one of them, and the networks of BigNAS and AttentiveNAS.

A block whose shape changes has a shortcut too: a 2x2 average pooling where the stride is 2, then a 1x1 convolution
without normalisation where the width changes. So a block may start as its shortcut (last normalisation scale zero),
whatever its shape.

Sources: BigNAS, arXiv 2003.11142; AttentiveNAS, arXiv 2011.09011.
"""

# B batch, C channels, H height, W width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from archsmith.layers.mobile import ConvNormAct, make_activation


class Resize(nn.Module):
    """Bicubic resizing to a fixed size; images of that size pass unchanged.

    Args:
        size: Height and width of the output.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, *size)."""
        if (x.shape[-2], x.shape[-1]) == tuple(self.size):
            return x
        return functional.interpolate(x, size=list(self.size), mode="bicubic", align_corners=False)


class ChannelGate(nn.Module):
    """Squeeze-and-excitation (arXiv 1709.01507) with ReLU inside and hard sigmoids as gates.

    Args:
        channels: Channels of input and output.
        hidden: Width of the bottleneck.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.activation = nn.ReLU(inplace=True)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` (B, C, H, W) scaled channel by channel."""
        return x * self.gate(self.expand(self.activation(self.reduce(self.pool(x)))))


class DropConnect(nn.Module):
    """Drops the whole input of randomly chosen examples while training, and divides the others by what is kept.

    Args:
        rate: Probability of dropping an example, in [0, 1).

    Source: stochastic depth, arXiv 1603.09382.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        if not self.training or self.rate == 0.0:
            return x
        kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.rate
        return x * (kept.to(x.dtype) / (1.0 - self.rate))


class Shortcut(nn.Module):
    """What a block adds to its body: the input, pooled where the stride is 2, projected where the width changes.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        out_channels: Channels of the output.
        stride: 1 or 2. At stride 2 the output sides are rounded up, like those of the body.
        idle: Have the projection even where the width stays the same; it is bypassed then (supernets need it, whose
            narrower networks do change the width).

    Attributes:
        projects: Whether the projection is used.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, idle: bool = False) -> None:
        super().__init__()
        self.projects = in_channels != out_channels
        self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if stride == 2 else nn.Identity()
        self.project = nn.Conv2d(in_channels, out_channels, 1, bias=False) if self.projects or idle else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        x = self.pool(x)
        return self.project(x) if self.projects else x


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, channel gate, projection: the body of a block, without its shortcut.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        out_channels: Channels of the output.
        stride: 1 or 2.
        kernel: Depthwise kernel size, odd.
        hidden: Channels of the depthwise convolution.
        expand: Whether a 1x1 convolution makes them; else they are the input's.
        squeeze: Bottleneck width of the channel gate, 0 for none.
        activation: "relu", "relu6" or "swish".
        norm_eps: Epsilon of all normalisations.
        norm_momentum: Momentum of their running statistics.

    Raises:
        ValueError: Without expansion the hidden width must be that of the input.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        kernel: int,
        hidden: int,
        expand: bool = True,
        squeeze: int = 0,
        activation: str = "swish",
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
    ) -> None:
        super().__init__()
        if not expand and hidden != in_channels:
            raise ValueError(f"hidden: got {hidden}; allowed: {in_channels}, the input's width, without an expansion.")
        self.expand = (
            ConvNormAct(in_channels, hidden, 1, 1, activation, norm_eps, norm_momentum) if expand else nn.Identity()
        )
        self.depthwise = nn.Conv2d(hidden, hidden, kernel, stride, padding=(kernel - 1) // 2, groups=hidden, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(hidden, eps=norm_eps, momentum=norm_momentum)
        self.activation = make_activation(activation)
        self.gate = ChannelGate(hidden, squeeze) if squeeze else nn.Identity()
        self.project = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(out_channels, eps=norm_eps, momentum=norm_momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        hidden = self.activation(self.depthwise_norm(self.depthwise(self.expand(x))))
        return self.project_norm(self.project(self.gate(hidden)))


class ResidualEverywhere(nn.Module):
    """An inverted residual and its shortcut, whatever the shapes.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        out_channels: Channels of the output.
        stride: 1 or 2.
        kernel: Depthwise kernel size, odd.
        hidden: Channels of the depthwise convolution.
        expand: See ``InvertedResidual``.
        squeeze: See ``InvertedResidual``.
        activation: "relu", "relu6" or "swish".
        norm_eps: Epsilon of all normalisations.
        norm_momentum: Momentum of their running statistics.
        drop_connect: Probability with which an example's body is left out while training.
        idle: See ``Shortcut``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        kernel: int,
        hidden: int,
        expand: bool = True,
        squeeze: int = 0,
        activation: str = "swish",
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
        drop_connect: float = 0.0,
        idle: bool = False,
    ) -> None:
        super().__init__()
        self.body = InvertedResidual(
            in_channels,
            out_channels,
            stride,
            kernel,
            hidden,
            expand,
            squeeze,
            activation,
            norm_eps,
            norm_momentum,
        )
        self.drop = DropConnect(drop_connect)
        self.shortcut = Shortcut(in_channels, out_channels, stride, idle)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        return self.drop(self.body(x)) + self.shortcut(x)


class BigNasNet(nn.Module):
    """Image classifier: resize, stem 3x3, blocks, 1x1 convolution, pooling, perhaps a second 1x1, dropout, linear.

    Args:
        in_channels: Channels of the images, (B, C, H, W).
        num_classes: Width of the output (B, num_classes).
        resolution: Height and width to which images are resized first.
        stem_channels: Width of the first convolution.
        stem_stride: Its stride.
        stages: For each stage its blocks, each ``(out_channels, stride, kernel, hidden, expand, squeeze)``, see
            ``InvertedResidual``.
        last_channels: Width of the 1x1 convolution before pooling.
        mix_channels: Width of a 1x1 convolution with activation, without normalisation, behind the pooling; 0: none.
        activation: "relu", "relu6" or "swish", everywhere but in the channel gates.
        dropout: Drop probability in front of the classifier.
        drop_connect: One probability for each block of all stages in order; empty: none.
        norm_eps: Epsilon of every normalisation.
        norm_momentum: Momentum of every running statistic.
        idle: Have the projections of shortcuts also where they are bypassed, see ``Shortcut``.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        resolution: tuple[int, int],
        stem_channels: int,
        stem_stride: int,
        stages: tuple[tuple[tuple[int, int, int, int, bool, int], ...], ...],
        last_channels: int,
        mix_channels: int = 0,
        activation: str = "swish",
        dropout: float = 0.0,
        drop_connect: tuple[float, ...] = (),
        norm_eps: float = 1e-5,
        norm_momentum: float = 0.1,
        idle: bool = False,
    ) -> None:
        super().__init__()
        norm = (norm_eps, norm_momentum)
        self.arguments: dict[str, Any] = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "resolution": tuple(resolution),
            "stem_channels": stem_channels,
            "stem_stride": stem_stride,
            "stages": tuple(tuple(tuple(block) for block in stage) for stage in stages),
            "last_channels": last_channels,
            "mix_channels": mix_channels,
            "activation": activation,
            "dropout": dropout,
            "drop_connect": tuple(drop_connect),
            "norm_eps": norm_eps,
            "norm_momentum": norm_momentum,
            "idle": idle,
        }
        self.resize = Resize((resolution[0], resolution[1]))
        self.stem = ConvNormAct(in_channels, stem_channels, 3, stem_stride, activation, *norm)
        rates = list(drop_connect) or [0.0] * sum(len(stage) for stage in stages)
        self.stages = nn.ModuleList()
        channels, number = stem_channels, 0
        for stage in stages:
            blocks = nn.ModuleList()
            for out_channels, stride, kernel, hidden, expand, squeeze in stage:
                shape = (channels, out_channels, stride, kernel, hidden, expand, squeeze)
                blocks.append(ResidualEverywhere(*shape, activation, *norm, rates[number], idle))
                channels, number = out_channels, number + 1
            self.stages.append(blocks)
        self.last = ConvNormAct(channels, last_channels, 1, 1, activation, *norm)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.mix = (
            nn.Sequential(nn.Conv2d(last_channels, mix_channels, 1, bias=False), make_activation(activation))
            if mix_channels
            else nn.Identity()
        )
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(mix_channels or last_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, C, H, W) of any size."""
        x = self.stem(self.resize(x))
        for stage in self.stages:
            assert isinstance(stage, nn.ModuleList)
            for block in stage:
                x = block(x)
        x = self.mix(self.pool(self.last(x))).flatten(1)
        logits: Tensor = self.classifier(self.dropout(x))
        return logits

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this structure."""
        return dict(self.arguments)
