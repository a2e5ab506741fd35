"""The contract of a predictor: features in, mean and uncertainty out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

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

    Scaling of features and targets is the predictor's own business: ``predict`` answers in the units of ``fit``.
    """

    @abstractmethod
    def fit(self, features_ND: np.ndarray, targets_N: np.ndarray) -> None:
        """Learn from N examples, replacing what was learned before.

        Args:
            features_ND: Float64 of shape (N, D), finite.
            targets_N: Float64 of shape (N,), finite.

        Raises:
            UserError: Shapes that do not match, no example, NaN or an infinity.
        """

    @abstractmethod
    def predict(self, features_ND: np.ndarray) -> Prediction:
        """Return mean and uncertainty of N examples.

        Raises:
            UserError: Another number of features than ``fit`` saw, or nothing was fitted yet.
        """
