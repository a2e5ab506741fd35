"""Architectures of a given cost: the uniformly scaled network and random ones, to compare a search with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space import Architecture, ProductSpace

PRECISION = 1e-4
"""Relative precision of the common factor; on usual supernets far less than one atom."""

_NOTHING = 1e-8  # a common factor that leaves no atom anywhere

Fits = Callable[[Architecture], bool]


class WidthFamily(Protocol):
    """A family whose architectures are widths."""

    @property
    def space(self) -> ProductSpace:
        """The space of the widths."""

    def scaled(self, ratio: float, factors: Mapping[str, float] | None = None) -> Architecture:
        """Return the architecture with every width times ``ratio`` times its own factor, at most the largest."""


def uniform_within(family: WidthFamily, fits: Fits) -> Architecture:
    """Return the widest uniformly scaled architecture within the limits: every branch by the same factor.

    Args:
        family: The family.
        fits: Whether an architecture is within the limits; wider ones must not fit better.

    Raises:
        UserError: Even the narrowest one does not fit.
    """
    return _widest(family.scaled, 1.0, fits)


def random_within(family: WidthFamily, rng: np.random.Generator, fits: Fits) -> Architecture:
    """Return a random architecture that is just within the limits.

    Every branch draws its own factor, uniform in [0, 1]; all are multiplied by one common factor, the largest with
    which the costs are within the limits. No branch is wider than in the largest network.

    Args:
        family: The family.
        rng: Source of the factors, one for each dimension of the space in its order.
        fits: As for ``uniform_within``.

    Raises:
        UserError: As for ``uniform_within``.
    """
    paths = family.space.paths
    factors = dict(zip(paths, rng.random(len(paths)).tolist(), strict=True))
    largest = 1.0 / max(min(factors.values(), default=1.0), PRECISION)
    return _widest(lambda ratio: family.scaled(ratio, factors), largest, fits)


def _widest(scaled: Callable[[float], Architecture], largest: float, fits: Fits) -> Architecture:
    """Find the largest ratio in (0, ``largest``] whose architecture fits, by bisection."""
    if fits(scaled(largest)):
        return scaled(largest)
    low, high = 0.0, largest
    best = scaled(low)
    if not fits(best):
        raise UserError("budget", "the run's", allowed="one that the narrowest scaled network keeps")
    while high - low > max(PRECISION * high, _NOTHING):
        middle = (low + high) / 2
        if fits(candidate := scaled(middle)):
            low, best = middle, candidate
        else:
            high = middle
    return best
