"""Which weights of a layer stay: families of masks, and how one of them is chosen by importance.

A mask is a boolean tensor of the weight's shape, True where a weight stays. A *family* is the set of masks that are
allowed (any weights, N of every M, whole kernels, one of a few patterns in each kernel, whole filters);
``family.choose(scores)`` returns its member that keeps the most important weights. Families compose by ``&``: pattern
and kernel masks are chosen separately and both hold.

Scores come from ``importance``: the squared first-order estimate of the change of the loss when a weight is set to zero
(Molchanov et al. 2017, arXiv 1611.06440, squared; ClickTrain, arXiv 2011.10170). They are computed in float64 on the
CPU, so the choice depends on weights and gradients only, not on where they were computed. A common factor of all
gradients (loss scaling, clipping) does not change any choice.
"""

# O output channels, I input channels (of one group), K kernel positions in row-major order

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, final

import torch
from torch import Tensor

from archsmith.core.errors import Shown, UserError

Pool = tuple[tuple[int, ...], ...]
"""Patterns of 3x3 kernels: each the positions 0..8 (row-major) that it keeps, ascending."""

CENTRE = 4
"""Position of the centre of a 3x3 kernel."""

FIXED_POOL: Pool = (
    (4, 5, 7, 8),
    (3, 4, 6, 7),
    (1, 2, 4, 5),
    (0, 1, 3, 4),
    (5, 6, 7, 8),
    (3, 4, 5, 7),
    (1, 4, 5, 7),
    (1, 3, 4, 7),
    (0, 1, 2, 4),
    (3, 6, 7, 8),
    (0, 1, 2, 3),
    (3, 5, 7, 8),
)
"""The patterns that ClickTrain's released code ships, in its order; the first 4, 8 or 12 make a pool."""


def all_patterns(kept: int = 4) -> Pool:
    """Return every pattern of a 3x3 kernel that keeps ``kept`` weights, in lexicographic order (126 for four).

    Raises:
        UserError: ``kept`` is not in 1..9.
    """
    if not 1 <= kept <= 9:
        raise UserError("kept", kept, allowed="1 to 9, the weights of a 3x3 kernel")
    return tuple(itertools.combinations(range(9), kept))


