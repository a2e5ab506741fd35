"""Options: what a decision may choose from, lazily, and how to draw from it.

Options are a sequence of values (a tuple, or the lazy ``range`` and ``Subsets``), or an ``Interval``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, overload

import numpy as np

from archsmith.space.values import Value


@dataclass(frozen=True)
class Interval:
    """The closed interval [low, high]: the options of a real dimension."""

    low: float
    high: float
    log: bool = False

    def __contains__(self, value: object) -> bool:
        return isinstance(value, float) and self.low <= value <= self.high

    def at(self, fraction: float) -> float:
        """Return the value at ``fraction`` in [0, 1] of the way, on the logarithmic scale if ``log``."""
        if self.log:
            value = math.exp(math.log(self.low) + fraction * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + fraction * (self.high - self.low)
        return min(max(value, self.low), self.high)

    def fraction(self, value: float) -> float:
        """Return where ``value`` lies, in [0, 1]: the inverse of ``at`` up to rounding."""
        if self.low == self.high:
            return 0.0
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)


Options: TypeAlias = Sequence[Value] | Interval


class Subsets(Sequence["tuple[Value, ...]"]):
    """The subsets of ``items`` with ``minimum`` to ``maximum`` members, by size, then lexicographic; not stored."""

    def __init__(self, items: tuple[Value, ...], minimum: int, maximum: int) -> None:
        self.items, self.minimum, self.maximum = items, minimum, maximum
        self.total = sum(math.comb(len(items), k) for k in range(minimum, maximum + 1))

    def __len__(self) -> int:
        return self.total

    @overload
    def __getitem__(self, rank: int) -> tuple[Value, ...]: ...
    @overload
    def __getitem__(self, rank: slice) -> list[tuple[Value, ...]]: ...
    def __getitem__(self, rank: int | slice) -> tuple[Value, ...] | list[tuple[Value, ...]]:
        if isinstance(rank, slice):
            return [self[i] for i in range(*rank.indices(self.total))]
        if not 0 <= (rank := rank + self.total if rank < 0 else rank) < self.total:
            raise IndexError(rank)
        size = self.minimum
        while rank >= (block := math.comb(len(self.items), size)):
            rank -= block
            size += 1
        chosen: list[Value] = []
        for position, item in enumerate(self.items):
            if size == len(chosen):
                break
            with_item = math.comb(len(self.items) - position - 1, size - len(chosen) - 1)
            if rank < with_item:
                chosen.append(item)
            else:
                rank -= with_item
        return tuple(chosen)

    def __iter__(self) -> Iterator[tuple[Value, ...]]:
        return (self[i] for i in range(self.total))

    def rank(self, member: Sequence[bool]) -> int:
        """Return the position of the subset given as one membership flag per item."""
        size = sum(member)
        rank = sum(math.comb(len(self.items), k) for k in range(self.minimum, size))
        left = size
        for position, inside in enumerate(member):
            if not left:
                break
            if inside:
                left -= 1
            else:
                rank += math.comb(len(self.items) - position - 1, left - 1)
        return rank


def draw_below(bound: int, rng: np.random.Generator) -> int:
    """Return an integer drawn uniformly from [0, bound), for any positive ``bound``, however large."""
    if bound < 1 << 63:
        return int(rng.integers(bound))
    bits = bound.bit_length()
    while (drawn := int.from_bytes(rng.bytes((bits + 7) // 8), "big") >> (-bits % 8)) >= bound:
        pass
    return drawn


def option_count(options: Options) -> int | float:
    """Return how many options there are: an exact int, or ``math.inf`` for a proper interval."""
    if isinstance(options, Interval):
        return 1 if options.low == options.high else math.inf
    if isinstance(options, range):  # len() of a range stops at 2**63
        return max(0, -((options.start - options.stop) // options.step))
    return options.total if isinstance(options, Subsets) else len(options)


def draw(options: Options, mask: np.ndarray | None, rng: np.random.Generator) -> Value:
    """Return one of the allowed options, uniformly (log-uniformly on a logarithmic interval).

    Args:
        options: What may be chosen.
        mask: One bool per option, True where allowed; ``None`` allows all.
        rng: The stream to draw from.
    """
    if isinstance(options, Interval):
        return options.at(float(rng.random()))
    if mask is None:
        return options[draw_below(int(option_count(options)), rng)]
    allowed = np.flatnonzero(mask)
    return options[int(allowed[rng.integers(len(allowed))])]


def described(options: Options, mask: np.ndarray | None = None) -> str:
    """Return the allowed options as short text for an error."""
    if isinstance(options, Interval):
        return f"a float from {options.low!r} to {options.high!r}"
    if isinstance(options, Subsets):
        return f"a tuple of {options.minimum} to {options.maximum} of {list(options.items)}, in this order"
    if isinstance(options, range) and mask is None:
        step = f" in steps of {options.step}" if options.step != 1 else ""
        return f"an integer from {options[0]} to {options[-1]}{step}"
    allowed = [options[int(i)] for i in (range(len(options)) if mask is None else np.flatnonzero(mask))]
    if len(allowed) > 12:
        return f"{len(allowed)} values: {', '.join(map(repr, allowed[:6]))}, ..., {allowed[-1]!r}"
    return f"one of {allowed}" if allowed else "nothing"
