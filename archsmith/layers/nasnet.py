"""Cells of two-input blocks and the networks that stack them: NASNet-A and every other point of its space.

A *state* of a cell is numbered: 0 is the output of the previous layer (h0), 1 the output of the layer before it (h1),
2, 3, ... are the results of the blocks. A *block* is ``(first, second, first_op, second_op, combiner)``: two states, an
operation for each, and "add" or "concat".

Source: Zoph et al., "Learning Transferable Architectures for Scalable Image Recognition", arXiv 1707.07012; the
conventions of the released networks where the paper is silent (padding as TensorFlow's SAME, normalisation constants).
"""

# B batch, C channels, H height, W width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

NasnetBlock = tuple[int, int, str, str, str]


def drop_path(x: Tensor, keep: float) -> Tensor:
    """Return ``x / keep`` for the samples that stay and 0 for the others; the expectation is ``x``.

    Args:
        x: Shape (B, ...). Each sample has its own mask: one with ``u < keep`` for a uniform ``u`` stays, which is the
            published ``floor(keep + u)`` without its rounding near 2.
        keep: Probability that a sample's path stays, in (0, 1].
    """
    uniform = torch.rand((x.shape[0],) + (1,) * (x.dim() - 1), dtype=x.dtype, device=x.device)
    return x * (uniform < keep) / keep


def scheduled_keep(final_keep: float, cell: int, cells: int, progress: float) -> float:
    """Return the keep probability of ScheduledDropPath: ``1 - min(1, t/T) * ((c + 1) / C) * (1 - p)``.

    Args:
        final_keep: p, what the last cell has at the end of training.
        cell: c, number of the cell from 0, stem cells and reduction cells included.
        cells: C, number of all cells.
        progress: t/T, part of the training that is over; more than 1 counts as 1.
    """
    return 1.0 - min(1.0, progress) * ((cell + 1) / cells) * (1.0 - final_keep)


def same_pads(length: int, kernel: int, stride: int) -> tuple[int, int]:
    """Return the zeros (before, after) that make ``ceil(length / stride)`` outputs, as TensorFlow's SAME padding."""
    total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
    return total // 2, total - total // 2


class SameConv(nn.Module):
    """Convolution without bias whose output has ``ceil(size / stride)`` pixels, padded as TensorFlow's SAME.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        out_channels: Channels of the output.
        kernel: Kernel size, (height, width), odd.
        stride: Stride, (height, width).
        groups: Groups of the convolution.
        dilation: Dilation; only with stride 1 or odd sizes is SAME padding symmetric.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        groups: int = 1,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        self.extent = (dilation * (kernel[0] - 1) + 1, dilation * (kernel[1] - 1) + 1)
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel, stride, groups=groups, dilation=dilation, padding=0, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / stride), ceil(W / stride))."""
        stride = self.conv.stride
        top, bottom = same_pads(int(x.shape[2]), self.extent[0], stride[0])
        left, right = same_pads(int(x.shape[3]), self.extent[1], stride[1])
        if (top, left) != (bottom, right):
            x = functional.pad(x, (left, right, top, bottom))
            top, left = 0, 0
        conv = self.conv
        return functional.conv2d(x, conv.weight, None, stride, (top, left), conv.dilation, conv.groups)


