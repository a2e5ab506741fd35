"""A decision as a few choices from short lists: what tables of numbers and densities can be kept for.

A walk may ask for a real number, one of a million widths or a subset of forty items. Here each becomes one or several
*parts*, each the choice of one index below a ``count`` that a table can hold:

================================  ==========================================================================
options                           parts
================================  ==========================================================================
up to ``LISTED`` options          one: the index of the option
a longer list or range            one: which of ``BINS`` equal stretches; inside it the option is uniform
an interval                       one: which of ``BINS`` equal stretches; inside it the value is uniform
subsets, more than ``LISTED``     one for each item, in or out, as far as the size leaves a choice
================================  ==========================================================================

``choose_value`` goes from parts to a value, ``parts_of`` from a value back to its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from archsmith.space import Decision, Interval, Mask, Options, Value
from archsmith.space.deciders import option_index
from archsmith.space.options import Subsets, option_count

LISTED = 2_048
"""Longest list of options that is one table; a block of 1,153 widths still is."""

BINS = 20
"""Stretches of an interval or of a longer list: the step that ``Real`` calls adjacent."""


@dataclass(frozen=True)
class Part:
    """One choice of an index below ``count``.

    Attributes:
        name: Unique and stable: the decision's path, with the item for a part of a subset.
        count: Number of alternatives.
        mask: One bool per alternative, True where allowed; ``None`` when all are.
        group: Class of the decision.
        ordered: Whether neighbouring alternatives are alike because they are stretches of one scale.
    """

    name: str
    count: int
    mask: Mask
    group: str
    ordered: bool = False


Choose = Callable[[Part], int]


def choose_value(
    path: str, options: Options, mask: Mask, group: str, choose: Choose, place: Callable[[], float]
) -> Value:
    """Return the value that ``choose`` decides on, part by part.

    Args:
        path: As the walk asks.
        options: As the walk asks.
        mask: As the walk asks.
        group: As the walk asks.
        choose: Returns an allowed index for each part.
        place: Returns where inside a stretch, in [0, 1): a stream's ``random``. Not called for listed options.
    """
    if isinstance(options, Interval):
        if options.low == options.high:
            return options.low
        return options.at((choose(Part(path, BINS, None, group, ordered=True)) + place()) / BINS)
    count = int(option_count(options))
    if count <= LISTED:
        return options[choose(Part(path, count, mask, group))]
    if isinstance(options, Subsets) and mask is None:
        return _chosen_subset(path, options, group, choose)
    chosen = choose(Part(path, BINS, _stretch_mask(count, mask), group, ordered=True))
    low, high = _stretch(count, chosen)
    if mask is None:
        return options[low + int(place() * (high - low))]
    allowed = np.flatnonzero(mask[low:high])
    return options[low + int(allowed[int(place() * len(allowed))])]


def parts_of(decision: Decision) -> list[tuple[Part, int]]:
    """Return the parts of a decision that was made, each with the index that was chosen; none for a forced value."""
    path, options, mask, group, value = decision
    if isinstance(options, Interval):
        if options.low == options.high:
            return []
        assert isinstance(value, float)
        part = Part(path, BINS, None, group, ordered=True)
        return [(part, min(int(options.fraction(value) * BINS), BINS - 1))]
    count = int(option_count(options))
    if count > LISTED and isinstance(options, Subsets) and mask is None:
        assert isinstance(value, tuple)
        return _subset_parts(path, options, group, value)
    index = option_index(value, options)
    assert index is not None, "a decision is among its options"
    if count <= LISTED:
        return [(Part(path, count, mask, group), index)]
    stretch = next(number for number in range(BINS) if index < _stretch(count, number)[1])
    return [(Part(path, BINS, _stretch_mask(count, mask), group, ordered=True), stretch)]


def _stretch(count: int, number: int) -> tuple[int, int]:
    """Return the first index of a stretch and the one behind its last."""
    return count * number // BINS, count * (number + 1) // BINS


def _stretch_mask(count: int, mask: Mask) -> Mask:
    if mask is None:
        return None
    return np.array([bool(mask[slice(*_stretch(count, number))].any()) for number in range(BINS)])


def _chosen_subset(path: str, options: Subsets, group: str, choose: Choose) -> tuple[Value, ...]:
    chosen: list[Value] = []
    for position, item in enumerate(options.items):
        if len(chosen) == options.maximum:
            break
        left = len(options.items) - position
        forced = len(chosen) + left == options.minimum
        if forced or choose(Part(f"{path}:{item!r}", 2, None, f"{group}:{item!r}")):
            chosen.append(item)
    return tuple(chosen)


def _subset_parts(path: str, options: Subsets, group: str, value: tuple[Value, ...]) -> list[tuple[Part, int]]:
    parts: list[tuple[Part, int]] = []

    def recorded(part: Part) -> int:
        item = options.items[names[part.name]]
        parts.append((part, int(item in value)))
        return parts[-1][1]

    names = {f"{path}:{item!r}": position for position, item in enumerate(options.items)}
    _chosen_subset(path, options, group, recorded)
    return parts
