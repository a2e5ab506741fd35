"""Search networks of DARTS and of NAS-Bench-201 as one writes them down from the papers, for comparison.

Every operation of every edge is a module that is called by itself, edges add ``w * op(x)`` one after the other, torch's
default memory layout. Parameters are made in the order of the library's networks, so that weights can be copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def sep(channels, kernel, stride, padding, dilation):
    """Return ReLU, depthwise convolution, 1x1 convolution, normalisation."""
    return [
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=False),
    ]


class Reduce(nn.Module):
    """Two 1x1 convolutions of stride 2, one on the shifted image."""

    def __init__(self, before, channels):
        super().__init__()
        self.even = nn.Conv2d(before, channels // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(before, channels // 2, 1, 2, bias=False)
        self.norm = nn.BatchNorm2d(channels, affine=False)

    def forward(self, x):
        """Halve the resolution."""
        x = F.relu(x)
        return self.norm(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], 1))


class Zero(nn.Module):
    """The operation ``none``."""

    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        """Return zeros."""
        return x[:, :, :: self.stride, :: self.stride] * 0.0


def darts_operations(channels, stride):
    """Return the eight candidates of an edge."""
    return nn.ModuleList(
        [
            Zero(stride),
            nn.Sequential(nn.MaxPool2d(3, stride, 1), nn.BatchNorm2d(channels, affine=False)),
            nn.Sequential(nn.AvgPool2d(3, stride, 1, count_include_pad=False), nn.BatchNorm2d(channels, affine=False)),
            nn.Identity() if stride == 1 else Reduce(channels, channels),
            nn.Sequential(*sep(channels, 3, stride, 1, 1), *sep(channels, 3, 1, 1, 1)),
            nn.Sequential(*sep(channels, 5, stride, 2, 1), *sep(channels, 5, 1, 2, 1)),
            nn.Sequential(*sep(channels, 3, stride, 2, 2)),
            nn.Sequential(*sep(channels, 5, stride, 4, 2)),
        ]
    )


class Mixed(nn.Module):
    """An edge: all candidates, weighted."""

    def __init__(self, operations):
        super().__init__()
        self.operations = operations

    def forward(self, x, weights):
        """Return the weighted sum."""
        return sum(w * operation(x) for w, operation in zip(weights, self.operations, strict=True))


class DartsCell(nn.Module):
    """Four nodes, fourteen edges."""

    def __init__(self, before, previous, channels, reduction, after_reduction):
        super().__init__()
        if after_reduction:
            self.pre0 = Reduce(before, channels)
        else:
            self.pre0 = nn.Sequential(
                nn.ReLU(), nn.Conv2d(before, channels, 1, bias=False), nn.BatchNorm2d(channels, affine=False)
            )
        self.pre1 = nn.Sequential(
            nn.ReLU(), nn.Conv2d(previous, channels, 1, bias=False), nn.BatchNorm2d(channels, affine=False)
        )
        self.edges = nn.ModuleList(
            Mixed(darts_operations(channels, 2 if reduction and j < 2 else 1)) for i in range(4) for j in range(2 + i)
        )

    def forward(self, s0, s1, weights):
        """Return the four nodes, concatenated."""
        states = [self.pre0(s0), self.pre1(s1)]
        offset = 0
        for _ in range(4):
            new = sum(self.edges[offset + j](state, weights[offset + j]) for j, state in enumerate(states))
            offset += len(states)
            states.append(new)
        return torch.cat(states[2:], 1)


class TextbookDarts(nn.Module):
    """The search network of DARTS; its logits are ``alphas``."""

    def __init__(self, channels, cells, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * channels, 3, padding=1, bias=False), nn.BatchNorm2d(3 * channels))
        before = previous = 3 * channels
        self.cells = nn.ModuleList()
        self.reductions = [index in (cells // 3, 2 * cells // 3) for index in range(cells)]
        after = False
        for reduction in self.reductions:
            channels = 2 * channels if reduction else channels
            self.cells.append(DartsCell(before, previous, channels, reduction, after))
            before, previous, after = previous, 4 * channels, reduction
        self.classifier = nn.Linear(previous, classes)
        self.alphas = {"normal": torch.zeros(14, 8), "reduce": torch.zeros(14, 8)}

    def forward(self, x):
        """Return class logits."""
        s0 = s1 = self.stem(x)
        weights = {name: F.softmax(alpha, -1) for name, alpha in self.alphas.items()}
        for cell, reduction in zip(self.cells, self.reductions, strict=True):
            s0, s1 = s1, cell(s0, s1, weights["reduce" if reduction else "normal"])
        return self.classifier(F.adaptive_avg_pool2d(s1, 1).flatten(1))


def nas_bench_201_operations(channels):
    """Return the five candidates of an edge."""

    def block(kernel):
        convolution = nn.Conv2d(channels, channels, kernel, 1, kernel // 2, bias=False)
        return nn.Sequential(nn.ReLU(), convolution, nn.BatchNorm2d(channels, affine=False))

    pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    return nn.ModuleList([Zero(1), nn.Identity(), block(1), block(3), pool])


class NasBench201Cell(nn.Module):
    """Three nodes behind the input, six edges."""

    def __init__(self, channels):
        super().__init__()
        self.edges = nn.ModuleList(Mixed(nas_bench_201_operations(channels)) for _ in range(6))

    def forward(self, x, weights):
        """Return the last node."""
        states, edge = [x], 0
        for _ in range(3):
            states.append(sum(self.edges[edge + j](state, weights[edge + j]) for j, state in enumerate(states)))
            edge += len(states) - 1
        return states[-1]


class Residual(nn.Module):
    """Two convolutions of stride 2 and 1 beside a pooling and a 1x1 convolution."""

    def __init__(self, before, channels):
        super().__init__()
        self.first = nn.Sequential(
            nn.ReLU(), nn.Conv2d(before, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels)
        )
        self.second = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        )
        self.project = nn.Conv2d(before, channels, 1, bias=False)

    def forward(self, x):
        """Halve the resolution."""
        return self.second(self.first(x)) + self.project(F.avg_pool2d(x, 2, 2))


class TextbookNasBench201(nn.Module):
    """The relaxed network of NAS-Bench-201; its logits are ``alphas``."""

    def __init__(self, channels, cells, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.stages = nn.ModuleList(
            nn.ModuleList(NasBench201Cell(channels * 2**stage) for _ in range(cells)) for stage in range(3)
        )
        self.reductions = nn.ModuleList(Residual(channels * 2**stage, channels * 2 ** (stage + 1)) for stage in (0, 1))
        self.norm = nn.BatchNorm2d(4 * channels)
        self.classifier = nn.Linear(4 * channels, classes)
        self.alphas = {"cell": torch.zeros(6, 5)}

    def forward(self, x):
        """Return class logits."""
        x = self.stem(x)
        weights = F.softmax(self.alphas["cell"], -1)
        for stage, cells in enumerate(self.stages):
            x = self.reductions[stage - 1](x) if stage else x
            for cell in cells:
                x = cell(x, weights)
        return self.classifier(F.adaptive_avg_pool2d(F.relu(self.norm(x)), 1).flatten(1))