class ReluConvNorm(nn.Module):
    """ReLU, convolution, batch normalisation; the ReLU can be left out.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        out_channels: Channels of the output.
        kernel: Kernel size, (height, width).
        stride: Stride, (height, width).
        dilation: Dilation of the kernel.
        norm_eps: Epsilon of the normalisation.
        norm_momentum: Momentum of its running statistics.
        relu: Whether there is a ReLU in front.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        dilation: int,
        norm_eps: float,
        norm_momentum: float,
        relu: bool = True,
    ) -> None:
        super().__init__()
        self.relu = relu
        self.conv = SameConv(in_channels, out_channels, kernel, stride, dilation=dilation)
        self.norm = nn.BatchNorm2d(out_channels, eps=norm_eps, momentum=norm_momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        return self.norm(self.conv(functional.relu(x) if self.relu else x))


class SeparableTwice(nn.Module):
    """A depthwise-separable convolution applied twice: (ReLU, depthwise, pointwise, normalisation) x 2.

    Nothing stands between depthwise and pointwise. The first application has the stride and changes the channels.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        out_channels: Channels of the output.
        kernel: Side of the depthwise kernels.
        stride: Stride of the first depthwise convolution.
        norm_eps: Epsilon of the normalisations.
        norm_momentum: Momentum of their running statistics.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int, norm_eps: float, norm_momentum: float
    ) -> None:
        super().__init__()
        side, strides = (kernel, kernel), (stride, stride)
        self.depthwise1 = SameConv(in_channels, in_channels, side, strides, groups=in_channels)
        self.pointwise1 = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels, eps=norm_eps, momentum=norm_momentum)
        self.depthwise2 = SameConv(out_channels, out_channels, side, groups=out_channels)
        self.pointwise2 = nn.Conv2d(out_channels, out_channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels, eps=norm_eps, momentum=norm_momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        x = self.norm1(self.pointwise1(self.depthwise1(functional.relu(x))))
        return self.norm2(self.pointwise2(self.depthwise2(functional.relu(x))))


class SamePool(nn.Module):
    """Average or maximum over a window, padded as TensorFlow's SAME; padding counts neither as a value nor in the mean.

    Args:
        kind: "avg" or "max".
        kernel: Side of the window, odd.
        stride: 1 or 2.
    """

    def __init__(self, kind: str, kernel: int, stride: int) -> None:
        super().__init__()
        self.kind, self.kernel, self.stride = kind, kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, ceil(H / stride), ceil(W / stride))."""
        before = (
            same_pads(int(x.shape[2]), self.kernel, self.stride)[0],
            same_pads(int(x.shape[3]), self.kernel, self.stride)[0],
        )
        # With these zeros in front, a window that reaches over the end (ceil_mode) is cut off there: that is SAME.
        if self.kind == "avg":
            return functional.avg_pool2d(x, self.kernel, self.stride, before, ceil_mode=True, count_include_pad=False)
        return functional.max_pool2d(x, self.kernel, self.stride, before, ceil_mode=True)


class HalvedInput(nn.Module):
    """Factorised reduction: half of the filters see the even pixels, half the pixels shifted by one, both stride 2.

    ReLU; 1x1 convolution with stride 2 of the image and of the image shifted by one pixel; concatenation; one
    normalisation.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        out_channels: Channels of the output; an odd one gives the shifted path one more.
        norm_eps: Epsilon of the normalisation.
        norm_momentum: Momentum of its running statistics.
    """

    def __init__(self, in_channels: int, out_channels: int, norm_eps: float, norm_momentum: float) -> None:
        super().__init__()
        self.even = nn.Conv2d(in_channels, out_channels // 2, 1, stride=2, bias=False)
        self.shifted = nn.Conv2d(in_channels, out_channels - out_channels // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, eps=norm_eps, momentum=norm_momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', ceil(H / 2), ceil(W / 2))."""
        x = functional.relu(x)
        shifted = functional.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        return self.norm(torch.cat([self.even(x), self.shifted(shifted)], dim=1))


def make_operation(
    name: str, in_channels: int, out_channels: int, stride: int, norm_eps: float, norm_momentum: float
) -> nn.Module:
    """Return one of the 13 operations of the space, from ``in_channels`` to ``out_channels``.

    An identity that changes channels or resolution becomes ReLU, 1x1 convolution, normalisation; a pooling that changes
    channels is followed by a 1x1 convolution and a normalisation. ``conv_1x7_7x1`` is two convolutions, each with its
    ReLU and its normalisation, that stride along their own axis.

    Raises:
        ValueError: Unknown name.
    """
    norm = (norm_eps, norm_momentum)
    square = (stride, stride)
    if name == "identity":
        if stride == 1 and in_channels == out_channels:
            return nn.Identity()
        return ReluConvNorm(in_channels, out_channels, (1, 1), square, 1, *norm)
    if name in ("conv_1x3_3x1", "conv_1x7_7x1"):
        side = 3 if name == "conv_1x3_3x1" else 7
        return nn.Sequential(
            ReluConvNorm(in_channels, out_channels, (1, side), (1, stride), 1, *norm),
            ReluConvNorm(out_channels, out_channels, (side, 1), (stride, 1), 1, *norm),
        )
    if name == "dilated_conv_3x3":
        return ReluConvNorm(in_channels, out_channels, (3, 3), square, 2, *norm)
    if name in ("conv_1x1", "conv_3x3"):
        side = 1 if name == "conv_1x1" else 3
        return ReluConvNorm(in_channels, out_channels, (side, side), square, 1, *norm)
    if name in ("avg_pool_3x3", "max_pool_3x3", "max_pool_5x5", "max_pool_7x7"):
        pool = SamePool(name[:3], int(name[-1]), stride)
        if in_channels == out_channels:
            return pool
        return nn.Sequential(pool, ReluConvNorm(in_channels, out_channels, (1, 1), (1, 1), 1, *norm, relu=False))
    if name in ("sep_conv_3x3", "sep_conv_5x5", "sep_conv_7x7"):
        return SeparableTwice(in_channels, out_channels, int(name[-1]), stride, *norm)
    raise ValueError(f"operation: got {name!r}; allowed: the 13 operations of the NASNet space.")


