"""Primitives, cells and networks of DARTS.

Nodes of a cell are numbered: 0 is the output of the cell before the previous one, 1 the output of the previous cell,
2, 3, ... are the cell's own nodes, each the sum of two edges. An *edge* is an operation and the node that it reads.

Whatever has weights is made by a ``DenseLayers``, an object with literal arguments, so that another one can put other
layers (sparse ones, say) into the same networks. In the same way ``DartsPrimitives`` makes the operations of edges.

Source: Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", arXiv 1806.09055; where the paper is silent,
the conventions of its released networks.
"""

# B batch, C channels, H height, W width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from archsmith.layers.nasnet import drop_path


class DenseLayers(nn.Module):
    """Gives a network its convolutions and its classifier: ordinary ones. It holds nothing itself."""

    def convolution(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int = 1,
        groups: int = 1,
    ) -> nn.Module:
        """Return a convolution without bias."""
        return nn.Conv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=False)

    def linear(self, in_features: int, out_features: int) -> nn.Module:
        """Return a linear layer with bias."""
        return nn.Linear(in_features, out_features)

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this."""
        return {}


class Zeros(nn.Module):
    """The operation ``none``: the input times zero, every ``stride``-th pixel of it.

    Args:
        stride: 1 or 2.
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to zeros (B, C, H / stride, W / stride)."""
        return (x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride]) * 0.0


class Noise(nn.Module):
    """The operation ``noise``: standard normal noise of the input's shape, whatever the input is.

    It is useless on purpose: a search that chooses it has been misled (space S4 of Robust DARTS, arXiv 1909.09656).
    Drawn from torch's global generator.

    Args:
        stride: 1 or 2; with 2 the noise has the shape of every second pixel.
        always: Whether evaluation mode has noise too, as in a search network. A finished network has its mean there,
            zero, so that it is a function.
    """

    def __init__(self, stride: int, always: bool = False) -> None:
        super().__init__()
        self.stride, self.always = stride, always

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to noise (B, C, H / stride, W / stride)."""
        x = x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride]
        return torch.randn_like(x) if self.training or self.always else x * 0.0


class ReluConvBn(nn.Module):
    """ReLU, convolutions one after the other, batch normalisation.

    Args:
        convolutions: Applied in order; no other layer between them.
        channels: Channels of the last one's output.
        affine: Whether the normalisation has a scale and a shift.
    """

    def __init__(self, convolutions: tuple[nn.Module, ...], channels: int, affine: bool) -> None:
        super().__init__()
        self.relu = nn.ReLU()  # not in place: other edges read the same node
        self.convs = nn.ModuleList(convolutions)
        self.norm = nn.BatchNorm2d(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        x = self.relu(x)
        for convolution in self.convs:
            x = convolution(x)
        return self.norm(x)


class FactorizedReduce(nn.Module):
    """Halve the resolution: two 1x1 convolutions of stride 2, one of them on the image shifted by one pixel.

    Args:
        in_channels: Channels of the input (B, C, H, W), H and W even.
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
        """Map (B, C, H, W) to (B, C', H / 2, W / 2)."""
        x = self.relu(x)
        return self.norm(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], dim=1))


def relu_conv_bn(in_channels: int, out_channels: int, affine: bool, layers: DenseLayers) -> ReluConvBn:
    """Return ReLU, 1x1 convolution, normalisation: how a cell brings its inputs to its own width."""
    return ReluConvBn((layers.convolution(in_channels, out_channels, 1),), out_channels, affine)


def separable(
    channels: int, kernel: int, stride: int, padding: int, dilation: int, affine: bool, layers: DenseLayers
) -> ReluConvBn:
    """Return ReLU, depthwise convolution, pointwise convolution, normalisation; channels stay the same."""
    depthwise = layers.convolution(channels, channels, kernel, stride, padding, dilation, channels)
    return ReluConvBn((depthwise, layers.convolution(channels, channels, 1)), channels, affine)


