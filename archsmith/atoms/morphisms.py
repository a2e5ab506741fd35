"""Function-preserving transforms of tensors: units are copied, consumers share, new layers are identities.

Growing is written with one object, ``Copies``: of which old unit each new unit is a copy. The layer that makes the
units *repeats* its slices (``repeated``), every layer that reads them *divides* its slices by the number of copies
(``divided``), and what stands between passes the mapping on: normalisations and depthwise convolutions repeat their
vectors, pools and activations do nothing, a flatten spreads it over positions (``flattened``), a concatenation joins it
with its neighbours' (``joined``). What was a sum over old units is then the same sum over new ones.

The functions are pure and know no network; ``archsmith.families.plain`` and ``densenet`` use them on theirs.

Source: Chen, Goodfellow, Shlens, "Net2Net", arXiv 1511.05641; for concatenations Cai et al., "Efficient Architecture
Search by Network Transformation", arXiv 1707.04873.
"""

# N new units, O old units, K side of a kernel

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from archsmith.core.errors import UserError

NORM_VECTORS = ("weight", "bias", "running_mean", "running_var")
"""Vectors of a batch normalisation that have one entry for each unit."""


@dataclass(frozen=True, eq=False)
class Copies:
    """Of which old unit each new unit is a copy.

    Args:
        source: int64 of shape (N,): ``g(j)``, the old unit that new unit j copies; N may be anything, order included.
        old: O, number of old units. One that nobody copies is lost, and with it the function.

    Raises:
        UserError: An index out of range, or an old unit without a copy.

    Example:
        >>> g = Copies(torch.tensor([0, 1, 2, 3, 1, 3, 1]), old=4)
        >>> g.counts.tolist(), [round(share, 2) for share in g.shares.tolist()]
        ([1, 3, 1, 2], [1.0, 0.33, 1.0, 0.5, 0.33, 0.5, 0.33])
    """

    source: Tensor
    old: int

    def __post_init__(self) -> None:
        source = self.source
        if source.dim() != 1 or source.dtype != torch.int64:
            raise UserError("copies.source", source, allowed="a vector of int64")
        if len(source) and not 0 <= int(source.min()) <= int(source.max()) < self.old:
            raise UserError("copies.source", source.tolist(), allowed=f"old units from 0 to {self.old - 1}")
        if bool((self.counts == 0).any()):
            lost = torch.nonzero(self.counts == 0).flatten().tolist()
            raise UserError("copies.source", source.tolist(), allowed=f"a copy of every old unit; {lost} have none")

    @property
    def new(self) -> int:
        """N, number of new units."""
        return len(self.source)

    @cached_property
    def counts(self) -> Tensor:
        """Copies of each old unit, the original included; int64 of shape (O,)."""
        return torch.bincount(self.source, minlength=self.old)

    @cached_property
    def shares(self) -> Tensor:
        """What a consumer of each new unit multiplies its slice with: ``1 / |{k: g(k) = g(j)}|``; float64, (N,)."""
        return 1.0 / self.counts[self.source].double()

    @cached_property
    def is_repeat(self) -> Tensor:
        """Whether an earlier new unit has the same source; bool of shape (N,)."""
        first = torch.full((self.old,), self.new, dtype=torch.int64)
        first.scatter_reduce_(0, self.source, torch.arange(self.new), reduce="amin")
        return torch.arange(self.new) != first[self.source]

    def then(self, later: Copies) -> Copies:
        """Return both steps in one: ``later`` copies the units that this one made.

        Raises:
            UserError: ``later`` begins with another number of units.
        """
        if later.old != self.new:
            raise UserError("copies", later.old, allowed=f"{self.new} old units, as many as there are now")
        return Copies(self.source[later.source], self.old)


def unchanged(units: int) -> Copies:
    """Return the mapping that copies every unit once, in order."""
    return Copies(torch.arange(units), units)


def widening(
    old: int, new: int, *, extra: Sequence[int] | None = None, generator: torch.Generator | None = None
) -> Copies:
    """Return ``g(j) = j`` for the old units, and a random old unit for each further one (Net2Wider).

    Args:
        old: Units now.
        new: Units afterwards, not fewer.
        extra: The old units to copy, in place of random ones; ``new - old`` of them.
        generator: Source of the random ones.

    Raises:
        UserError: Fewer units than before, or another number of ``extra``.
    """
    if old < 1 or new < old:
        raise UserError("widening to", new, allowed=f"at least the {old} units that there are")
    if extra is not None and len(extra) != new - old:
        raise UserError("extra", list(extra), allowed=f"{new - old} old units to copy")
    drawn = torch.randint(old, (new - old,), generator=generator) if extra is None else torch.tensor(list(extra))
    return Copies(torch.cat([torch.arange(old), drawn.to(torch.int64)]), old)


def joined(parts: Sequence[Copies]) -> Copies:
    """Return the mapping over a concatenation whose parts are mapped each by itself, in their order."""
    sources, offset = [], 0
    for part in parts:
        sources.append(part.source + offset)
        offset += part.old
    return Copies(torch.cat(sources), offset)


def flattened(
    copies: Copies, positions: int, order: Literal["channels-first", "channels-last"] = "channels-first"
) -> Copies:
    """Return the mapping behind a flatten of maps with ``positions`` pixels.

    Args:
        copies: Mapping of the channels.
        positions: H * W.
        order: "channels-first": the features of a channel are neighbours (a flattened (C, H, W), torch's).
            "channels-last": the channels of a pixel are.
    """
    pixels = torch.arange(positions)
    if order == "channels-first":
        source = copies.source[:, None] * positions + pixels
    else:
        source = pixels[:, None] * copies.old + copies.source
    return Copies(source.flatten(), copies.old * positions)


