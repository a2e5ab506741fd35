"""Partial channel connections: a module works on one K-th of the channels, the others go past it.

Source: Xu et al., "PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search", arXiv 1907.05737.
"""

# B batch, C channels, H height, W width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

MIXINGS = ("shuffle", "shift", "random")
"""How other channels get their turn, see ``PartialChannels``."""


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Return the channels interleaved: output j is input ``(j mod groups) * (C / groups) + j div groups``.

    Args:
        x: Shape (B, C, ...).
        groups: Divides C. The groups are neighbouring channels; the output begins with the first of each.

    Raises:
        ValueError: ``groups`` does not divide the channels.

    Source: ShuffleNet, arXiv 1707.01083.
    """
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups: got {groups}; allowed: a divisor of the {x.shape[1]} channels.")
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class PartialChannels(nn.Module):
    """A module on C / K of the channels; the others bypass it, by a 2x2 max pooling where it halves the resolution.

    Args:
        inner: Maps C / K channels to as many, at the resolution that ``stride`` says. Called with whatever this is
            called with behind ``x``, so it may be an operation or a mixture of operations and its weights.
        channels: C, a multiple of ``divisor``.
        divisor: K; 1 is ``inner`` alone.
        stride: 1 or 2. The pooling of the bypass is not normalised.
        mixing: What makes the next module work on other channels.
            "shuffle": ``inner`` has the first C / K; the result is shuffled in K groups (the published searches).
            "shift": the same, but the channels are rotated by C / K towards the front, so that the next module has the
            neighbours of these.
            "random": ``inner`` has a random set of channels, drawn by ``redraw_``, and every channel keeps its place:
            ``inner(S x) + (1 - S) x``.

    Raises:
        ValueError: A size or a name that is not allowed.
    """

    order: Tensor
    """The channels (C,), those of ``inner`` first; used, and stored with the weights, by "random" alone."""

    def __init__(self, inner: nn.Module, channels: int, divisor: int, stride: int = 1, mixing: str = "shuffle") -> None:
        super().__init__()
        if divisor < 1 or channels % divisor:
            raise ValueError(f"divisor: got {divisor}; allowed: a divisor of the {channels} channels.")
        if stride not in (1, 2):
            raise ValueError(f"stride: got {stride}; allowed: 1 or 2.")
        if mixing not in MIXINGS:
            raise ValueError(f"mixing: got {mixing!r}; allowed: {', '.join(MIXINGS)}.")
        self.inner = inner
        self.divisor, self.stride, self.mixing = divisor, stride, mixing
        self.part = channels // divisor
        self.register_buffer("order", torch.arange(channels), persistent=mixing == "random")

    def redraw_(self, generator: torch.Generator | None = None) -> None:
        """Draw the channels of ``inner`` anew (with "random"; the others always take the first).

        Args:
            generator: On the CPU; torch's global one if None.
        """
        if self.mixing == "random":
            self.order.copy_(torch.randperm(len(self.order), generator=generator))

    def forward(self, x: Tensor, *arguments: Any) -> Tensor:
        """Map (B, C, H, W) to (B, C, H / stride, W / stride)."""
        if self.divisor == 1:
            result: Tensor = self.inner(x, *arguments)
            return result
        return self.joined(self.inner(self.taken(x), *arguments), self.past(x))

    def taken(self, x: Tensor) -> Tensor:
        """Return the channels that ``inner`` gets, (B, C / K, H, W).

        They are a copy, so that what candidates keep for their gradients is this part and not all of ``x``.
        """
        part = x[:, self.order[: self.part]] if self.mixing == "random" else x[:, : self.part]
        return part.contiguous(memory_format=_layout(x))

    def past(self, x: Tensor) -> Tensor:
        """Return the other channels at the resolution of the output, (B, C - C / K, H / stride, W / stride)."""
        others = x[:, self.part :]
        if self.mixing == "random":
            others = x[:, self.order[self.part :]].contiguous(memory_format=_layout(x))
        return functional.max_pool2d(others, 2, 2) if self.stride == 2 else others

    def joined(self, through: Tensor, past: Tensor) -> Tensor:
        """Return the output of what ``inner`` made of its channels and the channels that went past it."""
        if self.mixing == "shift":
            return torch.cat([past, through], dim=1)
        if self.mixing == "random":
            both = torch.cat([through, past], dim=1)[:, self.order.argsort()]
            return both.contiguous(memory_format=_layout(through, past))
        return _interleaved([through, *past.chunk(self.divisor - 1, dim=1)], _layout(through, past))


def _interleaved(parts: list[Tensor], layout: torch.memory_format) -> Tensor:
    """Return ``channel_shuffle(cat(parts), len(parts))`` by one copy that keeps the memory layout."""
    if layout is torch.channels_last:
        return torch.stack([part.permute(0, 2, 3, 1) for part in parts], dim=-1).flatten(-2).permute(0, 3, 1, 2)
    return torch.stack(parts, dim=2).flatten(1, 2)


def _layout(*maps: Tensor) -> torch.memory_format:
    """Return the memory layout of maps that may be slices; a single channel fits every layout."""
    last = any(x.shape[1] > 1 and x.stride(1) == 1 and x.stride(3) > 1 for x in maps)
    return torch.channels_last if last else torch.contiguous_format
