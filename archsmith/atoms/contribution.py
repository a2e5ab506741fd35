"""How much a channel of an FFN, or a key-value head, contributes to the output: what stays when a layer shrinks.

Works on tensors alone. ``channel_contribution`` scores every channel by itself; ``IterativePruning`` removes some after
each batch and scores the others given that these are gone. Source: "Puzzle: Distillation-Based NAS for
Inference-Optimized LLMs", arXiv 2411.19146; the iterative variant and head scores are described for its released code.
"""

# E output width, I channels, K key-value heads; T calibration tokens

from __future__ import annotations

import torch
from torch import Tensor

from archsmith.core.errors import UserError


def channel_contribution(inputs: Tensor, weight: Tensor) -> Tensor:
    """Return for each channel the mean over tokens of |x_i| ||W_i||, W_i its column of the layer that reads it.

    Scores of batches are added up.

    Args:
        inputs: What the layer reads, (..., I).
        weight: Its weight (E, I).

    Returns:
        (I,), float32 at least.
    """
    flat = _tokens(inputs)
    return flat.abs().mean(0) * weight.to(flat.dtype).norm(dim=0)


def head_contribution(inputs: Tensor, weight: Tensor, kv_heads: int) -> Tensor:
    """Return for each key-value head the mean over tokens of the norm of what its query group adds to the output.

    Args:
        inputs: What the output projection reads: the heads side by side (..., H D).
        weight: Its weight (E, H D).
        kv_heads: K; the query heads of a group stand together.

    Returns:
        (K,), float32 at least.
    """
    flat = _tokens(inputs).unflatten(-1, (kv_heads, -1))
    columns = weight.to(flat.dtype).unflatten(-1, (kv_heads, -1))
    return torch.stack([(flat[:, k] @ columns[:, k].T).norm(dim=-1).mean() for k in range(kv_heads)])


def removal_schedule(channels: int, calls: int) -> list[int]:
    """Return how many channels go at each of ``calls`` calls, all of them in the end.

    With C >= T: floor(C / T) each, the first C mod T calls one more. With C < T: one at the calls floor(j T / C) - 1
    for j = 1 .. C.

    Raises:
        UserError: A negative number of channels, or no call.
    """
    if channels < 0 or calls < 1:
        raise UserError("channels, calls", (channels, calls), allowed="channels >= 0, calls >= 1")
    if channels >= calls:
        return [channels // calls + (call < channels % calls) for call in range(calls)]
    chosen = {j * calls // channels - 1 for j in range(1, channels + 1)}
    return [int(call in chosen) for call in range(calls)]


class IterativePruning:
    """Removes channels batch by batch, each time those whose loss would change the output least.

    With Y the layer's output, Yc the output without the channels removed so far and s = c Y - Yc, removing channel i as
    well costs sqrt(||s||^2 + 2 x_i (s . W_i) + x_i^2 ||W_i||^2 + 1e-8), averaged over tokens and added up over the
    batches since the last removal.

    Args:
        weight: Weight (E, I) of the layer that reads the channels.
        batches: How many batches will come; after the last one every channel has been removed.
        scale_by_magnitude: c = ||Yc|| / ||Y|| for each token, instead of 1: only the direction counts.

    Attributes:
        removed: Channels in the order in which they went; the last are the most important.
    """

    def __init__(self, weight: Tensor, batches: int, *, scale_by_magnitude: bool = False) -> None:
        self.weight = weight if weight.dtype == torch.float64 else weight.float()
        self.scale_by_magnitude = scale_by_magnitude
        self._schedule = removal_schedule(weight.shape[1], batches)
        self._call = 0
        self._alive = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        self._sum = torch.zeros(weight.shape[1], dtype=self.weight.dtype, device=weight.device)
        self.removed: list[int] = []

    def update(self, inputs: Tensor) -> None:
        """Take in one batch (..., I), and remove as many channels as its turn says.

        Raises:
            UserError: More batches than announced.
        """
        if self._call >= len(self._schedule):
            raise UserError("batches", self._call + 1, allowed=f"the {len(self._schedule)} that were announced")
        x = _tokens(inputs).to(self.weight.dtype)
        full = x @ self.weight.T
        pruned = (x * self._alive) @ self.weight.T
        scale: Tensor | float = 1.0
        if self.scale_by_magnitude:
            scale = pruned.norm(dim=-1, keepdim=True) / (full.norm(dim=-1, keepdim=True) + 1e-8)
        gap = scale * full - pruned
        squared = (
            gap.square().sum(-1, keepdim=True)
            + 2 * x * (gap @ self.weight)
            + x.square() * self.weight.square().sum(0)
            + 1e-8
        )
        self._sum += squared.clamp_min(0).sqrt().mean(0)  # rounding can take a sum of squares just below zero
        going = self._schedule[self._call]
        self._call += 1
        if going:
            scores = self._sum.masked_fill(~self._alive, float("inf"))
            cheapest = torch.argsort(scores, stable=True)[:going]
            self._alive[cheapest] = False
            self.removed += cheapest.tolist()
            self._sum.zero_()

    def ranks(self) -> Tensor:
        """Return for each channel when it went (I,): the higher, the more important; those still alive are highest."""
        ranks = torch.full((self.weight.shape[1],), float(len(self.removed)))
        ranks[torch.tensor(self.removed, dtype=torch.long)] = torch.arange(len(self.removed), dtype=ranks.dtype)
        return ranks


def _tokens(inputs: Tensor) -> Tensor:
    """Return (T, width) in float32, or float64 where that came."""
    flat = inputs.detach().flatten(0, -2)
    return flat if flat.dtype == torch.float64 else flat.float()
