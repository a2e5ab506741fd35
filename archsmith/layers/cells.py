"""Cells whose operations sit on the edges of a dense graph, and the NAS-Bench-201 network stacked from them.

Source: NAS-Bench-201, arXiv 2001.00326.
"""

# B batch, C channels, H height, W width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Zero(nn.Module):
    """The operation ``none``: the input times zero, so that shapes and gradients (all zero) stay defined."""

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros of the shape of ``x``."""
        return x * 0.0


class ReluConvNorm(nn.Module):
    """ReLU, convolution without bias, batch normalisation: the pre-activation order of cell-based networks.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        out_channels: Channels of the output.
        kernel: Odd kernel size; the padding is ``(kernel - 1) / 2``.
        stride: Stride of the convolution.
        affine: Whether the normalisation has a scale and a shift.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, affine: bool = True) -> None:
        super().__init__()
        self.relu = nn.ReLU()  # not in place: other edges read the same node
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=(kernel - 1) // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        return self.norm(self.conv(self.relu(x)))


def make_edge_operation(name: str, channels: int, affine: bool = True) -> nn.Module:
    """Return one operation of an edge; channels and resolution stay the same.

    Args:
        name: ``none``, ``skip_connect``, ``nor_conv_1x1``, ``nor_conv_3x3`` or ``avg_pool_3x3`` (the border is padded
            and padding is not counted in the average).
        channels: Channels in and out.
        affine: Whether normalisations have a scale and a shift.

    Raises:
        ValueError: Unknown name.
    """
    if name == "none":
        return Zero()
    if name == "skip_connect":
        return nn.Identity()
    if name == "nor_conv_1x1":
        return ReluConvNorm(channels, channels, 1, 1, affine)
    if name == "nor_conv_3x3":
        return ReluConvNorm(channels, channels, 3, 1, affine)
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    raise ValueError(
        f"operation: got {name!r}; allowed: 'none', 'skip_connect', 'nor_conv_1x1', 'nor_conv_3x3', 'avg_pool_3x3'."
    )


class DenseCell(nn.Module):
    """A dense graph of nodes: ``x_j = sum_{i<j} operation_ij(x_i)``; node 0 is the input, the last one the output.

    Args:
        operations: Names for the edges in the order 0-1, 0-2, 1-2, 0-3, 1-3, 2-3, ...: by target, then by source.
        channels: Channels of every node.
        affine: Whether normalisations have a scale and a shift.

    Raises:
        ValueError: The number of operations is not ``n (n - 1) / 2`` for a number of nodes n, or a name is unknown.
    """

    def __init__(self, operations: tuple[str, ...], channels: int, affine: bool = True) -> None:
        super().__init__()
        self.nodes = 1
        while self.nodes * (self.nodes - 1) // 2 < len(operations):
            self.nodes += 1
        if self.nodes < 2 or self.nodes * (self.nodes - 1) // 2 != len(operations):
            raise ValueError(f"operations: a dense cell of n nodes has n (n - 1) / 2 edges, got {len(operations)}.")
        self.operations = tuple(operations)
        self.edges = nn.ModuleList([make_edge_operation(name, channels, affine) for name in operations])

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        states = [x]
        for target in range(1, self.nodes):
            first = target * (target - 1) // 2
            total = self.edges[first](states[0])
            for source in range(1, target):
                total = total + self.edges[first + source](states[source])
            states.append(total)
        return states[-1]


class ResidualReduction(nn.Module):
    """Residual block with stride 2: two convolutions, beside an average pooling and a 1x1 convolution without norm.

    Args:
        in_channels: Channels of the input (B, C, H, W), H and W even.
        out_channels: Channels of the output (B, C', H / 2, W / 2).
        affine: Whether normalisations have a scale and a shift.
    """

    def __init__(self, in_channels: int, out_channels: int, affine: bool = True) -> None:
        super().__init__()
        self.first = ReluConvNorm(in_channels, out_channels, 3, 2, affine)
        self.second = ReluConvNorm(out_channels, out_channels, 3, 1, affine)
        self.pool = nn.AvgPool2d(2, stride=2)
        self.project = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / 2, W / 2)."""
        return self.second(self.first(x)) + self.project(self.pool(x))


class NasBench201Network(nn.Module):
    """Image classifier: three stages of one repeated cell, residual reductions between them.

    Stem 3x3 with norm; N cells at C; reduction to 2C; N cells at 2C; reduction to 4C; N cells at 4C; norm and ReLU;
    global average pooling; linear.

    Args:
        in_channels: Channels of the images (B, C, H, W); H and W are multiples of 4.
        num_classes: Width of the output (B, num_classes).
        channels: Channels C of the first stage, 16 in the benchmark.
        cells: Cells N of each stage, 5 in the benchmark.
        operations: Operations of the cell's edges, see ``DenseCell``; all cells have the same.
        affine: Whether the normalisations of cells and reductions have a scale and a shift; the first and the last
            always have.

    Source: NAS-Bench-201, arXiv 2001.00326.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: int,
        cells: int,
        operations: tuple[str, ...],
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.affine = affine
        self.operations = tuple(operations)
        self.cells_per_stage = cells
        self.stem = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels)
        self.stages = nn.ModuleList()
        self.reductions = nn.ModuleList()
        for stage in range(3):
            width = channels * 2**stage
            if stage:
                self.reductions.append(ResidualReduction(width // 2, width, affine))
            self.stages.append(nn.ModuleList([DenseCell(self.operations, width, affine) for _ in range(cells)]))
        self.last_norm = nn.BatchNorm2d(4 * channels)
        self.last_relu = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(4 * channels, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """Return the last feature map (B, 4C, H / 4, W / 4), behind its ReLU."""
        x = self.stem_norm(self.stem(x))
        x = self._stage(0, x)
        x = self._stage(1, self.reductions[0](x))
        x = self._stage(2, self.reductions[1](x))
        return self.last_relu(self.last_norm(x))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, C, H, W)."""
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))

    def cells(self) -> list[DenseCell]:
        """Return all cells in their order."""
        return [module for module in self.modules() if isinstance(module, DenseCell)]

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this structure."""
        return {
            "in_channels": self.stem.in_channels,
            "num_classes": self.classifier.out_features,
            "channels": self.stem.out_channels,
            "cells": self.cells_per_stage,
            "operations": self.operations,
            "affine": self.affine,
        }

    def _stage(self, index: int, x: Tensor) -> Tensor:
        stage = self.stages[index]
        assert isinstance(stage, nn.ModuleList)
        for cell in stage:
            x = cell(x)
        return x