class NasnetCell(nn.Module):
    """One cell: inputs brought to ``filters`` channels, blocks, concatenation of the output states.

    h0 is ReLU, 1x1 convolution and normalisation of the previous layer. h1 is halved where its resolution differs from
    h0's, else projected where its channels are not ``filters``, else taken as it is. Without a second predecessor
    (``before_channels`` 0) h1 is the raw previous layer, and what uses it projects.

    Args:
        previous_channels: Channels of the previous layer, (B, C, H, W).
        before_channels: Channels of the layer before it; 0 if there is none.
        filters: F, channels of every operation's result.
        blocks: The blocks in order.
        outputs: States to concatenate, ascending.
        stride: 2 for a reduction cell: operations on the two inputs halve the resolution, no others.
        halve_before: Whether h1 has twice the resolution of h0.
        norm_eps: Epsilon of all normalisations.
        norm_momentum: Momentum of their running statistics.

    ``keep`` is the keep probability of drop path in training mode; it applies to the result of each operation that is
    not an identity.
    """

    def __init__(
        self,
        previous_channels: int,
        before_channels: int,
        filters: int,
        blocks: tuple[NasnetBlock, ...],
        outputs: tuple[int, ...],
        stride: int,
        halve_before: bool,
        norm_eps: float,
        norm_momentum: float,
    ) -> None:
        super().__init__()
        norm = (norm_eps, norm_momentum)
        self.blocks, self.outputs, self.keep = blocks, outputs, 1.0
        self.current = ReluConvNorm(previous_channels, filters, (1, 1), (1, 1), 1, *norm)
        self.before: nn.Module = nn.Identity()
        channels = [filters, filters]
        if not before_channels:
            channels[1] = previous_channels
        elif halve_before:
            self.before = HalvedInput(before_channels, filters, *norm)
        elif before_channels != filters:
            self.before = ReluConvNorm(before_channels, filters, (1, 1), (1, 1), 1, *norm)
        self.operations = nn.ModuleList()
        for first, second, first_op, second_op, combiner in blocks:
            for state, name in ((first, first_op), (second, second_op)):
                step = stride if state < 2 else 1
                self.operations.append(make_operation(name, channels[state], filters, step, *norm))
            channels.append(filters if combiner == "add" else 2 * filters)
        self.projections = nn.ModuleDict()
        for state in outputs:
            if state < 2 and stride == 2:
                self.projections[str(state)] = HalvedInput(channels[state], filters, *norm)
                channels[state] = filters
            elif state < 2 and channels[state] != filters:
                self.projections[str(state)] = ReluConvNorm(
                    channels[state], filters, (1, 1), (1, 1), 1, *norm, relu=False
                )
                channels[state] = filters
        self.out_channels = sum(channels[state] for state in outputs)

    def forward(self, previous: Tensor, before: Tensor | None) -> Tensor:
        """Return the cell's output (B, out_channels, H', W').

        Args:
            previous: Output of the previous layer, (B, C, H, W).
            before: Output of the layer before it, at the same or twice the resolution; None if there is none.
        """
        h1 = previous if before is None else self.before(before)
        states = [self.current(previous), h1]
        for index, (first, second, first_op, second_op, combiner) in enumerate(self.blocks):
            left = self.path(2 * index, first_op, states[first])
            right = self.path(2 * index + 1, second_op, states[second])
            states.append(left + right if combiner == "add" else torch.cat([left, right], dim=1))
        found = []
        for state in self.outputs:
            name = str(state)
            found.append(self.projections[name](states[state]) if name in self.projections else states[state])
        return torch.cat(found, dim=1)

    def path(self, index: int, name: str, x: Tensor) -> Tensor:
        """Return one operation of ``x``, dropped for some samples in training mode unless it is an identity."""
        y = self.operations[index](x)
        return drop_path(y, self.keep) if self.training and self.keep < 1.0 and name != "identity" else y