def make_primitive(
    name: str,
    channels: int,
    stride: int,
    affine: bool,
    layers: DenseLayers,
    pool_norm: bool = False,
) -> nn.Module:
    """Return an operation of an edge; channels stay the same.

    Args:
        name: ``none``, ``max_pool_3x3``, ``avg_pool_3x3`` (the border is not counted in the average), ``skip_connect``
            (a factorised reduction at stride 2), ``sep_conv_3x3``, ``_5x5``, ``_7x7`` (a separable convolution applied
            twice), ``dil_conv_3x3``, ``_5x5`` (a dilated separable one, once), ``conv_7x1_1x7`` or ``noise``.
        channels: Channels in and out.
        stride: 1 or 2.
        affine: Whether normalisations have a scale and a shift.
        layers: Makes the convolutions.
        pool_norm: Whether a pooling is followed by a normalisation without scale and shift, as in the search network.

    Raises:
        ValueError: Unknown name.
    """
    if name == "none":
        return Zeros(stride)
    if name == "noise":
        return Noise(stride)
    if name in ("max_pool_3x3", "avg_pool_3x3"):
        pool: nn.Module = nn.MaxPool2d(3, stride, 1)
        if name == "avg_pool_3x3":
            pool = nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        return nn.Sequential(pool, nn.BatchNorm2d(channels, affine=False)) if pool_norm else pool
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine, layers)
    if name in ("sep_conv_3x3", "sep_conv_5x5", "sep_conv_7x7"):
        kernel = int(name[-1])
        return nn.Sequential(
            separable(channels, kernel, stride, kernel // 2, 1, affine, layers),
            separable(channels, kernel, 1, kernel // 2, 1, affine, layers),
        )
    if name in ("dil_conv_3x3", "dil_conv_5x5"):
        kernel = int(name[-1])
        return separable(channels, kernel, stride, kernel - 1, 2, affine, layers)
    if name == "conv_7x1_1x7":
        wide = layers.convolution(channels, channels, (1, 7), (1, stride), (0, 3))
        tall = layers.convolution(channels, channels, (7, 1), (stride, 1), (3, 0))
        return ReluConvBn((wide, tall), channels, affine)
    raise ValueError(
        f"operation: got {name!r}; allowed: the primitives of DARTS, 'sep_conv_7x7', 'conv_7x1_1x7', 'noise'."
    )


class DartsPrimitives(nn.Module):
    """Gives cells the operations of their edges: those of DARTS. It holds nothing itself.

    Attributes:
        auxiliary_norm: Whether the auxiliary classifier for large images has its second normalisation (in the published
            runs of DARTS it has none).
    """

    auxiliary_norm = False

    def operation(
        self, name: str, channels: int, stride: int, affine: bool, layers: DenseLayers, pool_norm: bool = False
    ) -> nn.Module:
        """Return an operation of an edge, see ``make_primitive``."""
        return make_primitive(name, channels, stride, affine, layers, pool_norm)

    def halving(self, in_channels: int, out_channels: int, affine: bool, layers: DenseLayers) -> nn.Module:
        """Return what halves an input of a cell, see ``FactorizedReduce``."""
        return FactorizedReduce(in_channels, out_channels, affine, layers)

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this."""
        return {}


class DartsCell(nn.Module):
    """A finished cell: both inputs brought to C channels, nodes that sum two edges each, concatenation.

    Args:
        edges: (operation, source) of the two edges of each own node, node by node.
        concat: Nodes that make the output, concatenated.
        before_channels: Channels of node 0's input (B, C, H, W).
        previous_channels: Channels of node 1's input.
        channels: C, channels of every own node.
        reduction: Whether the cell halves the resolution: the edges that read an input have stride 2, no others.
        after_reduction: Whether the previous cell did, so that node 0's input has twice the resolution of node 1's.
        affine: Whether normalisations have a scale and a shift.
        pool_norm: Whether poolings are followed by a normalisation.
        layers: Makes the convolutions.
        primitives: Makes the operations; those of DARTS if None.

    ``drop_path`` is the probability with which, in training mode, the result of an operation is dropped, sample by
    sample; a plain identity never is.
    """

    def __init__(
        self,
        edges: tuple[tuple[str, int], ...],
        concat: tuple[int, ...],
        before_channels: int,
        previous_channels: int,
        channels: int,
        reduction: bool,
        after_reduction: bool,
        affine: bool,
        pool_norm: bool,
        layers: DenseLayers,
        primitives: DartsPrimitives | None = None,
    ) -> None:
        super().__init__()
        primitives = DartsPrimitives() if primitives is None else primitives
        self.sources = tuple(source for _, source in edges)
        self.concat = tuple(concat)
        self.drop_path = 0.0
        self.before = input_layer(before_channels, channels, after_reduction, affine, layers, primitives)
        self.previous = input_layer(previous_channels, channels, False, affine, layers, primitives)
        self.operations = nn.ModuleList(
            primitives.operation(name, channels, 2 if reduction and source < 2 else 1, affine, layers, pool_norm)
            for name, source in edges
        )

    def forward(self, before: Tensor, previous: Tensor) -> Tensor:
        """Map the two inputs to (B, len(concat) * C, H', W')."""
        nodes = [self.before(before), self.previous(previous)]
        for first in range(0, len(self.sources), 2):
            one, other = (self._edge(edge, nodes[self.sources[edge]]) for edge in (first, first + 1))
            nodes.append(one + other)
        return torch.cat([nodes[node] for node in self.concat], dim=1)

    def _edge(self, edge: int, x: Tensor) -> Tensor:
        operation = self.operations[edge]
        y: Tensor = operation(x)
        if self.training and self.drop_path > 0 and not isinstance(operation, nn.Identity):
            y = drop_path(y, 1.0 - self.drop_path)
        return y


def input_layer(
    in_channels: int,
    channels: int,
    halve: bool,
    affine: bool,
    layers: DenseLayers,
    primitives: DartsPrimitives | None = None,
) -> nn.Module:
    """Return what brings an input of a cell to its width, and to half the resolution where ``halve``."""
    if halve:
        return (primitives or DartsPrimitives()).halving(in_channels, channels, affine, layers)
    return relu_conv_bn(in_channels, channels, affine, layers)


class ImageNetStem(nn.Module):
    """Three convolutions of stride 2 for large images; gives the first cell both its inputs.

    Args:
        in_channels: Channels of the images (B, C, H, W), H and W multiples of 8.
        channels: Channels of both outputs, even.
        layers: Makes the convolutions.
    """

    def __init__(self, in_channels: int, channels: int, layers: DenseLayers) -> None:
        super().__init__()
        self.first = nn.Sequential(
            layers.convolution(in_channels, channels // 2, 3, 2, 1),
            nn.BatchNorm2d(channels // 2),
            nn.ReLU(),
            layers.convolution(channels // 2, channels, 3, 2, 1),
            nn.BatchNorm2d(channels),
        )
        self.second = ReluConvBn((layers.convolution(channels, channels, 3, 2, 1),), channels, True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return maps at a quarter and at an eighth of the image's resolution."""
        first: Tensor = self.first(x)
        return first, self.second(first)


class AuxiliaryClassifier(nn.Module):
    """Classifier at two thirds of the depth, for training only.

    ReLU, average pooling to 2x2, 1x1 convolution to 128, normalisation, ReLU, 2x2 convolution to 768, normalisation
    (not for large images: the published runs have none there), ReLU, linear.

    Args:
        channels: Channels of the input, (B, C, 8, 8), or (B, C, 7, 7) for large images.
        num_classes: Width of the output (B, num_classes).
        stride: Of the pooling: 3, or 2 for large images.
        last_norm: Whether there is the second normalisation.
    """

    def __init__(self, channels: int, num_classes: int, stride: int, last_norm: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, stride, 0, count_include_pad=False),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768) if last_norm else nn.Identity(),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes)."""
        logits: Tensor = self.classifier(self.features(x).flatten(1))
        return logits


def reduction_cells(cells: int) -> tuple[int, ...]:
    """Return the numbers of the cells that halve the resolution: those at one third and at two thirds of the depth."""
    return tuple(sorted({cells // 3, 2 * cells // 3}))


class DartsNetwork(nn.Module):
    """Image classifier stacked from two kinds of cells.

    Stem; ``cells`` cells, of which those of ``reduction_cells`` halve the resolution and double C; global average
    pooling; linear classifier. Every cell reads the two layers in front of it.

    Args:
        in_channels: Channels of the images (B, C, H, W). H and W are multiples of 4 ("cifar") or 32 ("imagenet"); of 1
            if the primitives halve odd sizes too.
        num_classes: Width of the output (B, num_classes).
        channels: C, channels of the nodes of the first cells.
        cells: Number of cells, at least 3.
        normal: (operation, source) of the two edges of each node of a normal cell.
        reduce: The same of a reduction cell.
        normal_concat: Nodes that make the output of a normal cell.
        reduce_concat: The same of a reduction cell.
        stem: "cifar": one 3x3 convolution to 3 C; or "imagenet", see ``ImageNetStem``.
        auxiliary: Whether there is an auxiliary classifier, behind cell ``2 * cells // 3``.
        affine: Whether normalisations of cells have a scale and a shift; that of the stem always has.
        pool_norm: Whether poolings are followed by a normalisation without scale and shift, as in the search network.
        layers: Makes convolutions and classifier, ordinary ones by default; the auxiliary classifier is always dense.
        primitives: Makes the operations of the edges, those of DARTS by default.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: int,
        cells: int,
        normal: tuple[tuple[str, int], ...],
        reduce: tuple[tuple[str, int], ...],
        normal_concat: tuple[int, ...] = (2, 3, 4, 5),
        reduce_concat: tuple[int, ...] = (2, 3, 4, 5),
        stem: str = "cifar",
        auxiliary: bool = False,
        affine: bool = True,
        pool_norm: bool = False,
        layers: DenseLayers | None = None,
        primitives: DartsPrimitives | None = None,
    ) -> None:
        super().__init__()
        self.arguments = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "channels": channels,
            "cells": cells,
            "normal": normal,
            "reduce": reduce,
            "normal_concat": normal_concat,
            "reduce_concat": reduce_concat,
            "stem": stem,
            "auxiliary": auxiliary,
            "affine": affine,
            "pool_norm": pool_norm,
        }
        self.layers = DenseLayers() if layers is None else layers
        self.primitives = DartsPrimitives() if primitives is None else primitives
        self.stem = make_stem(stem, in_channels, channels, self.layers)
        before = previous = 3 * channels if stem == "cifar" else channels
        after_reduction = stem == "imagenet"
        self.cells = nn.ModuleList()
        self.auxiliary_cell = 2 * cells // 3
        self.auxiliary: AuxiliaryClassifier | None = None
        for index in range(cells):
            reduction = index in reduction_cells(cells)
            channels = 2 * channels if reduction else channels
            edges, concat = (reduce, reduce_concat) if reduction else (normal, normal_concat)
            self.cells.append(
                DartsCell(
                    edges,
                    concat,
                    before,
                    previous,
                    channels,
                    reduction,
                    after_reduction,
                    affine,
                    pool_norm,
                    self.layers,
                    self.primitives,
                )
            )
            before, previous, after_reduction = previous, len(concat) * channels, reduction
            if auxiliary and index == self.auxiliary_cell:
                small = stem == "cifar"
                last_norm = small or self.primitives.auxiliary_norm
                self.auxiliary = AuxiliaryClassifier(previous, num_classes, 3 if small else 2, last_norm)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = self.layers.linear(previous, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, C, H, W)."""
        return self.features(x)[0]

    def forward_with_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the logits and the auxiliary classifier's logits (None without one), both (B, num_classes)."""
        logits, middle = self.features(x)
        return logits, None if self.auxiliary is None else self.auxiliary(middle)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the output of the cell at two thirds of the depth."""
        before, previous = stem_outputs(self.stem, x)
        middle = previous
        for index, cell in enumerate(self.cells):
            before, previous = previous, cell(before, previous)
            if index == self.auxiliary_cell:
                middle = previous
        logits: Tensor = self.classifier(self.pool(previous).flatten(1))
        return logits, middle

    def set_drop_path(self, probability: float) -> None:
        """Set the probability with which operations are dropped in training mode; the paper raises it linearly."""
        for cell in self.cells:
            assert isinstance(cell, DartsCell)
            cell.drop_path = probability

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this structure."""
        made: dict[str, Any] = {}
        if type(self.layers) is not DenseLayers:
            made["layers"] = self.layers
        if type(self.primitives) is not DartsPrimitives:
            made["primitives"] = self.primitives
        return {**self.arguments, **made}


def make_stem(stem: str, in_channels: int, channels: int, layers: DenseLayers) -> nn.Module:
    """Return the layers in front of the first cell, see ``DartsNetwork``."""
    if stem == "imagenet":
        return ImageNetStem(in_channels, channels, layers)
    return nn.Sequential(layers.convolution(in_channels, 3 * channels, 3, 1, 1), nn.BatchNorm2d(3 * channels))


def stem_outputs(stem: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return both inputs of the first cell; the small stem gives the same twice."""
    y: Tensor | tuple[Tensor, Tensor] = stem(x)
    return (y, y) if isinstance(y, Tensor) else y
