"""Ensembles of any predictor: many samples need one strong model, few samples need several that disagree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from archsmith.core.errors import UserError
from archsmith.core.rng import numpy_stream, seed_of
from archsmith.predictors.base import Predictor, at_least


class Ensemble(Predictor):
    """Several predictors that differ in their seed, and in their examples when bagged.

    Args:
        make: Returns a fresh predictor for a seed, ``lambda seed: Mlp(seed=seed)``.
        members: Number of predictors, from 2.
        bagging: Each member sees a bootstrap of the examples; otherwise all see all and only seeds differ (a deep
            ensemble, Lakshminarayanan et al. 2017), which is no ensemble for predictors that draw nothing.
        spread: "members": the standard deviation over the members' means, what nobody has learned yet. "mixture": of
            the mixture of the members' normal distributions, their own uncertainty included.
        seed: Seed of the members' seeds and bags.

    Raises:
        UserError: A setting out of range.
    """

    def __init__(
        self,
        make: Callable[[int], Predictor],
        *,
        members: int = 5,
        bagging: bool = False,
        spread: Literal["members", "mixture"] = "members",
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        at_least("members", members, 2)
        if spread not in ("members", "mixture"):
            raise UserError("spread", spread, allowed="'members' or 'mixture'")
        self.make, self.members, self.bagging, self.spread = make, members, bagging, spread

    def _fit(self, features: np.ndarray, targets: np.ndarray) -> None:
        self._models = []
        rng = numpy_stream(self.seed, "bags")
        for member in range(self.members):
            rows = rng.integers(len(targets), size=len(targets)) if self.bagging else np.arange(len(targets))
            model = self.make(seed_of(self.seed, "member", member) >> 31)
            model.fit(features[rows], targets[rows])
            self._models.append(model)

    def member_means(self, features_ND: np.ndarray) -> np.ndarray:
        """Return what each member predicts, shape (members, N), in the units of ``fit``."""
        self.predict(features_ND[:0])  # the checks
        if self._constant:
            return np.full((self.members, len(features_ND)), self._offset)
        return self._offset + self._scale * np.stack([model.predict(features_ND).mean for model in self._models])

    def _predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = [model.predict(features) for model in self._models]
        means = np.stack([each.mean for each in found])
        variance = means.var(0)
        if self.spread == "mixture":
            variance = variance + np.mean([each.std**2 for each in found], 0)
        return means.mean(0), np.sqrt(variance)
