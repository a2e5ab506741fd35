"""A kernel density over architectures, decision by decision.

Every observed architecture is the centre of a kernel: a product over decisions. A decision that an architecture lacks
(its condition was off, its layer did not exist) says nothing about it and counts as uniform. Three kernels:

- unordered options: stay with probability 1 - b, else any option (Aitchison and Aitken 1976);
- ordered options (ordinals, counts): a normal distribution over the positions in [0, 1], cut at the ends and summed
  over each option's cell;
- real numbers: the same without cells, on the scale of the dimension.

Bandwidths follow the normal reference rule, h = 1.06 * spread * n^(-1/(4 + d)), d the number of decisions, the spread a
standard deviation. For unordered options b = h^2, the rate at which it has to vanish (Li and Racine 2003), and the
spread is the root of the Gini impurity, since their codes have no distances (a choice of ours).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from archsmith.space import Architecture, Decision, Interval, Mask, Options, Recording, Space, Value
from archsmith.space.deciders import is_allowed, option_index
from archsmith.space.options import draw, option_count

# P points, N observations

REDRAWS = 20
"""Draws around a centre that may miss what is allowed before the decision is left to a uniform draw."""


@dataclass(frozen=True)
class Coordinate:
    """Where a decision stands.

    Attributes:
        position: In [0, 1] on an ordered scale; else the number of the option.
        count: Number of options, 0 for a real number.
        ordered: Whether options near each other are alike.
    """

    position: float
    count: int
    ordered: bool


def coordinates(space: Space, architecture: Architecture) -> dict[str, Coordinate]:
    """Return the coordinate of each decision of a valid architecture that had an alternative.

    Raises:
        UserError: The architecture is not valid.
    """
    return _placed(space, space.trace(architecture))


def _placed(space: Space, decisions: Sequence[Decision]) -> dict[str, Coordinate]:
    found = {decision.path: _coordinate(space, decision) for decision in decisions}
    return {path: coordinate for path, coordinate in found.items() if coordinate is not None}


def is_ordered(space: Space, path: str, options: Options) -> bool:
    """Return whether options near each other are alike: the first has one neighbour only, and there are others."""
    if isinstance(options, Interval | range):
        return True
    return isinstance(options, tuple) and len(options) > 2 and len(space.adjacent(path, options[0], options)) == 1


def _coordinate(space: Space, decision: Decision) -> Coordinate | None:
    options = decision.options
    count = option_count(options)
    if count == 1:
        return None
    if isinstance(options, Interval):
        assert isinstance(decision.choice, float)
        return Coordinate(options.fraction(decision.choice), 0, True)
    index = option_index(decision.choice, options)
    assert index is not None
    if is_ordered(space, decision.path, options):
        return Coordinate((index + 0.5) / int(count), int(count), True)
    return Coordinate(float(index), int(count), False)


class DecisionDensity:
    """The mean of the kernels around observed architectures.

    Args:
        space: Where they come from.
        observed: Their coordinates (``coordinates``), at least one.
        factor: By which ``sample`` widens the kernels of ordered decisions, to explore. Unordered kernels have finite
            width: a few times as much would be a uniform draw.
        least: Smallest bandwidth of ordered and real decisions.
        least_unordered: Smallest bandwidth of unordered decisions.
    """

    def __init__(
        self,
        space: Space,
        observed: Sequence[Mapping[str, Coordinate]],
        *,
        factor: float = 1.0,
        least: float = 1e-3,
        least_unordered: float = 1e-3,
    ) -> None:
        self.space = space
        self.observed = observed
        self.factor = factor
        columns: dict[str, list[float]] = {}
        self.kinds: dict[str, Coordinate] = {}
        for row, architecture in enumerate(observed):
            for path, coordinate in architecture.items():
                columns.setdefault(path, [math.nan] * len(observed))[row] = coordinate.position
                self.kinds[path] = coordinate
        self.columns = {path: np.array(column) for path, column in columns.items()}
        self.bandwidths = {path: self._bandwidth(path, least, least_unordered) for path in columns}

    def _bandwidth(self, path: str, least: float, least_unordered: float) -> float:
        column = self.columns[path]
        present = column[~np.isnan(column)]
        kind = self.kinds[path]
        if kind.ordered:
            spread = float(present.std())
        else:
            shares = np.unique(present, return_counts=True)[1] / len(present)
            spread = math.sqrt(max(0.0, 1.0 - float((shares**2).sum())))
        width = 1.06 * spread * len(present) ** (-1.0 / (4 + len(self.columns)))
        if kind.ordered:
            return max(least, width)
        return min(max(least_unordered, width**2), 1.0 - 1.0 / kind.count)

    def log_densities(self, points: Sequence[Mapping[str, Coordinate]]) -> np.ndarray:
        """Return the logarithm of the density at architectures given by their coordinates, float64 of shape (P,)."""
        logs_PN = np.zeros((len(points), len(self.observed)))
        rows: dict[tuple[str, int], list[int]] = {}  # of the points with the same decision, over as many options
        for row, point in enumerate(points):
            for path, at in point.items():
                rows.setdefault((path, at.count), []).append(row)
        for (path, count), which in rows.items():
            uniform = 1.0 / count if count else 1.0
            if path not in self.columns:
                logs_PN[which] += math.log(uniform)
                continue
            positions = np.array([points[row][path].position for row in which])
            kernels = self._kernels(path, positions[:, None], count, points[which[0]][path].ordered)
            logs_PN[which] += np.log(np.where(np.isnan(kernels), uniform, np.maximum(kernels, 1e-300)))
        most = logs_PN.max(axis=1, keepdims=True)
        return np.asarray(most[:, 0] + np.log(np.exp(logs_PN - most).mean(axis=1)))

    def _kernels(self, path: str, positions_P1: np.ndarray, count: int, ordered: bool) -> np.ndarray:
        """Return each observation's kernel at P positions, shape (P, N); NaN where it lacks the decision."""
        from scipy.special import ndtr

        centres, width = self.columns[path], self.bandwidths[path]
        if not ordered:
            same = (1.0 - width) + width / count
            kernels = np.where(centres == positions_P1, same, width / count)
            return np.where(np.isnan(centres), np.nan, kernels)
        mass = ndtr((1.0 - centres) / width) - ndtr(-centres / width)
        if count == 0:
            away = (positions_P1 - centres) / width
            return np.asarray(np.exp(-0.5 * away**2) / (width * math.sqrt(2 * math.pi) * mass))
        half = 0.5 / count
        upper, lower = (positions_P1 + half - centres) / width, (positions_P1 - half - centres) / width
        return np.asarray((ndtr(upper) - ndtr(lower)) / mass)

    def sample(self, rng: np.random.Generator) -> tuple[Architecture, dict[str, Coordinate]]:
        """Return an architecture near a random observation, by one walk, with its coordinates.

        Raises:
            DeadEnd: The drawn decisions cannot be completed.
        """
        centre = self.observed[int(rng.integers(len(self.observed)))]

        def decide(path: str, options: Options, mask: Mask, group: str) -> Value:
            if path in centre:
                for _ in range(REDRAWS):
                    value = self._near(path, centre[path], options, rng)
                    if is_allowed(value, options, mask):
                        return value
            return draw(options, mask, rng)

        recording = Recording(decide)
        architecture = self.space.walk(recording)
        return architecture, _placed(self.space, recording.decisions)

    def _near(self, path: str, centre: Coordinate, options: Options, rng: np.random.Generator) -> Value:
        from scipy.special import ndtr, ndtri

        width = self.bandwidths[path]
        if not centre.ordered:
            assert not isinstance(options, Interval)
            # Not draw() of all options: it would ignore that the centre was drawn from another list of options.
            stays = rng.random() >= width and centre.count == option_count(options)
            return options[int(centre.position)] if stays else draw(options, None, rng)
        width *= self.factor
        low, high = ndtr(-centre.position / width), ndtr((1.0 - centre.position) / width)
        position = centre.position + width * float(ndtri(low + (high - low) * rng.random()))
        position = min(max(position, 0.0), 1.0)
        if isinstance(options, Interval):
            return options.at(position)
        count = int(option_count(options))
        return options[min(int(position * count), count - 1)]
