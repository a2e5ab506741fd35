"""Sparse convolutions and linear layers: a weight, a score of the same shape, and a mask that keeps the best scores.

The mask keeps, in each layer by itself, a fraction of the weights: those whose scores are largest in magnitude. The
forward pass uses ``weight * mask``. Backwards the mask is passed straight through: ``dL/d|s| = dL/dm`` for kept and
dropped entries alike, so ``dL/ds = sign(s) * dL/d(w*m) * w`` and a dropped weight can come back.

Source: DASS, arXiv 2207.06968; the score layers are those of edge-popup (arXiv 1911.13299) and HYDRA (2002.10509).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from archsmith.layers.darts import DenseLayers


def kept_count(size: int, keep: float) -> int:
    """Return how many of ``size`` weights a layer keeps: ``size - int((1 - keep) * size)``, at least 1.

    The expression, rounding included, is the published one.
    """
    return max(1, size - int((1 - keep) * size))


def top_mask(scores: Tensor, keep: float) -> Tensor:
    """Return 1 for the ``kept_count`` scores of largest magnitude and 0 for the others; of equal ones the later stays.

    Args:
        scores: Any shape; all its entries compete.
        keep: Fraction to keep, in (0, 1].
    """
    dropped = scores.numel() - kept_count(scores.numel(), keep)
    flat = torch.ones(scores.numel(), dtype=scores.dtype, device=scores.device)
    if dropped:
        lowest = torch.sort(scores.detach().abs().flatten(), stable=True).indices[:dropped]
        flat = flat.index_fill(0, lowest, 0.0)
    return flat.view(scores.shape)


def masked_weight(weight: Tensor, scores: Tensor, keep: float) -> Tensor:
    """Return ``weight`` times the mask of ``scores``, with the straight-through gradient for the scores.

    Args:
        weight: Any shape.
        scores: The same shape.
        keep: Fraction to keep, in (0, 1]; 1 gives ``weight`` itself, and still a gradient to scores that want one.
    """
    if keep >= 1.0 and not scores.requires_grad:
        return weight
    mask = top_mask(scores, keep)
    if scores.requires_grad:
        magnitude = scores.abs()
        mask = mask + (magnitude - magnitude.detach())  # the value is the mask, exactly; the slope is 1
    return weight * mask


def scaled_scores(weight: Tensor) -> Tensor:
    """Return ``sqrt(6 / fan_in) * w / max|w|``: the ranks are those of the weights' magnitudes, the scale a usual one.

    Args:
        weight: Shape (out, in / groups, ...); the fan-in is the number of entries for one output. All zeros stay zeros.
    """
    largest = weight.detach().abs().max()
    scale = math.sqrt(6.0 / max(1, weight[0].numel()))
    return scale * weight.detach() / torch.where(largest > 0, largest, torch.ones_like(largest))


class SparseConv2d(nn.Conv2d):
    """2D convolution with ``weight * mask``; the bias, if any, is dense.

    ``score`` starts as ``scaled_scores(weight)``, which draws no random numbers: a sparse network and a dense one with
    the same seed have the same weights.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        out_channels: Channels of the output.
        kernel_size: Side or sides of the kernel.
        stride: Stride.
        padding: Zeros around the image.
        dilation: Distance of the kernel's taps.
        groups: Groups of channels.
        bias: Whether there is a bias.
        keep: Fraction of the weights that are used, in (0, 1]; can be set at any time.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = False,
        keep: float = 1.0,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
        self.keep = keep
        self.score = nn.Parameter(scaled_scores(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        return self._conv_forward(x, masked_weight(self.weight, self.score, self.keep), self.bias)


class SparseLinear(nn.Linear):
    """Linear layer with ``weight * mask``; the bias is dense. See ``SparseConv2d``.

    Args:
        in_features: Width of the input (..., in).
        out_features: Width of the output (..., out).
        bias: Whether there is a bias.
        keep: Fraction of the weights that are used, in (0, 1].
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, keep: float = 1.0) -> None:
        super().__init__(in_features, out_features, bias)
        self.keep = keep
        self.score = nn.Parameter(scaled_scores(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return functional.linear(x, masked_weight(self.weight, self.score, self.keep), self.bias)


class SparseLayers(DenseLayers):
    """Gives a network sparse convolutions and a sparse classifier in place of dense ones.

    Args:
        keep: Fraction that every layer keeps, in (0, 1].

    Raises:
        ValueError: ``keep`` is no such fraction.
    """

    def __init__(self, keep: float = 1.0) -> None:
        super().__init__()
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"keep: got {keep!r}; allowed: a fraction in (0, 1].")
        self.keep = keep

    def convolution(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: int = 1,
        groups: int = 1,
    ) -> nn.Module:
        """Return a sparse convolution without bias."""
        return SparseConv2d(in_channels, out_channels, kernel, stride, padding, dilation, groups, False, self.keep)

    def linear(self, in_features: int, out_features: int) -> nn.Module:
        """Return a sparse linear layer with a dense bias."""
        return SparseLinear(in_features, out_features, True, self.keep)

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this."""
        return {"keep": self.keep}


def sparse_layers(network: nn.Module) -> dict[str, SparseConv2d | SparseLinear]:
    """Return the sparse layers of a network by qualified name."""
    kinds = (SparseConv2d, SparseLinear)
    return {name: module for name, module in network.named_modules() if isinstance(module, kinds)}


def set_keep_(network: nn.Module, keep: float) -> None:
    """Set the fraction that every sparse layer of a network keeps.

    Raises:
        ValueError: ``keep`` is not in (0, 1].
    """
    factory = SparseLayers(keep)  # refuses what is no fraction
    for module in network.modules():
        if isinstance(module, SparseConv2d | SparseLinear | SparseLayers):
            module.keep = factory.keep


@torch.no_grad()
def reset_scores_(network: nn.Module) -> None:
    """Set the scores of every sparse layer to ``scaled_scores`` of its present weights: masks by magnitude."""
    for layer in sparse_layers(network).values():
        layer.score.copy_(scaled_scores(layer.weight))


def masks(network: nn.Module) -> dict[str, Tensor]:
    """Return the mask of every sparse layer by qualified name, 1 for kept, in the layer's dtype."""
    return {name: top_mask(layer.score, layer.keep) for name, layer in sparse_layers(network).items()}


def kept_counts(network: nn.Module) -> dict[str, tuple[int, int]]:
    """Return, for every sparse layer, how many weights it keeps and how many it has."""
    return {
        name: (kept_count(layer.weight.numel(), layer.keep), layer.weight.numel())
        for name, layer in sparse_layers(network).items()
    }


def dense_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the state of the same network with dense layers: ``weight * mask`` as the weights, and no scores.

    What is zero in it is zero because its mask is: the dense network computes what the sparse one does.
    """
    own = masks(network)
    state: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if layer in own and leaf == "score":
            continue
        masked = layer in own and leaf == "weight"
        state[name] = (tensor * own[layer] if masked else tensor).detach().clone()
    return state