class AuxiliaryHead(nn.Module):
    """The second classifier at two thirds of the depth, for training only.

    ReLU, 5x5 average pool of stride 3, 1x1 convolution to 128, normalisation, ReLU, convolution over the whole map to
    768, normalisation, ReLU, linear.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        size: Height and width of the input, at least 5.
        num_classes: Width of the output.
        norm_eps: Epsilon of the normalisations.
        norm_momentum: Momentum of their running statistics.
    """

    def __init__(
        self, in_channels: int, size: tuple[int, int], num_classes: int, norm_eps: float, norm_momentum: float
    ) -> None:
        super().__init__()
        if min(size) < 5:
            raise ValueError(f"auxiliary head: the map has {size[0]}x{size[1]} pixels; it needs at least 5x5.")
        whole = ((size[0] - 5) // 3 + 1, (size[1] - 5) // 3 + 1)
        self.reduce = nn.Conv2d(in_channels, 128, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(128, eps=norm_eps, momentum=norm_momentum)
        self.whole = nn.Conv2d(128, 768, whole, bias=False)
        self.norm2 = nn.BatchNorm2d(768, eps=norm_eps, momentum=norm_momentum)
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to logits (B, num_classes)."""
        x = self.norm1(self.reduce(functional.avg_pool2d(functional.relu(x), 5, 3)))
        x = self.norm2(self.whole(functional.relu(x)))
        return self.classifier(functional.relu(x).flatten(1))


class NasnetNetwork(nn.Module):
    """A classifier that stacks two cells: ``3 * repeats`` normal cells, a reduction cell before each later third.

    Args:
        in_channels: Channels of the images, (B, C, H, W).
        num_classes: Width of the output (B, num_classes).
        normal: Blocks of the normal cell.
        reduction: Blocks of the reduction cell.
        normal_outputs: States that the normal cell concatenates.
        reduction_outputs: States that the reduction cell concatenates.
        repeats: N, normal cells in each third.
        filters: F, filters of the first normal cells; they double at each reduction.
        stem: "cifar" (3x3 convolution to ``stem_channels``, normalisation) or "imagenet" (the same with stride 2 and
            without padding, then two reduction cells with F/4 and F/2 filters).
        stem_channels: Filters of the first convolution.
        skip_reduction_input: The second input of the normal cell behind a reduction: the layer before the reduction
            (False) or the one before that (True, the wiring of the large network).
        auxiliary_size: Height and width of the map that the auxiliary head reads; None for no head.
        dropout: Drop probability in front of the classifier.
        final_keep: Keep probability of ScheduledDropPath in the last cell at the end of training; 1 for none.
        norm_eps: Epsilon of every normalisation.
        norm_momentum: Momentum of every running statistic.

    Source: arXiv 1707.07012.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        normal: tuple[NasnetBlock, ...],
        reduction: tuple[NasnetBlock, ...],
        normal_outputs: tuple[int, ...],
        reduction_outputs: tuple[int, ...],
        repeats: int,
        filters: int,
        stem: str = "cifar",
        stem_channels: int = 96,
        skip_reduction_input: bool = False,
        auxiliary_size: tuple[int, int] | None = None,
        dropout: float = 0.0,
        final_keep: float = 1.0,
        norm_eps: float = 1e-3,
        norm_momentum: float = 3e-4,
    ) -> None:
        super().__init__()
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"stem: got {stem!r}; allowed: 'cifar', 'imagenet'.")
        self.arguments: dict[str, Any] = {
            "in_channels": in_channels,
            "num_classes": num_classes,
            "normal": tuple(tuple(block) for block in normal),
            "reduction": tuple(tuple(block) for block in reduction),
            "normal_outputs": tuple(normal_outputs),
            "reduction_outputs": tuple(reduction_outputs),
            "repeats": repeats,
            "filters": filters,
            "stem": stem,
            "stem_channels": stem_channels,
            "skip_reduction_input": skip_reduction_input,
            "auxiliary_size": None if auxiliary_size is None else tuple(auxiliary_size),
            "dropout": dropout,
            "final_keep": final_keep,
            "norm_eps": norm_eps,
            "norm_momentum": norm_momentum,
        }
        self.skip_reduction_input, self.final_keep = skip_reduction_input, final_keep
        norm = (norm_eps, norm_momentum)
        imagenet = stem == "imagenet"
        self.stem = nn.Conv2d(
            in_channels, stem_channels, 3, stride=2 if imagenet else 1, padding=0 if imagenet else 1, bias=False
        )
        self.stem_norm = nn.BatchNorm2d(stem_channels, eps=norm_eps, momentum=norm_momentum)
        # (filters, whether it reduces) of each cell in order, as the networks are published.
        plan = [(filters // 4, True), (filters // 2, True)] if imagenet else []
        for index in range(3 * repeats):
            third = index // repeats
            if index in (repeats, 2 * repeats):
                plan.append((filters * 2**third, True))
            plan.append((filters * 2**third, False))
        self.reduces = tuple(reduces for _, reduces in plan)
        self.auxiliary_cell = len(plan) - repeats - 2
        self.cells = nn.ModuleList()
        # (channels, number of halvings) of every layer so far; the layer before the stem does not exist.
        layers = [(0, 0), (stem_channels, 0)]
        for index, (width, reduces) in enumerate(plan):
            current, before = layers[-1], layers[self.second_input(index)]
            cell = NasnetCell(
                current[0],
                before[0],
                width,
                tuple(reduction if reduces else normal),
                tuple(reduction_outputs if reduces else normal_outputs),
                2 if reduces else 1,
                before[0] > 0 and before[1] < current[1],
                *norm,
            )
            self.cells.append(cell)
            layers.append((cell.out_channels, current[1] + int(reduces)))
        self.auxiliary = (
            None
            if auxiliary_size is None
            else AuxiliaryHead(layers[self.auxiliary_cell + 2][0], auxiliary_size, num_classes, *norm)
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(layers[-1][0], num_classes)

    def second_input(self, cell: int) -> int:
        """Return which of the layers so far is the second input of cell ``cell``, counted from the end (-2 or -3).

        Only a normal cell behind a reduction of the body can have -3; the stem's reductions are always followed by -2.
        """
        behind = cell > 0 and self.reduces[cell - 1] and not self.reduces[cell]
        behind_stem = self.reduces[0] and cell == 2
        return -3 if self.skip_reduction_input and behind and not behind_stem else -2

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, C, H, W)."""
        return self.features(x)[0]

    def forward_with_auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the logits and the auxiliary head's logits (None without a head), both (B, num_classes)."""
        logits, middle = self.features(x)
        return logits, None if self.auxiliary is None else self.auxiliary(middle)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits and the output of the cell at two thirds of the depth."""
        layers: list[Tensor | None] = [None, self.stem_norm(self.stem(x))]
        for index, cell in enumerate(self.cells):
            layers.append(cell(layers[-1], layers[self.second_input(index)]))
        last, middle = layers[-1], layers[self.auxiliary_cell + 2]
        assert last is not None and middle is not None
        pooled = self.pool(functional.relu(last)).flatten(1)
        return self.classifier(self.dropout(pooled)), middle

    def set_progress(self, progress: float) -> None:
        """Set the keep probability of every cell for the part of the training that is over (ScheduledDropPath)."""
        for index, cell in enumerate(self.cells):
            assert isinstance(cell, NasnetCell)
            cell.keep = scheduled_keep(self.final_keep, index, len(self.cells), progress)

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this structure."""
        return dict(self.arguments)
