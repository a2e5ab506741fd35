"""Costs between measured widths: piecewise linear, with an error that is stated because it was found.

Latency is no smooth function of a width: kernels work in vectors and tiles. So the error is not assumed: every measured
width but the first and last is left out in turn and read from its neighbours. Outside the measured range nothing is
answered.
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from archsmith.core.errors import Shown, UserError
from archsmith.cost.lookup import Row


@dataclass(frozen=True)
class InterpolatedRow:
    """The cost of one kind of block by one size (a width, say).

    Args:
        points: Measured row by size, at least two.

    Raises:
        UserError: Fewer than two sizes.
    """

    points: Mapping[int, Row]
    _sizes: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.points) < 2:
            raise UserError("points", sorted(self.points), allowed="at least two measured sizes")
        object.__setattr__(self, "_sizes", tuple(sorted(self.points)))

    def at(self, size: int) -> Row:
        """Return the row of a size: as measured, or between its two neighbours (count 0: nothing was measured).

        Raises:
            UserError: Outside the measured sizes.
        """
        if size in self.points:
            return self.points[size]
        low, high = self._sizes[0], self._sizes[-1]
        if not low < size < high:
            raise UserError("size", size, allowed=f"{low} to {high}, the measured range: nothing is extrapolated")
        after = bisect_left(self._sizes, size)
        return _between(self._sizes[after - 1], self._sizes[after], size, self.points)

    @property
    def errors(self) -> tuple[float, ...]:
        """Relative error at every inner measured size when it is read from its neighbours; empty with two sizes."""
        found = []
        for before, size, after in zip(self._sizes, self._sizes[1:], self._sizes[2:], strict=False):
            true = self.points[size].mean
            read = _between(before, after, size, self.points).mean
            found.append(abs(read - true) / true if true > 0 else float(read > 0))
        return tuple(found)

    @property
    def median_error(self) -> float | None:
        """Median of ``errors``, over gaps twice as wide as those that ``at`` bridges; None with two sizes."""
        return statistics.median(self.errors) if self.errors else None

    def to_json(self) -> dict[str, Any]:
        """Return sizes, means, standard deviations and counts."""
        return {str(size): [row.mean, row.std, row.count] for size, row in sorted(self.points.items())}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> InterpolatedRow:
        """Return what ``to_json`` described.

        Raises:
            UserError: Something else.
        """
        try:
            return cls({int(size): Row(float(a), float(b), int(c)) for size, (a, b, c) in data.items()})
        except (TypeError, ValueError) as error:
            raise UserError("points", Shown(str(error)), allowed="what InterpolatedRow.to_json wrote") from error


def _between(before: int, after: int, size: int, points: Mapping[int, Row]) -> Row:
    share = (size - before) / (after - before)
    low, high = points[before], points[after]
    spread = (((1 - share) * low.std) ** 2 + (share * high.std) ** 2) ** 0.5
    return Row((1 - share) * low.mean + share * high.mean, spread, 0)
