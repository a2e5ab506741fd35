"""Which atoms live: the dead test, the published budget rule, and a mask that always holds a budget.

Everything works on the magnitudes of scales, group by group: float tensors (size,) by group name.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from archsmith.atoms.groups import AtomBlock, Atoms

Keep = dict[str, Tensor]
"""Which units of each group stay: boolean tensors (size,) by group name."""


def alive(
    scales: Mapping[str, Tensor], average: Mapping[str, Tensor], threshold: float, *, average_alone: bool = False
) -> Keep:
    """Return which units live: a unit is dead when its scale AND its averaged scale are at most ``threshold``.

    Args:
        scales: Raw scales by group name, (size,).
        average: Their exponential moving averages, same names and shapes.
        threshold: Largest magnitude that counts as dead, 1e-3 in the paper.
        average_alone: Let the averages decide alone. For the last cut of a run, because the averaged weights are the
            ones that are delivered.

    Source: AtomNAS (arXiv 1912.09640), dynamic network shrinkage.
    """
    if average_alone:
        return {name: value.abs() > threshold for name, value in average.items()}
    return {name: (scales[name].abs() > threshold) | (average[name].abs() > threshold) for name in scales}


def cost_of(atoms: Atoms, keep: Mapping[str, Tensor], cost: str) -> int:
    """Return the summed cost ("macs", "params") of the units that ``keep`` keeps."""
    return sum(group.cost[cost] * int(keep[group.name].sum()) for group in atoms)


def mask_by_macs_budget(
    scales: Sequence[Tensor], macs_per_atom: Sequence[float], macs_to_prune: float
) -> tuple[list[Tensor], float, float]:
    """Return the published global mask: the smallest scales go until more than ``macs_to_prune`` MACs are gone.

    Args:
        scales: One tensor (size,) for each group.
        macs_per_atom: MACs of one unit of each group.
        macs_to_prune: The threshold is the first scale, in ascending magnitude, whose cumulative MACs exceed this.

    Returns:
        ``(keep masks, threshold, pruned MACs)``; units strictly above the threshold stay. When everything together does
        not exceed the target, all units go.

    Source: network slimming by MACs as AtomNAS uses it (arXiv 1912.09640). It knows neither minimum nor divisor;
    ``fit_budget`` does.
    """
    magnitudes = np.concatenate([scale.detach().abs().double().numpy() for scale in scales])
    costs = np.concatenate(
        [np.full(len(scale), float(macs)) for scale, macs in zip(scales, macs_per_atom, strict=True)]
    )
    order = np.argsort(magnitudes, kind="stable")
    total = np.cumsum(costs[order])
    position = int(np.searchsorted(total, macs_to_prune, side="right"))
    threshold = float(magnitudes[order[min(position, len(order) - 1)]])
    keep = [scale.detach().abs().double() > threshold for scale in scales]
    pruned = sum(float(macs) * int((~mask).sum()) for macs, mask in zip(macs_per_atom, keep, strict=True))
    return keep, threshold, pruned


def protect(atoms: Atoms, keep: Mapping[str, Tensor], scores: Mapping[str, Tensor], *, divisor: int = 1) -> Keep:
    """Return ``keep`` with units brought back where a block would fall below its minimum or off the divisor.

    Args:
        atoms: The units.
        keep: Wanted mask by group name.
        scores: Magnitudes by group name; the largest dead ones come back first.
        divisor: A group's width must be a multiple of it, or all of the group if it has fewer units than the next
            multiple. 1 leaves widths alone.

    A block with ``minimum`` > 0 keeps at least that many units: its largest ones (in the group of its largest score).
    """
    kept = {name: mask.clone() for name, mask in keep.items()}
    for block in atoms.blocks:
        while (missing := block.minimum - sum(int(kept[name].sum()) for name in block.groups)) > 0:
            best = max(block.groups, key=lambda name: float(_dead_scores(scores[name], kept[name]).max()))
            _revive(kept[best], scores[best], missing)
    if divisor > 1:
        for group in atoms:
            width = int(kept[group.name].sum())
            _revive(kept[group.name], scores[group.name], min(-width % divisor, group.size - width))
    return kept


def _dead_scores(scores: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, torch.full_like(scores, -1.0), scores.abs())


def _revive(kept: Tensor, scores: Tensor, count: int) -> None:
    """Bring the ``count`` largest dead units back, ties in favour of the lower index."""
    if count > 0:
        order = torch.sort(_dead_scores(scores, kept), descending=True, stable=True).indices
        kept[order[: min(count, int((~kept).sum()))]] = True


Step = list[tuple[str, list[int], bool]]
"""One step towards a budget: ``(group, units, whether they live after it)``."""


def fit_budget(
    atoms: Atoms,
    scores: Mapping[str, Tensor],
    fits: Callable[[Keep], bool],
    *,
    keep: Mapping[str, Tensor] | None = None,
    divisor: int = 1,
) -> Keep | None:
    """Return the mask that removes the smallest scores until ``fits`` holds, or None when nothing allowed fits.

    Args:
        atoms: The units.
        scores: Magnitudes by group name.
        fits: Whether the network of a mask is within the budget; must be monotone (fewer units never fit worse).
        keep: Units considered at all; default all.
        divisor: Units go in chunks, so that a group's width stays a multiple of it (or becomes zero).

    Units go in ascending order of their chunk's mean magnitude; the last ``minimum`` units of a block never go. If all
    that is not enough, blocks exchange what they must keep for what costs the fewest MACs, in their order. ``fits`` is
    called about log2(number of units) times.
    """
    start = {g.name: (keep[g.name] if keep else torch.ones(g.size, dtype=torch.bool)).clone() for g in atoms}
    if fits(start):  # nothing to put in order
        return start
    steps: list[Step] = [[(name, units, False)] for name, units in _removal_order(atoms, scores, start, divisor)]

    def mask(count: int) -> Keep:
        result = {name: value.clone() for name, value in start.items()}
        for step in steps[:count]:
            for name, units, living in step:
                result[name][units] = living
        return result

    if not fits(least := mask(len(steps))):
        steps += _exchanges(atoms, scores, start, least, divisor)
        if not fits(mask(len(steps))):
            return None
    low, high = 0, len(steps)
    while low < high:
        middle = (low + high) // 2
        if fits(mask(middle)):
            high = middle
        else:
            low = middle + 1
    return mask(low)


def _removal_order(
    atoms: Atoms, scores: Mapping[str, Tensor], keep: Mapping[str, Tensor], divisor: int
) -> list[tuple[str, list[int]]]:
    """Return chunks ``(group, units)`` in the order in which they go; every block keeps its minimum."""
    queues: dict[str, list[list[int]]] = {}
    heap: list[tuple[float, int, str]] = []
    for position, group in enumerate(atoms):
        magnitude = scores[group.name].detach().abs().double()
        order = torch.sort(magnitude, stable=True).indices.tolist()
        living = [unit for unit in order if keep[group.name][unit]]
        first = len(living) % divisor or divisor  # an odd rest goes first, so that the width is a multiple after it
        bounds = [0, *range(first, len(living) + 1, divisor)] if living else [0]
        queues[group.name] = [living[a:b] for a, b in pairwise(bounds)]
        for chunk in queues[group.name]:  # ascending means, so a group's chunks leave the heap in their order
            heapq.heappush(heap, (float(magnitude[chunk].mean()), position, group.name))
    block_of: dict[str, AtomBlock] = {name: block for block in atoms.blocks for name in block.groups}
    left = {block.name: sum(int(keep[name].sum()) for name in block.groups) for block in atoms.blocks}
    taken = dict.fromkeys(queues, 0)
    removal: list[tuple[str, list[int]]] = []
    while heap:
        _, _, name = heapq.heappop(heap)
        chunk = queues[name][taken[name]]
        block = block_of[name]
        allowed = left[block.name] - block.minimum
        if allowed < len(chunk):
            continue
        taken[name] += 1
        left[block.name] -= len(chunk)
        removal.append((name, chunk))
    return removal


def _exchanges(atoms: Atoms, scores: Mapping[str, Tensor], start: Keep, least: Keep, divisor: int) -> list[Step]:
    """Return for each block that must keep units the step from what is left to what costs the fewest MACs."""
    steps: list[Step] = []
    for block in atoms.blocks:
        cheapest = _cheapest_widths(atoms, block, start, divisor)
        macs = {name: atoms.group(name).cost["macs"] for name in block.groups}
        now = sum(macs[name] * int(least[name].sum()) for name in block.groups)
        if cheapest is None or sum(macs[name] * width for name, width in cheapest.items()) >= now:
            continue
        step: Step = []
        for name, width in cheapest.items():
            order = torch.sort(scores[name].detach().abs(), descending=True, stable=True).indices.tolist()
            living = [unit for unit in order if start[name][unit]]
            step += [(name, living[:width], True), (name, living[width:], False)]
        steps.append(step)
    return steps


def _cheapest_widths(atoms: Atoms, block: AtomBlock, start: Keep, divisor: int) -> dict[str, int] | None:
    """Return the allowed width of each group that together cost the fewest MACs, None if nothing is allowed."""
    best: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}  # by units, counted up to the minimum
    for name in block.groups:
        macs, living = atoms.group(name).cost["macs"], int(start[name].sum())
        longer: dict[int, tuple[int, tuple[int, ...]]] = {}
        for units, (total, widths) in best.items():
            for width in sorted({*range(0, living, divisor), living}):
                reached = min(block.minimum, units + width)
                candidate = (total + macs * width, (*widths, width))
                longer[reached] = min(longer.get(reached, candidate), candidate)
        best = longer
    if block.minimum not in best:
        return None
    return dict(zip(block.groups, best[block.minimum][1], strict=True))
