"""A convolution that stores and computes only the kernels, and in each kernel only the positions, that pruning left.

Every stored kernel has one of a few patterns: the positions of the kernel where it has weights. Position (a, b) of a
convolution is a 1x1 convolution of the input shifted by (a, b), so a pattern of four positions is four shifted 1x1
convolutions over the kernels that have it.

There are two executions of the same sum. ``"patterns"`` runs each pattern as dense 1x1 convolutions between the input
channels and filters that occur in it: differentiable, any device and dtype, but it multiplies the zeros of kernels that
have other patterns; with several patterns that is *more* work than the dense convolution. ``"sparse"`` puts the 1x1
matrices of all patterns side by side into one compressed sparse matrix: one multiplication for each stored weight, for
inference in float32 or float64. What either costs in time is another matter; measure it.
"""

# B batch, I input channels, O filters, H height, W width, K stored kernels, N weights of a kernel

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Execution = Literal["patterns", "sparse"]

_PANEL = 1024
"""Output pixels that one sparse product computes on a CPU, or one image if it has more."""


class PatternConv2d(nn.Module):
    """Convolution over stored kernels; kernels are listed filter by filter.

    Args:
        in_channels: Channels of the input (B, I, H, W).
        out_channels: Filters.
        kernel_size: Height and width of a kernel.
        patterns: The patterns: row-major positions in the kernel, each the same number of them.
        kernels: Number of stored kernels.
        groups: Groups of the dense convolution it stands for; stored channels are absolute, so only ``to_dense`` asks.
        stride: Of both axes.
        padding: Zeros around the input, of both axes.
        dilation: Of both axes.
        bias: Whether there is a bias (O,).
        execution: "patterns" or "sparse", see the module; may be changed at any time.

    Attributes:
        values: (K, N) parameter, in the order of the pattern's positions.
        pattern: (K,) uint8, which pattern each kernel has.
        channel: (K,) int32, the input channel each kernel reads.
        filters: (O + 1,) int32: filter ``o`` has the kernels ``filters[o]`` to ``filters[o + 1]``, without the last.

    Raises:
        ValueError: Patterns of different lengths, or positions outside of the kernel.
    """

    values: nn.Parameter
    pattern: Tensor
    channel: Tensor
    filters: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        patterns: tuple[tuple[int, ...], ...],
        kernels: int,
        groups: int = 1,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        bias: bool = False,
        execution: Execution = "sparse",
    ) -> None:
        super().__init__()
        area = kernel_size[0] * kernel_size[1]
        if len({len(p) for p in patterns}) != 1 or any(not 0 <= at < area for p in patterns for at in p):
            raise ValueError(f"patterns: got {patterns}; allowed: equally many positions each, from 0 to {area - 1}.")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = kernel_size, stride, padding, dilation
        self.patterns = patterns
        self.execution = execution
        self.values = nn.Parameter(torch.zeros(kernels, len(patterns[0])))
        self.register_buffer("pattern", torch.zeros(kernels, dtype=torch.uint8))
        self.register_buffer("channel", torch.zeros(kernels, dtype=torch.int32))
        self.register_buffer("filters", torch.zeros(out_channels + 1, dtype=torch.int32))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self._matrix: tuple[object, Tensor] | None = None

    @classmethod
    @torch.no_grad()
    def from_dense(
        cls,
        convolution: nn.Conv2d,
        kept_OI: Tensor,
        pattern_OI: Tensor | None = None,
        patterns: tuple[tuple[int, ...], ...] | None = None,
    ) -> PatternConv2d:
        """Return the stored form of a convolution; weights outside of the masks are left out, zero or not.

        Args:
            convolution: Its weight is read; padding in numbers and with zeros.
            kept_OI: Boolean (O, I of one group), which kernels stay.
            pattern_OI: Which pattern each kernel has; None: each has all its positions.
            patterns: What the numbers mean, with ``pattern_OI``.

        Raises:
            ValueError: A padding that is not in numbers or not with zeros.
        """
        padding = convolution.padding
        if isinstance(padding, str) or convolution.padding_mode != "zeros":
            raise ValueError(f"padding: got {padding!r}, {convolution.padding_mode!r}; allowed: numbers, 'zeros'.")
        weight = convolution.weight.detach()
        kernel_size = (weight.shape[2], weight.shape[3])
        if pattern_OI is None or patterns is None:
            patterns = (tuple(range(kernel_size[0] * kernel_size[1])),)
            pattern_OI = torch.zeros(kept_OI.shape, dtype=torch.uint8)
        o, i = (axis.to(weight.device) for axis in kept_OI.cpu().nonzero(as_tuple=True))
        out = cls(
            convolution.in_channels,
            convolution.out_channels,
            kernel_size,
            patterns,
            len(o),
            groups=convolution.groups,
            stride=(convolution.stride[0], convolution.stride[1]),
            padding=(padding[0], padding[1]),
            dilation=(convolution.dilation[0], convolution.dilation[1]),
            bias=convolution.bias is not None,
        ).to(weight.device, weight.dtype)
        numbers = pattern_OI.to(weight.device)[o, i].long()
        positions_KN = torch.tensor(patterns, device=weight.device)[numbers]
        out.values.copy_(weight[o, i].flatten(1).gather(1, positions_KN))
        out.pattern.copy_(numbers)
        per_group = convolution.out_channels // convolution.groups
        out.channel.copy_(i + o // per_group * weight.shape[1])
        out.filters[1:] = torch.bincount(o, minlength=convolution.out_channels).cumsum(0)
        if out.bias is not None and convolution.bias is not None:
            out.bias.copy_(convolution.bias)
        return out.train(convolution.training)

    def constructor(self) -> dict[str, object]:
        """Return the arguments that make this layer again, without its weights."""
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": self.kernel_size,
            "patterns": self.patterns,
            "kernels": len(self.values),
            "groups": self.groups,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "bias": self.bias is not None,
            "execution": self.execution,
        }

    def to_dense(self) -> Tensor:
        """Return the weight (O, I of one group, kernel height, kernel width) it stands for; differentiable."""
        inputs, area = self.in_channels // self.groups, self.kernel_size[0] * self.kernel_size[1]
        o = self._filter_of_kernel()
        i = self.channel.long() - o // (self.out_channels // self.groups) * inputs
        at_KN = ((o * inputs + i) * area)[:, None] + self._positions()
        flat = self.values.new_zeros(self.out_channels * inputs * area).scatter(
            0, at_KN.flatten(), self.values.flatten()
        )
        return flat.view(self.out_channels, inputs, *self.kernel_size)

    def macs(self, height: int, width: int) -> int:
        """Return the multiply-accumulates of the present execution for one image of this size, zeros included."""
        pixels = self._output_size(height, self.kernel_size[0], 0) * self._output_size(width, self.kernel_size[1], 1)
        if self.execution == "sparse":
            return self.values.numel() * pixels
        o = self._filter_of_kernel()
        total = 0
        for number in range(len(self.patterns)):
            own = self.pattern == number
            total += len(o[own].unique()) * len(self.channel[own].unique())
        return total * self.values.shape[1] * pixels

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, I, H, W) to (B, O, H', W').

        Raises:
            RuntimeError: "sparse" while a gradient of ``values`` is asked for; use "patterns" for training.
        """
        x = functional.pad(x, (self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
        if self.execution == "patterns":
            y = self._by_patterns(x)
        elif torch.is_grad_enabled() and self.values.requires_grad:
            raise RuntimeError(
                "the sparse execution has no gradient: set execution='patterns', or use torch.no_grad()."
            )
        else:
            y = self._by_sparse_matrix(x)
        return y if self.bias is None else y + self.bias[:, None, None]

    def _by_patterns(self, x: Tensor) -> Tensor:
        height, width = (
            self._output_size(x.shape[2 + axis] - 2 * self.padding[axis], self.kernel_size[axis], axis)
            for axis in (0, 1)
        )
        y = x.new_zeros(len(x), self.out_channels, height, width)
        filter_K, channel_K = self._filter_of_kernel(), self.channel.long()
        for number, positions in enumerate(self.patterns):
            own = (self.pattern == number).nonzero()[:, 0]
            if not len(own):
                continue
            rows, row = filter_K[own].unique(return_inverse=True)
            columns, column = channel_K[own].unique(return_inverse=True)
            inputs = x.index_select(1, columns)
            part: Tensor | None = None
            for n, position in enumerate(positions):
                matrix = self.values.new_zeros(len(rows), len(columns)).index_put((row, column), self.values[own, n])
                term = functional.conv2d(self._shifted(inputs, position, height, width), matrix[:, :, None, None])
                part = term if part is None else part + term
            assert part is not None
            y = y.index_add(1, rows, part.to(y.dtype))
        return y

    def _by_sparse_matrix(self, x: Tensor) -> Tensor:
        height, width = (
            self._output_size(x.shape[2 + axis] - 2 * self.padding[axis], self.kernel_size[axis], axis)
            for axis in (0, 1)
        )
        used, matrix = self._sparse_matrix()
        # A few images at a time: the gathered columns then stay in the processor's cache, several times faster.
        images = max(1, _PANEL // (height * width)) if x.device.type == "cpu" else max(1, len(x))
        parts = []
        for some in x.split(images):
            columns = torch.stack([self._shifted(some, position, height, width).transpose(0, 1) for position in used])
            product = matrix @ columns.reshape(len(used) * self.in_channels, -1)
            parts.append(product.view(self.out_channels, len(some), height, width).transpose(0, 1))
        return torch.cat(parts)

    def _shifted(self, x: Tensor, position: int, height: int, width: int) -> Tensor:
        """Return the padded input as the 1x1 convolution of this position sees it."""
        top, left = (
            (position // self.kernel_size[1]) * self.dilation[0],
            (position % self.kernel_size[1]) * self.dilation[1],
        )
        rows = slice(top, top + (height - 1) * self.stride[0] + 1, self.stride[0])
        return x[:, :, rows, left : left + (width - 1) * self.stride[1] + 1 : self.stride[1]]

    def _sparse_matrix(self) -> tuple[list[int], Tensor]:
        """Return the positions in use and the matrix (O, positions * I) over them; kept until ``values`` change."""
        used = sorted({position for pattern in self.patterns for position in pattern})
        key = (self.values._version, self.values.data_ptr(), self.values.dtype, self.values.device)
        if self._matrix is None or self._matrix[0] != key:
            place = torch.tensor([used.index(p) if p in used else 0 for p in range(used[-1] + 1)])
            place_KN = place.to(self.values.device)[self._positions()]
            columns_KN = place_KN * self.in_channels + self.channel.long()[:, None]
            rows_KN = self._filter_of_kernel()[:, None].expand_as(columns_KN)
            indices = torch.stack([rows_KN.flatten(), columns_KN.flatten()])
            size = (self.out_channels, len(used) * self.in_channels)
            matrix = torch.sparse_coo_tensor(indices, self.values.detach().flatten(), size, check_invariants=False)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
                self._matrix = (key, matrix.coalesce().to_sparse_csr())
        return used, self._matrix[1]

    def _positions(self) -> Tensor:
        """Return the positions of every stored weight, int64 (K, N)."""
        return torch.tensor(self.patterns, device=self.values.device)[self.pattern.long()]

    def _filter_of_kernel(self) -> Tensor:
        """Return the filter of every stored kernel, int64 (K,)."""
        counts = self.filters.long().diff()
        return torch.repeat_interleave(torch.arange(self.out_channels, device=counts.device), counts)

    def _output_size(self, size: int, kernel: int, axis: int) -> int:
        return (size + 2 * self.padding[axis] - self.dilation[axis] * (kernel - 1) - 1) // self.stride[axis] + 1
