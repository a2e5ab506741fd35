"""Natural-parameter networks: every weight and every activation is a Gaussian, carried as its mean and variance.

Source: Wang et al. 2016, "Natural-Parameter Networks", arXiv 1611.00448, as used by BOSHNAS, arXiv 2205.11656.
"""

# B batch, I inputs, O outputs

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

LEAST_VARIANCE = 1e-12
"""Variances below, which only rounding and the approximations bring about, are set to it."""


def natural_relu(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of a ReLU of Gaussians; exact at mean 0, an approximation elsewhere.

    The probability of being positive is ``sigmoid(sqrt(8 / pi) m / sqrt v)`` in place of the normal distribution's.
    """
    variance = variance.clamp(min=LEAST_VARIANCE)
    positive = torch.sigmoid(math.sqrt(8 / math.pi) * mean / variance.sqrt())
    density = (variance / (2 * math.pi)).sqrt() * torch.exp(-(mean**2) / (2 * variance))
    found = positive * mean + density
    second = positive * (mean**2 + variance) + mean * density
    return found, (second - found**2).clamp(min=LEAST_VARIANCE)


def natural_sigmoid(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of a sigmoid of Gaussians, by the usual approximation with the normal distribution."""
    found = torch.sigmoid(mean / torch.sqrt(1 + math.pi / 8 * variance))
    steep, shift = 4 - 2 * math.sqrt(2), -math.log(math.sqrt(2) + 1)
    second = torch.sigmoid(steep * (mean + shift) / torch.sqrt(1 + math.pi / 8 * steep**2 * variance))
    return found, (second - found**2).clamp(min=LEAST_VARIANCE)


class NaturalLinear(nn.Module):
    """A linear layer with Gaussian weights: ``m W + b`` and ``v S + v W^2 + m^2 S + s``, exactly.

    Args:
        in_features: I.
        out_features: O.

    The variances are the softplus of ``weight_raw`` (I, O) and ``bias_raw`` (O,). Means start as normal numbers of
    variance 2 / (I + O) and zeros, raw variances at -5: 0.0067.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        scale = math.sqrt(2 / (in_features + out_features))
        self.weight = nn.Parameter(scale * torch.randn(in_features, out_features))
        self.weight_raw = nn.Parameter(torch.full((in_features, out_features), -5.0))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.bias_raw = nn.Parameter(torch.full((out_features,), -5.0))

    def forward(self, mean: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map means (B, I) and variances (B, I), zeros if None, to those of the outputs (B, O)."""
        spread = functional.softplus(self.weight_raw)
        found = mean**2 @ spread + functional.softplus(self.bias_raw)
        if variance is not None:
            found = found + variance @ (spread + self.weight**2)
        return mean @ self.weight + self.bias, found


class NaturalNetwork(nn.Module):
    """Natural-parameter layers with ReLU between and a sigmoid at the end: one number in (0, 1) and its variance.

    Args:
        in_features: I.
        hidden: Units of the hidden layers.
    """

    def __init__(self, in_features: int, hidden: Sequence[int] = (32, 32)) -> None:
        super().__init__()
        sizes = (in_features, *hidden, 1)
        self.layers = nn.ModuleList(NaturalLinear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map exact inputs (B, I) to means and variances, both (B,)."""
        mean, variance = self.layers[0](x)
        for layer in self.layers[1:]:
            mean, variance = layer(*natural_relu(mean, variance))
        mean, variance = natural_sigmoid(mean, variance)
        return mean.squeeze(-1), variance.squeeze(-1)


def natural_loss(mean: Tensor, variance: Tensor, target: Tensor, *, weight: float = 10.0) -> Tensor:
    """Return ``0.5 sum(weight (y - m)^2 / v + log v)``; the published weight of the error is 10, the textbook's 1."""
    return 0.5 * (weight * (target - mean) ** 2 / variance + variance.log()).sum()
