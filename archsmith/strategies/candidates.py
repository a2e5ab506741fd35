"""Architectures to choose from, with their features: a whole space when it is small, or a listed part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

import numpy as np

from archsmith.core.errors import Shown, UserError
from archsmith.core.rng import numpy_stream, seed_of
from archsmith.space import Architecture, Interval, Space
from archsmith.space.deciders import option_index
from archsmith.space.options import option_count

# M candidates, D features

Features = Callable[[Architecture], np.ndarray]
"""Returns a float64 vector of fixed length for an architecture of the space."""

WIDEST = 1_000
"""Columns of a one-hot encoding beyond which decisions are hashed instead: a range of widths is one column there."""

HASHED = 256
"""Columns of the hashed decisions."""


class CandidatePool:
    """Different networks with their features, in a fixed order; may be shared by many searches.

    Args:
        architectures: Candidates; of those with one ``network_digest`` the first is kept.
        features: Their features.

    Attributes:
        architectures: Those that were kept.
        features_MD: Float64 of shape (M, D).

    Raises:
        UserError: No architecture, or features that are no finite vectors of one length.
    """

    def __init__(self, architectures: Iterable[Architecture], features: Features) -> None:
        self._places: dict[str, int] = {}
        self.architectures: list[Architecture] = []
        for architecture in architectures:
            if architecture.network_digest not in self._places:
                self._places[architecture.network_digest] = len(self.architectures)
                self.architectures.append(architecture)
        if not self.architectures:
            raise UserError("architectures", [], allowed="at least one architecture")
        self.features_MD = feature_rows(features, self.architectures)

    def __len__(self) -> int:
        return len(self.architectures)

    def place(self, architecture: Architecture) -> int | None:
        """Return the number of the candidate that is this network, None when there is none."""
        return self._places.get(architecture.network_digest)


def feature_rows(features: Features, architectures: Sequence[Architecture]) -> np.ndarray:
    """Return the features of several architectures, shape (M, D).

    Raises:
        UserError: They are no finite vectors of one length.
    """
    rows = [np.asarray(features(architecture), dtype=np.float64) for architecture in architectures]
    if len({row.shape for row in rows}) != 1 or rows[0].ndim != 1:
        shapes = sorted({row.shape for row in rows})
        raise UserError("features", Shown(f"arrays of shape {shapes}"), allowed="vectors of one length")
    matrix = np.stack(rows)
    if not np.isfinite(matrix).all():
        row = int(np.argwhere(~np.isfinite(matrix))[0, 0])
        raise UserError("features", Shown(f"NaN or infinity for {dict(architectures[row])}"), allowed="finite numbers")
    return matrix


def default_features(space: Space) -> Features:
    """Return the one-hot encoding of the space; hashed decisions where it has none, is wide or has real numbers."""
    sample = space.sample(numpy_stream(0, "default features"))
    try:
        width = len(space.encode(sample, "one-hot"))
    except NotImplementedError:
        width = WIDEST + 1
    if width > WIDEST or any(isinstance(decision.options, Interval) for decision in space.trace(sample)):
        return lambda architecture: hashed_decisions(space, architecture)
    return lambda architecture: space.encode(architecture, "one-hot")


def hashed_decisions(space: Space, architecture: Architecture) -> np.ndarray:
    """Return the decisions of any walk as a vector of fixed length, by feature hashing (Weinberger et al. 2009).

    A choice from a list adds a signed 1 at the place of "path = option"; a number from a range or an interval adds its
    position between the ends, 0 to 1, at the place of its path, and 1 at that of "path is there".

    Returns:
        Float64 of shape (256,).
    """
    row = np.zeros(HASHED)

    def put(token: str, value: float) -> None:
        place, sign = _place(token)
        row[place] += sign * value

    for path, options, _, _, choice in space.trace(architecture):
        if isinstance(options, Interval | range):
            put(f"{path}?", 1.0)
            put(path, _position(options, choice))
        elif isinstance(choice, tuple):
            for item in choice:
                put(f"{path}:{item!r}", 1.0)
        else:
            put(f"{path}={choice!r}", 1.0)
    return row


@lru_cache(maxsize=100_000)
def _place(token: str) -> tuple[int, float]:
    """Return the column of a token, and its sign."""
    number = seed_of(0, "hashed decision", token)
    return number % HASHED, 1.0 if number // HASHED % 2 else -1.0


def _position(options: Interval | range, choice: object) -> float:
    if isinstance(options, Interval):
        assert isinstance(choice, float)
        return float(options.fraction(choice)) if options.low < options.high else 0.0
    assert isinstance(choice, int)
    index = option_index(choice, options)
    assert index is not None, "a decision is among its options"
    return index / max(int(option_count(options)) - 1, 1)