def repeated(
    tensor: Tensor, copies: Copies, *, axis: int = 0, noise: float = 0.0, generator: torch.Generator | None = None
) -> Tensor:
    """Return the slices of the layer that *makes* the units, one for each new unit: ``U[j] = W[g(j)]``.

    Also for what has one entry per unit and passes it on: biases, normalisations, depthwise kernels.

    Args:
        tensor: O slices along ``axis``.
        copies: Which to repeat.
        axis: Axis of the units; torch's weights have outputs first.
        noise: Standard deviation of the noise on repeated slices, in standard deviations of ``tensor``; 0 is exact,
            but copies without noise have equal gradients and stay copies.
        generator: Source of the noise.

    Raises:
        UserError: Another number of slices than old units.
    """
    grown = _chosen(tensor, copies, axis)
    if not noise or not bool(copies.is_repeat.any()):
        return grown
    rows = [1] * grown.dim()
    rows[axis] = -1
    scale = noise * float(tensor.std(correction=0)) * copies.is_repeat.to(grown).reshape(rows)
    return grown + scale * torch.randn(grown.shape, dtype=grown.dtype, generator=generator)


def divided(tensor: Tensor, copies: Copies, *, axis: int = 1) -> Tensor:
    """Return the slices of a layer that *reads* the units, divided by the number of copies of each unit's source.

    Args:
        tensor: O slices along ``axis``.
        copies: The mapping of what it reads, flattened or joined where it has to be.
        axis: Axis of the inputs; torch's weights have them second.

    Raises:
        UserError: Another number of slices than old units.
    """
    rows = [1] * tensor.dim()
    rows[axis] = -1
    return _chosen(tensor, copies, axis) * copies.shares.to(tensor).reshape(rows)


def repeated_norm(vectors: Mapping[str, Tensor], copies: Copies) -> dict[str, Tensor]:
    """Return a batch normalisation with its vectors (``NORM_VECTORS``) repeated and all else (counters) as it was."""
    return {name: repeated(v, copies) if name in NORM_VECTORS else v.clone() for name, v in vectors.items()}


def without_inputs(tensor: Tensor, more: int, *, axis: int = 1) -> Tensor:
    """Return a weight that reads ``more`` further units at the end of ``axis`` and ignores them: zeros are appended."""
    shape = list(tensor.shape)
    shape[axis] = more
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)


def neutral_norm(vectors: Mapping[str, Tensor], more: int) -> dict[str, Tensor]:
    """Return a batch normalisation with ``more`` further units: scale 1, shift 0, mean 0, variance 1."""
    values = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    return {
        name: torch.cat([v, v.new_full((more,), values[name])]) if name in values else v.clone()
        for name, v in vectors.items()
    }


def identity_conv(
    channels: int,
    kernel: int,
    *,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the kernels (C, C, K, K) of a convolution that copies its input (Net2Deeper), padded by ``K // 2``.

    Args:
        channels: C.
        kernel: K, odd.
        noise: Standard deviation of the noise on all weights, in standard deviations of the kernels; 0 is exact.
        generator: Source of the noise.
        dtype: Type of the numbers.

    Raises:
        UserError: An even kernel, which has no centre.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise UserError("kernel", kernel, allowed="an odd number: an even kernel has no centre")
    weight = torch.zeros(channels, channels, kernel, kernel, dtype=dtype)
    weight[:, :, kernel // 2, kernel // 2] = torch.eye(channels, dtype=dtype)
    return _noisy(weight, noise, generator)


def identity_linear(
    units: int, *, noise: float = 0.0, generator: torch.Generator | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the weights (N, N) of a linear map that copies its input; ``noise`` as for ``identity_conv``."""
    return _noisy(torch.eye(units, dtype=dtype), noise, generator)


def channel_statistics(x: Tensor, *, axis: int = 1) -> tuple[Tensor, Tensor]:
    """Return mean and *biased* variance of each channel over all other axes, as a batch normalisation computes them."""
    others = [dim for dim in range(x.dim()) if dim != axis % x.dim()]
    return x.mean(dim=others), x.var(dim=others, correction=0)


def identity_norm(mean: Tensor, variance: Tensor, *, eps: float) -> dict[str, Tensor]:
    """Return the vectors of a batch normalisation that changes nothing in evaluation mode.

    With the statistics of a batch (``channel_statistics``) it also changes nothing in training mode on that batch. A
    ReLU behind it changes nothing either if the input is the output of a ReLU; other activations (tanh, ...) would.

    Args:
        mean: Shape (N,).
        variance: Shape (N,), biased.
        eps: What the normalisation adds to the variance.
    """
    return {
        "weight": (variance + eps).sqrt(),
        "bias": mean.clone(),
        "running_mean": mean.clone(),
        "running_var": variance.clone(),
    }


def _chosen(tensor: Tensor, copies: Copies, axis: int) -> Tensor:
    if tensor.shape[axis] != copies.old:
        raise UserError(
            f"size of axis {axis}", tensor.shape[axis], allowed=f"{copies.old}, the old units of the mapping"
        )
    return tensor.index_select(axis, copies.source.to(tensor.device))


def _noisy(weight: Tensor, noise: float, generator: torch.Generator | None) -> Tensor:
    if not noise:
        return weight
    scale = noise * float(weight.std(correction=0))
    return weight + scale * torch.randn(weight.shape, dtype=weight.dtype, generator=generator)