def importance(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return ``(w * dL/dw)^2`` element by element, float64 on the CPU.

    Args:
        weight: Any shape, dtype and device.
        gradient: Gradient of the plain loss, without penalties or weight decay in it.
    """
    return (weight.detach().cpu().double() * gradient.detach().cpu().double()).square()


def removed_count(percent: float, total: int) -> int:
    """Return ``ceil(percent * total / 100)``, exactly for the decimal number that ``percent`` shows.

    Raises:
        UserError: ``percent`` is not in 0..100.
    """
    if not 0 <= percent <= 100:
        raise UserError("percent", percent, allowed="a number from 0 to 100")
    return math.ceil(Fraction(str(percent)) * total / 100)


class MaskFamily(ABC):
    """The masks that are allowed for a layer."""

    @abstractmethod
    def choose(self, scores: Tensor) -> Tensor:
        """Return the family's mask that keeps the largest scores; of equal scores the earlier ones are removed first.

        Args:
            scores: Non-negative, of the weight's shape, from ``importance``.

        Returns:
            Boolean tensor of the same shape on the CPU, True where a weight stays.

        Raises:
            UserError: The family does not fit this shape, or a score is NaN or infinite.
        """


@final
@dataclass(frozen=True)
class Unstructured(MaskFamily):
    """Any weights of the layer.

    Attributes:
        percent: Share of the layer's weights that goes, rounded up to whole weights.
    """

    percent: float

    def choose(self, scores: Tensor) -> Tensor:
        """See ``MaskFamily.choose``."""
        return _without_smallest(_finite(scores).reshape(-1), self.percent).view(scores.shape)


@final
@dataclass(frozen=True)
class NOfM(MaskFamily):
    """``keep`` of every ``of`` weights that follow each other along the inputs (2 of 4 is what sparse tensor cores do).

    The weight is seen as (O, all inputs of an output), inputs in memory order of (kernel position, input channel): the
    group runs over input channels at one kernel position.

    Attributes:
        keep: Weights of each group that stay.
        of: Size of a group; must divide the number of input channels.
    """

    keep: int = 2
    of: int = 4

    def choose(self, scores: Tensor) -> Tensor:
        """See ``MaskFamily.choose``."""
        if not 0 < self.keep <= self.of:
            raise UserError("keep", self.keep, allowed=f"1 to {self.of}")
        if scores.dim() < 2 or scores.shape[1] % self.of:
            raise UserError(
                "of", self.of, allowed=f"a divisor of the input channels; the weight has shape {tuple(scores.shape)}"
            )
        groups = _finite(scores).movedim(1, -1)
        blocks = groups.reshape(*groups.shape[:-1], -1, self.of)
        removed = torch.sort(blocks, dim=-1, stable=True).indices[..., : self.of - self.keep]
        mask = torch.ones_like(blocks, dtype=torch.bool).scatter_(-1, removed, False)
        return mask.reshape(groups.shape).movedim(-1, 1).contiguous()


@final
@dataclass(frozen=True)
class Kernels(MaskFamily):
    """Whole kernels ``W[o, i]``, ranked over the whole layer, not filter by filter.

    Attributes:
        percent: Share of the layer's kernels that goes, rounded up to whole kernels.
    """

    percent: float

    def choose(self, scores: Tensor) -> Tensor:
        """See ``MaskFamily.choose``."""
        kept_OI = self.choose_kernels(scores)
        return kept_OI.reshape(*kept_OI.shape, *[1] * (scores.dim() - 2)).expand(scores.shape).clone()

    def choose_kernels(self, scores: Tensor) -> Tensor:
        """Return which kernels stay, boolean (O, I)."""
        sums_OI = kernel_scores(scores)
        return _without_smallest(sums_OI.reshape(-1), self.percent).view(sums_OI.shape)


@final
@dataclass(frozen=True)
class Filters(MaskFamily):
    """Whole filters ``W[o]``, that is output channels, as a mask (the surgery that removes them is ``surgery``).

    Attributes:
        percent: Share of the filters that goes, rounded up to whole filters.
    """

    percent: float

    def choose(self, scores: Tensor) -> Tensor:
        """See ``MaskFamily.choose``."""
        sums_O = _finite(scores).reshape(len(scores), -1).sum(1)
        kept_O = _without_smallest(sums_O, self.percent)
        return kept_O.reshape(-1, *[1] * (scores.dim() - 1)).expand(scores.shape).clone()


@final
@dataclass(frozen=True)
class Patterns(MaskFamily):
    """Every 3x3 kernel keeps one pattern of a shared pool.

    Attributes:
        pool: The patterns.
    """

    pool: Pool

    def __post_init__(self) -> None:
        if not self.pool or any(list(p) != sorted({*p}) or not p or p[0] < 0 or p[-1] > 8 for p in self.pool):
            raise UserError("pool", self.pool, allowed="patterns of ascending positions from 0 to 8")

    def choose(self, scores: Tensor) -> Tensor:
        """See ``MaskFamily.choose``."""
        return self.mask_of(self.choose_ids(scores))

    def choose_ids(self, scores: Tensor) -> Tensor:
        """Return the index in the pool of every kernel's best pattern, int64 (O, I); of equal ones the first.

        The best pattern is the one whose kept positions have the largest sum of scores.
        """
        if scores.shape[2:] != (3, 3):
            raise UserError("weight", Shown(f"kernels of {tuple(scores.shape[2:])}"), allowed="3x3 kernels")
        flat_OIK = _finite(scores).flatten(2)
        kept_OIP = torch.stack([flat_OIK[..., list(pattern)].sum(-1) for pattern in self.pool], dim=-1)
        return kept_OIP.argmax(-1)

    def mask_of(self, ids_OI: Tensor) -> Tensor:
        """Return the mask (O, I, 3, 3) of pattern numbers (O, I)."""
        table_PK = torch.zeros(len(self.pool), 9, dtype=torch.bool)
        for number, pattern in enumerate(self.pool):
            table_PK[number, list(pattern)] = True
        return table_PK[ids_OI.cpu()].view(*ids_OI.shape, 3, 3)


def kernel_scores(scores: Tensor) -> Tensor:
    """Return the sum of the scores of every kernel, (O, I).

    Raises:
        UserError: The weight has no kernels, or a score is NaN or infinite.
    """
    if scores.dim() < 3:
        raise UserError("weight", Shown(f"shape {tuple(scores.shape)}"), allowed="(O, I, kernel axes...)")
    return _finite(scores).flatten(2).sum(-1)


def pattern_pool(
    kind: Literal["fixed", "frequent"],
    count: int,
    *,
    scores: Iterable[Tensor] = (),
    centre: bool = False,
) -> Pool:
    """Return the pool of patterns that every 3x3 kernel of a network chooses from.

    Args:
        kind: "fixed": the first ``count`` of ``FIXED_POOL``. "frequent": see ``frequent_patterns``.
        count: Number of patterns.
        scores: For "frequent": the importance of every 3x3 layer, (O, I, 3, 3) each.
        centre: Only patterns that keep the centre of the kernel.

    Raises:
        UserError: The fixed pool has not that many, or "frequent" has no 3x3 kernels to count.
    """
    if kind == "frequent":
        return frequent_patterns(scores, count, centre=centre)
    allowed = [pattern for pattern in FIXED_POOL if CENTRE in pattern or not centre]
    if not 1 <= count <= len(allowed):
        with_centre = " that keep the centre" if centre else ""
        raise UserError("patterns", count, allowed=f"1 to {len(allowed)}, the fixed patterns{with_centre}")
    return tuple(allowed[:count])


def frequent_patterns(scores: Iterable[Tensor], count: int, *, kept: int = 4, centre: bool = False) -> Pool:
    """Return the ``count`` most frequent natural patterns of all 3x3 kernels of a network.

    A kernel's natural pattern is its ``kept`` largest scores (of equal ones the earlier positions); with ``centre`` the
    centre and the ``kept - 1`` largest others. Equally frequent patterns come in lexicographic order. This is the
    *dynamic pattern generation* that ClickTrain's abstract speaks of, as its natural reading; the released code ships
    ``FIXED_POOL`` only.

    Args:
        scores: The importance of every 3x3 layer, (O, I, 3, 3) each; other kernel sizes are passed over.
        count: Size of the pool; fewer come back when fewer occur.
        kept: Weights that a pattern keeps.
        centre: Whether every pattern keeps the centre.

    Raises:
        UserError: There is no 3x3 kernel, or ``count`` is not positive.
    """
    if count < 1:
        raise UserError("patterns", count, allowed="1 or more")
    seen: Counter[tuple[int, ...]] = Counter()
    for layer in scores:
        if layer.shape[2:] != (3, 3):
            continue
        flat = _finite(layer).flatten(2).flatten(0, 1).clone()
        if centre:
            flat[:, CENTRE] = math.inf
        best = torch.sort(flat, dim=1, descending=True, stable=True).indices[:, :kept].sort(1).values
        patterns, counts = best.unique(dim=0, return_counts=True)
        for pattern, number in zip(patterns.tolist(), counts.tolist(), strict=True):
            seen[tuple(pattern)] += number
    if not seen:
        raise UserError("pool", "frequent", allowed="a network with 3x3 convolutions to prune")
    ranked = sorted(seen, key=lambda pattern: (-seen[pattern], pattern))
    return tuple(ranked[:count])


def _without_smallest(flat: Tensor, percent: float) -> Tensor:
    """Return a mask of a vector without its smallest entries."""
    removed = torch.sort(flat, stable=True).indices[: removed_count(percent, flat.numel())]
    return torch.ones_like(flat, dtype=torch.bool).index_fill_(0, removed, False)


def _finite(scores: Tensor) -> Tensor:
    scores = scores.detach().cpu()
    if not bool(torch.isfinite(scores).all()):
        raise UserError(
            "scores",
            Shown("NaN or infinite values"),
            allowed="finite importances",
            hint="The gradient is not finite; choose at another step, after unscaling.",
        )
    return scores


def kept_weights(shape: tuple[int, ...] | torch.Size, percent: float, *, per_kernel: int | None = None) -> int:
    """Return how many weights of a layer stay, from its shape alone.

    Args:
        shape: (O, I, kernel axes...).
        percent: Share of its kernels that goes.
        per_kernel: Weights that stay in a kernel that stays; all when None.
    """
    kernels, area = shape[0] * shape[1], math.prod(shape[2:])
    return (kernels - removed_count(percent, kernels)) * (area if per_kernel is None else per_kernel)


def percents_by_ranking(
    scores: Mapping[str, Tensor], per_kernel: Mapping[str, int], budget: int, *, most: float = 95.0
) -> dict[str, float]:
    """Return the share of kernels to remove from each layer, so that all layers together keep ``budget`` weights.

    The kernels of all layers are ranked together by their importance for each weight that they would keep; the last go
    until the budget holds, but at most ``most`` percent of a layer, so that none dies. Within a layer this is the order
    of ``Kernels``.

    Args:
        scores: Importance of each layer, (O, I, kernel axes...).
        per_kernel: Weights that a kept kernel of the layer has.
        budget: Weights that may stay in all.
        most: Largest share of a layer, in percent.

    Returns:
        Percent by name; ``removed_count`` makes the exact number of it.

    Raises:
        UserError: The budget is out of reach.
    """
    names = list(scores)
    totals = {name: scores[name].shape[0] * scores[name].shape[1] for name in names}
    removable = {name: math.floor(totals[name] * most / 100) for name in names}
    excess = sum(totals[name] * per_kernel[name] for name in names) - budget
    least = sum((totals[name] - removable[name]) * per_kernel[name] for name in names)
    if least > budget:
        raise UserError("ratio", Shown(f"{budget:,} weights to keep"), allowed=f"at least {least:,}")
    values, owners, weights = [], [], []
    for number, name in enumerate(names):
        lowest = kernel_scores(scores[name]).reshape(-1).sort().values[: removable[name]]
        values.append(lowest / per_kernel[name])
        owners.append(torch.full((len(lowest),), number))
        weights.append(torch.full((len(lowest),), per_kernel[name]))
    order = torch.sort(torch.cat(values), stable=True).indices
    freed = torch.cat(weights)[order].cumsum(0)
    count = 0 if excess <= 0 else int((freed < excess).sum()) + 1
    gone = torch.bincount(torch.cat(owners)[order[:count]], minlength=len(names)).tolist()
    removed = dict(zip(names, gone, strict=True))
    # Cut off, so that rounding up in removed_count gives this very number again.
    return {name: math.floor(1e8 * removed[name] / totals[name]) / 1e6 for name in names}
