"""Average pooling of 3x3 pixels as a depthwise convolution, which is fast in the channels-last format.

torch's own pooling is 2 to 6 times slower there, forward and backward, most on large images with few channels. The
mean over the pixels inside the image is the convolution with ninths, times 3/2 on every border that a pixel lies on.
The sums are the same up to the order of additions.
"""

# B batch, C channels, H height, W width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def average_pool(x: Tensor) -> Tensor:
    """Return ``avg_pool2d(x, 3, 1, 1, count_include_pad=False)``; it has derivatives of every order.

    Elsewhere than on a CPU, in float32, in the channels-last format and on images of at least 2x2 pixels, it *is*
    torch's pooling.

    Args:
        x: (B, C, H, W).
    """
    if _fast_for(x):
        return _AveragePool.apply(x, False)  # type: ignore[no-untyped-call]
    return functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class _AveragePool(torch.autograd.Function):
    """The pooling or, since it is linear, its own gradient; each is the gradient of the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, transposed: bool) -> Tensor:
        ctx.transposed = transposed
        if transposed:
            return _ninths(_scale_borders_(x.clone(memory_format=torch.channels_last)))
        return _scale_borders_(_ninths(x))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        return _AveragePool.apply(gradient, not ctx.transposed), None  # type: ignore[no-untyped-call]


def _ninths(x: Tensor) -> Tensor:
    channels = x.shape[1]
    return functional.conv2d(x, x.new_full((channels, 1, 3, 3), 1 / 9), padding=1, groups=channels)


def _scale_borders_(x: Tensor) -> Tensor:
    """Multiply each border by 3/2: of three rows or columns it has two inside the image."""
    for border in (x[:, :, 0], x[:, :, -1], x[..., 0], x[..., -1]):
        border.mul_(1.5)
    return x


def _fast_for(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and x.dim() == 4
        and min(x.shape[1:]) >= 2
        and x.is_contiguous(memory_format=torch.channels_last)
        and torch.backends.mkldnn.is_available()
    )
