"""Forests and boosted trees: no scaling, no smoothness, robust to useless features."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from archsmith.core.errors import MissingExtra, UserError
from archsmith.core.rng import numpy_stream
from archsmith.predictors.base import Predictor, at_least


class RandomForest(Predictor):
    """Bagged regression trees (Breiman 2001); the standard deviation is the spread over the trees.

    Args:
        trees: Number of trees, from 2.
        features_per_split: Share of the features that each split looks at, above 0 and at most 1.
        seed: Seed of the bags and splits.

    Raises:
        UserError: A setting out of range.
    """

    def __init__(self, *, trees: int = 100, features_per_split: float = 1 / 3, seed: int = 0) -> None:
        super().__init__(seed=seed)
        at_least("trees", trees, 2)
        if not 0 < features_per_split <= 1:
            raise UserError("features_per_split", features_per_split, allowed="a share above 0 and at most 1")
        self.trees, self.features_per_split = trees, features_per_split

    def _fit(self, features: np.ndarray, targets: np.ndarray) -> None:
        from sklearn.ensemble import RandomForestRegressor

        self._model = RandomForestRegressor(
            self.trees, max_features=self.features_per_split, random_state=self._library_seed()
        ).fit(features, targets)

    def _predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        votes = np.stack([tree.predict(features) for tree in self._model.estimators_])
        return votes.mean(0), votes.std(0)


class Boosting(Predictor):
    """Gradient boosting of shallow trees (Friedman 2001) on histograms, in several bags.

    One booster has no uncertainty; here ``members`` boosters each see a bootstrap of the examples, and mean and
    standard deviation are taken over them.

    Args:
        engine: "sklearn" (histogram boosting), or "lightgbm", which the extra ``boost`` brings.
        rounds: Trees of one booster, from 1.
        learning_rate: Shrinkage of each tree, above 0.
        leaves: Leaves of one tree, from 2.
        members: Number of bags, from 1; with 1 the standard deviation is zero.
        seed: Seed of the bags.

    Raises:
        UserError: A setting out of range.
        MissingExtra: On ``fit``, when lightgbm is asked for and not installed.
    """

    def __init__(
        self,
        *,
        engine: Literal["sklearn", "lightgbm"] = "sklearn",
        rounds: int = 100,
        learning_rate: float = 0.1,
        leaves: int = 8,
        members: int = 5,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        if engine not in ("sklearn", "lightgbm"):
            raise UserError("engine", engine, allowed="'sklearn' or 'lightgbm'")
        at_least("rounds", rounds, 1)
        at_least("learning_rate", learning_rate, 1e-9)
        at_least("leaves", leaves, 2)
        at_least("members", members, 1)
        self.engine, self.rounds, self.learning_rate = engine, rounds, learning_rate
        self.leaves, self.members = leaves, members

    def _fit(self, features: np.ndarray, targets: np.ndarray) -> None:
        rng = numpy_stream(self.seed, "boosting")
        self._models = []
        for member in range(self.members):
            rows = rng.integers(len(targets), size=len(targets)) if self.members > 1 else np.arange(len(targets))
            self._models.append(self._booster(len(targets), member).fit(features[rows], targets[rows]))

    def _booster(self, examples: int, member: int) -> Any:
        # Both libraries default to 20 examples per leaf, which forbids any split below 40 examples.
        smallest = int(np.clip(examples // 20, 1, 20))
        seed = self._library_seed(member) >> 1  # LightGBM: a signed 32-bit number
        if self.engine == "lightgbm":
            try:
                from lightgbm import LGBMRegressor
            except ImportError as error:
                raise MissingExtra("lightgbm", "boost", "boosting with engine 'lightgbm'") from error
            return LGBMRegressor(
                n_estimators=self.rounds,
                learning_rate=self.learning_rate,
                num_leaves=self.leaves,
                min_child_samples=smallest,
                min_child_weight=0.0,
                random_state=seed,
                n_jobs=1,
                deterministic=True,
                force_row_wise=True,
                verbose=-1,
            )
        from sklearn.ensemble import HistGradientBoostingRegressor

        return HistGradientBoostingRegressor(
            max_iter=self.rounds,
            learning_rate=self.learning_rate,
            max_leaf_nodes=self.leaves,
            min_samples_leaf=smallest,
            early_stopping=False,
            random_state=seed,
        )

    def _predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        votes = np.stack([model.predict(features) for model in self._models])
        return votes.mean(0), votes.std(0)
