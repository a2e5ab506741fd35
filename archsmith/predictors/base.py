"""The contract of a predictor: features in, mean and uncertainty out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from archsmith.core.errors import Shown, UserError
from archsmith.core.rng import numpy_stream, seed_of

# N examples, D features


@dataclass(frozen=True)
class Prediction:
    """What a predictor says about N examples.

    Attributes:
        mean: Float64 of shape (N,).
        std: Float64 of shape (N,), one standard deviation of the predictor's own uncertainty, not negative.
    """

    mean: np.ndarray
    std: np.ndarray


class Predictor(ABC):
    """Learns one number from features; deterministic given its seed.

    Scaling of features and targets is the predictor's own business: ``predict`` answers in the units of ``fit``. A
    predictor has no state to save: it is made again by ``fit`` from the same examples.

    Targets that are all equal (a single example, say) carry nothing to learn: every prediction is then that value,
    with a standard deviation of zero.

    Final classes implement ``_fit`` and ``_predict`` on checked features and on targets of mean 0 and variance 1.

    Args:
        seed: Seed of everything the predictor draws.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed
        self._width: int | None = None
        self._constant = True
        self._offset, self._scale = 0.0, 1.0

    def fit(self, features_ND: np.ndarray, targets_N: np.ndarray) -> None:
        """Learn from N examples, replacing what was learned before.

        Args:
            features_ND: Float64 of shape (N, D), finite.
            targets_N: Float64 of shape (N,), finite.

        Raises:
            UserError: Shapes that do not match, no example, NaN or an infinity.
        """
        features, targets = self._checked(features_ND, targets_N)
        if not self._constant:
            self._fit(features, (targets - self._offset) / self._scale)

    def _checked(self, features_ND: np.ndarray, targets_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Check the examples, note their width and the scale of their targets, and return copies."""
        features = _finite("features", _matrix(features_ND))
        targets = _finite("targets", np.array(targets_N, dtype=np.float64))
        if targets.shape != features.shape[:1] or not features.size:
            raise UserError(
                "targets",
                Shown(f"shape {targets.shape} for features of shape {features.shape}"),
                allowed="features of shape (N, D) and targets of shape (N,), N and D from 1",
            )
        self._width = features.shape[1]
        # Of equal numbers the computed mean can be one rounding away, and its spread be noise: ask the numbers.
        self._constant = bool((targets == targets[0]).all())
        self._offset = float(targets[0] if self._constant else targets.mean())
        self._scale = 1.0 if self._constant else float(targets.std())
        return features, targets

    def predict(self, features_ND: np.ndarray) -> Prediction:
        """Return mean and uncertainty of N examples.

        Raises:
            UserError: Another number of features than ``fit`` saw, or nothing was fitted yet.
        """
        if self._width is None:
            raise UserError("predict", Shown("a call before fit"), allowed="after fit(features, targets)")
        features = _finite("features", _matrix(features_ND))
        if features.shape[1] != self._width:
            raise UserError(
                "features", Shown(f"shape {features.shape}"), allowed=f"shape (N, {self._width}), the columns of fit"
            )
        if self._constant or not len(features):
            return Prediction(np.full(len(features), self._offset), np.zeros(len(features)))
        mean, std = self._predict(features)
        return Prediction(self._offset + self._scale * mean, self._scale * np.maximum(std, 0.0))

    @abstractmethod
    def _fit(self, features: np.ndarray, targets: np.ndarray) -> None:
        """Learn from checked features and standardised targets that are not all equal."""

    @abstractmethod
    def _predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation, in standardised units."""

    def _library_seed(self, *names: str | int) -> int:
        """Return a seed of 32 bits, what every library takes, for the stream ``names``."""
        return seed_of(self.seed, type(self).__name__, *names) >> 31


Learn = Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]
"""From features and targets to a function that predicts."""


def out_of_fold_error(learn: Learn, features: np.ndarray, targets: np.ndarray, folds: int, seed: int) -> float:
    """Return the root mean square error of models that did not see the example: an honest, if constant, uncertainty.

    Args:
        learn: Fits one model.
        features: Shape (N, D).
        targets: Shape (N,), N from 2.
        folds: Number of parts, from 2; at most N are made.
        seed: Of the partition.
    """
    order = numpy_stream(seed, "folds").permutation(len(targets))
    squared = 0.0
    for part in np.array_split(order, min(folds, len(targets))):
        rest = np.setdiff1d(order, part)
        squared += float(((learn(features[rest], targets[rest])(features[part]) - targets[part]) ** 2).sum())
    return float(np.sqrt(squared / len(targets)))


def at_least(name: str, given: int | float, low: int | float) -> None:
    """Refuse a setting that is no finite number from ``low``.

    Raises:
        UserError: Names the setting.
    """
    if isinstance(given, bool) or not isinstance(given, int | float) or not np.isfinite(given) or given < low:
        raise UserError(name, given, allowed=f"a number from {low}")


def _matrix(features: np.ndarray) -> np.ndarray:
    array = np.array(features, dtype=np.float64)  # a copy: predictors keep it
    if array.ndim != 2:
        raise UserError("features", Shown(f"shape {array.shape}"), allowed="shape (N, D)")
    return array


def _finite(name: str, array: np.ndarray) -> np.ndarray:
    if not (fine := np.isfinite(array)).all():
        where = tuple(int(i) for i in np.argwhere(~fine)[0])
        raise UserError(
            name,
            Shown(f"{array[where]} at {where}"),
            allowed="finite numbers",
            hint="Leave out failed evaluations before fit.",
        )
    return array
