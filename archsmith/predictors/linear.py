"""Ridge regression and support vector regression: what small samples of nearly additive quantities need."""

from __future__ import annotations

from typing import Any

import numpy as np

from archsmith.predictors.base import Predictor, at_least, out_of_fold_error


class Ridge(Predictor):
    """Linear regression under a Gaussian prior, weights in closed form; the strength of the prior comes from the data.

    Prior and noise precision maximise the evidence (MacKay 1992), so there is no penalty to choose. The standard
    deviation is the posterior's, noise included. On the one-hot features of a cell, this is a look-up table per edge
    whose entries are learned together.

    Args:
        seed: Not used: nothing is drawn.
    """

    def _fit(self, features: np.ndarray, targets: np.ndarray) -> None:
        from sklearn.linear_model import BayesianRidge

        self._model = BayesianRidge().fit(features, targets)

    def _predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean, std = self._model.predict(features, return_std=True)
        return mean, std


class SupportVectors(Predictor):
    """Support vector regression with a Gaussian kernel (Drucker et al. 1996); features are standardised.

    It has no uncertainty of its own: the standard deviation is one number, the error on examples left out in turn.

    Args:
        penalty: C, the weight of errors outside the tube, above 0.
        tube: Epsilon, the error that costs nothing, in standard deviations of the targets.
        folds: Parts of the cross-validation behind the standard deviation, from 2.
        seed: Seed of the folds.

    Raises:
        UserError: A setting out of range.
    """

    def __init__(self, *, penalty: float = 10.0, tube: float = 0.05, folds: int = 5, seed: int = 0) -> None:
        super().__init__(seed=seed)
        at_least("penalty", penalty, 1e-9)
        at_least("tube", tube, 0)
        at_least("folds", folds, 2)
        self.penalty, self.tube, self.folds = penalty, tube, folds

    def _fit(self, features: np.ndarray, targets: np.ndarray) -> None:
        self._predict_mean = self._learn(features, targets)
        self._error = out_of_fold_error(self._learn, features, targets, self.folds, self._library_seed())

    def _learn(self, features: np.ndarray, targets: np.ndarray) -> Any:
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
        from sklearn.svm import SVR

        machine = SVR(C=self.penalty, epsilon=self.tube)
        machine.random_state = 0  # no setting of SVR; without it, fitting moves numpy's global stream for nothing
        model = make_pipeline(StandardScaler(), machine)
        return model.fit(features, targets).predict

    def _predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._predict_mean(features), np.full(len(features), self._error)
