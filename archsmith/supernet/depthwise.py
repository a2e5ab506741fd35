"""Depthwise convolutions with a faster weight gradient on CPUs, for kernels wider than three.

oneDNN has a dedicated kernel for the weight gradient of depthwise convolutions in the channels-last format, but only
for kernels at most three columns wide; wider ones fall back to a general grouped one that is 3 to 10 times slower. The
gradient of a k x k kernel is the union of the gradients of its columns, and the columns c .. c + 2 are the gradient of
a (k, 3) convolution of the input shifted by c. So a 5x5 kernel is two fast calls and a 7x7 kernel three.

A dilated kernel (dilation 2) reads pixels of one parity only, so it is an ordinary convolution of four smaller images:
``to_phases`` takes an image apart, ``from_phases`` puts it together. oneDNN's own dilated gradient is slower by far.

The sums are the same up to the order of additions. Elsewhere (other devices, formats, dtypes) torch's own gradient is
used.
"""

# B batch, C channels, H height, W width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDEST = 3
"""Columns that the fast weight gradient takes at once."""

_SMALL_SIDE = 8  # below it, as with strides, the fast kernel refuses implicit padding


class FastDepthwise(nn.Conv2d):
    """A depthwise ``nn.Conv2d`` with the weight gradient of this module; same parameters, same ``state_dict``.

    Made from an existing layer by ``use_fast_depthwise_``.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.is_grad_enabled() and weight.requires_grad and _applies(self, input):
            return _Depthwise.apply(input, weight, self.stride[0], int(self.padding[0]))  # type: ignore[no-untyped-call]
        return super()._conv_forward(input, weight, bias)


def depthwise(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Return a depthwise convolution with zeros around the image, ``k // 2`` of them.

    It has derivatives of every order; the first one of ``weight`` is this module's where that is faster.

    Args:
        x: Input (B, C, H, W).
        weight: Kernels (C, 1, k, k), k odd.
        stride: Of both axes.
    """
    size = weight.shape[-1]
    if size > WIDEST and torch.is_grad_enabled() and weight.requires_grad and _fast_for(x):
        return _Depthwise.apply(x, weight, stride, size // 2)  # type: ignore[no-untyped-call]
    return functional.conv2d(x, weight, None, stride, size // 2, 1, weight.shape[0])


def to_phases(x: Tensor) -> Tensor:
    """Return the four images of every second row and column, one behind the other: (4 B, C, H / 2, W / 2).

    Args:
        x: (B, C, H, W), H and W even. The result is channels-last.
    """
    batch, channels, height, width = x.shape
    apart_BHpWqC = x.permute(0, 2, 3, 1).reshape(batch, height // 2, 2, width // 2, 2, channels)
    phases = apart_BHpWqC.permute(2, 4, 0, 1, 3, 5).reshape(4 * batch, height // 2, width // 2, channels)
    return phases.permute(0, 3, 1, 2)


def from_phases(phases: Tensor) -> Tensor:
    """Undo ``to_phases``."""
    count, channels, height, width = phases.shape
    apart_pqBHWC = phases.permute(0, 2, 3, 1).reshape(2, 2, count // 4, height, width, channels)
    whole = apart_pqBHWC.permute(2, 3, 0, 4, 1, 5).reshape(count // 4, 2 * height, 2 * width, channels)
    return whole.permute(0, 3, 1, 2)


def use_fast_depthwise_(module: nn.Module) -> int:
    """Give every depthwise convolution of ``module`` with a kernel wider than three the fast gradient, in place.

    Returns:
        How many layers were changed. Networks stay picklable, copyable and exportable; in evaluation nothing changes.
    """
    changed = 0
    for layer in module.modules():
        if type(layer) is nn.Conv2d and _is_wide_depthwise(layer):
            layer.__class__ = FastDepthwise
            changed += 1
    return changed


def use_plain_depthwise_(module: nn.Module) -> None:
    """Undo ``use_fast_depthwise_``."""
    for layer in module.modules():
        if type(layer) is FastDepthwise:
            layer.__class__ = nn.Conv2d  # type: ignore[assignment]


def _is_wide_depthwise(layer: nn.Conv2d) -> bool:
    rows, columns = layer.kernel_size
    square = rows == columns and layer.stride[0] == layer.stride[1] and layer.padding == (rows // 2, columns // 2)
    plain = layer.bias is None and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    return square and plain and columns > WIDEST and columns % 2 == 1 and layer.weight.shape[1] == 1


def _applies(layer: nn.Conv2d, x: Tensor) -> bool:
    return layer.groups > 1 and _fast_for(x)


def _fast_for(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")  # the gradient would come in another dtype than the input
        and not torch.compiler.is_compiling()  # the compiler cannot look into a gradient of one's own
        and x.dim() == 4
        and x.shape[1] > 1
        and x.is_contiguous(memory_format=torch.channels_last)
        and torch.backends.mkldnn.is_available()
    )


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return functional.conv2d(x, weight, None, stride, padding, 1, weight.shape[0])

    @staticmethod  # every step can be differentiated again
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        x_gradient = _input_gradient(gradient, x, weight, ctx.stride, ctx.padding) if ctx.needs_input_grad[0] else None
        w_gradient = None
        if ctx.needs_input_grad[1]:
            w_gradient = depthwise_weight_gradient(gradient, x, weight, ctx.stride, ctx.padding)
        return x_gradient, w_gradient, None, None


def _input_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Return the gradient of the input; with stride 1 it is a convolution with the turned kernel, the faster call."""
    groups = weight.shape[0]
    if stride == 1:
        turned = weight.flip(2, 3).contiguous(memory_format=torch.channels_last)
        return functional.conv2d(gradient, turned, None, 1, padding, 1, groups)
    return _convolution_backward(gradient, x, weight, stride, (padding, padding), inputs=True)


def depthwise_weight_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """Return the gradient of a depthwise kernel, computed at most three columns at a time.

    Args:
        gradient: Gradient of the output, (B, C, H', W'), channels-last.
        x: Input (B, C, H, W), channels-last.
        weight: Kernel (C, 1, k, k); only its shape and format matter.
        stride: Stride of both axes.
        padding: Zeros around the input, ``k // 2``.

    Returns:
        Tensor like ``weight``.
    """
    size = weight.shape[2]
    height, width = x.shape[2:]
    out_height, out_width = gradient.shape[2:]
    explicit = stride > 1 or height < _SMALL_SIDE
    below = stride * (out_height - 1) + size - padding - height if explicit else 0
    parts = []
    for first, columns in _tiles(size):
        left = first - padding
        right = left + stride * (out_width - 1) + columns
        if not explicit and columns == WIDEST and left == -1:
            shifted, around = x, (padding, 1)
        else:
            inside = x[..., max(left, 0) : min(right, width)]
            edges = (max(-left, 0), max(right - width, 0), padding if explicit else 0, below)
            shifted = functional.pad(inside, edges).contiguous(memory_format=torch.channels_last)
            around = (0 if explicit else padding, 0)
        part = weight[..., first : first + columns].contiguous(memory_format=torch.channels_last)
        parts.append(_convolution_backward(gradient, shifted, part, stride, around, inputs=False))
    return torch.empty_like(weight).copy_(torch.cat(parts, dim=-1))


def _tiles(size: int) -> list[tuple[int, int]]:
    """Return (first column, columns) of each call: 5 -> 3 + 2, 7 -> 2 + 3 + 2 (its middle needs no shift)."""
    if size == 7:
        return [(0, 2), (2, 3), (5, 2)]
    return [(first, min(WIDEST, size - first)) for first in range(0, size, WIDEST)]


def _convolution_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int], *, inputs: bool
) -> Tensor:
    gradients = torch.ops.aten.convolution_backward(
        gradient,
        x,
        weight,
        None,
        [stride, stride],
        list(padding),
        [1, 1],
        False,
        [0, 0],
        weight.shape[0],
        [inputs, not inputs, False],
    )
    wanted: Tensor = gradients[0 if inputs else 1]
    return wanted
