"""Edges that search on one K-th of the channels, around any candidates that keep the number of channels.

A mixed operation on C / K channels takes and keeps one K-th of the memory; of the arithmetic, depthwise convolutions
take one K-th and full ones one K^2-th. What it says of the operations holds for all channels as far as they are alike.

Source: PC-DARTS, arXiv 1907.05737, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from archsmith.core.errors import UserError
from archsmith.core.rng import seed_of
from archsmith.layers.partial import MIXINGS, PartialChannels, channel_shuffle
from archsmith.supernet.mixed import MixedOp, Weights

MakeCandidates: TypeAlias = Callable[[int], Mapping[str, nn.Module]]
"""From a number of channels to the candidates of an edge, by name."""

__all__ = [
    "MIXINGS",
    "PartialChannels",
    "PartialEdge",
    "channel_shuffle",
    "left_out",
    "partial_edge",
    "partial_form",
    "redraw_",
]


class PartialEdge(PartialChannels):
    """A mixed operation on C / K channels, called ``edge(x, weights)``; arguments as of ``PartialChannels``.

    Plain weights that are all zero leave the edge out, the channels that go past its candidates with it.
    """

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        """Map (B, C, H, W) to (B, C, H / stride, W / stride)."""
        (weights,) = arguments
        if left_out(weights):
            return x[:, :, :: self.stride, :: self.stride] * 0.0
        return super().forward(x, weights)


def left_out(weights: Weights) -> bool:
    """Return whether these are plain weights, all zero."""
    return not isinstance(weights, Tensor) and not any(
        isinstance(weight, Tensor) or weight != 0.0 for weight in weights
    )


def partial_edge(
    make_candidates: MakeCandidates, channels: int, stride: int, *, divisor: int, mixing: str = "shuffle"
) -> nn.Module:
    """Return an edge, called ``edge(x, weights)``, whose candidates see C / K channels.

    Args:
        make_candidates: Called with C / K.
        channels: C, channels of the edge's input and output.
        stride: 1 or 2.
        divisor: K; 1 gives the ordinary mixed operation.
        mixing: "shuffle", "shift" or "random", see ``PartialChannels``.

    Raises:
        UserError: K does not divide C, or leaves an odd number of channels where an edge halves the resolution.
    """
    if mixing not in MIXINGS:
        raise UserError("mixing", mixing, allowed=", ".join(MIXINGS))
    halving = stride == 2
    if divisor < 1 or channels % divisor or (halving and (channels // divisor) % 2):
        fitting = [k for k in range(1, channels + 1) if channels % k == 0 and not (halving and channels // k % 2)]
        raise UserError(
            "channel_divisor",
            divisor,
            allowed=f"{', '.join(map(str, fitting))} for an edge of {channels} channels"
            + (" that halves the resolution: its candidates need an even number" if halving else ""),
            hint="Widen the search network, or take fewer parts.",
        )
    mixed = MixedOp(make_candidates(channels // divisor))
    return mixed if divisor == 1 else PartialEdge(mixed, channels, divisor, stride, mixing)


def partial_form(network: nn.Module) -> dict[str, Any] | None:
    """Return ``divisor`` and ``mixing`` of a network's partial edges, or None if its edges have all channels."""
    for module in network.modules():
        if isinstance(module, PartialChannels):
            return {"divisor": module.divisor, "mixing": module.mixing}
    return None


def redraw_(network: nn.Module, seed: int, *names: str | int) -> None:
    """Let every edge with the mixing "random" draw its channels anew.

    Args:
        network: Holds the edges.
        seed: Of the run; the channels depend on it, on ``names`` and on the edge's place alone.
        names: Which drawing it is, such as epoch and step.
    """
    for name, module in network.named_modules():
        if isinstance(module, PartialChannels) and module.mixing == "random":
            module.redraw_(torch.Generator().manual_seed(seed_of(seed, "channels", name, *names)))
