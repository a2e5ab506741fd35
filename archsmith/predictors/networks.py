"""Multilayer perceptron: for many samples, or in ensembles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from archsmith.predictors.base import Predictor, at_least, out_of_fold_error


class Mlp(Predictor):
    """A fully connected ReLU network, trained with Adam on the squared error; features are standardised.

    One network has no uncertainty: the standard deviation is one number, the error on examples left out in turn, or
    zero with ``folds=0``, which is what members of an ``Ensemble`` need.

    Args:
        hidden: Units of the hidden layers.
        epochs: Passes over the examples, from 1.
        learning_rate: Of Adam, above 0.
        penalty: Weight of the squared norm of the weights, from 0.
        folds: Parts of the cross-validation behind the standard deviation: 0, or from 2.
        seed: Seed of the initial weights, the order of the examples and the folds.

    Raises:
        UserError: A setting out of range.
    """

    def __init__(
        self,
        *,
        hidden: Sequence[int] = (64, 64),
        epochs: int = 200,
        learning_rate: float = 0.01,
        penalty: float = 1e-3,
        folds: int = 5,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        for units in hidden:
            at_least("hidden", units, 1)
        at_least("epochs", epochs, 1)
        at_least("learning_rate", learning_rate, 1e-9)
        at_least("penalty", penalty, 0)
        at_least("folds", folds, 2 if folds else 0)
        self.hidden, self.epochs, self.learning_rate = tuple(hidden), epochs, learning_rate
        self.penalty, self.folds = penalty, folds

    def _fit(self, features: np.ndarray, targets: np.ndarray) -> None:
        self._predict_mean = self._learn(features, targets)
        self._error = 0.0
        if self.folds:
            self._error = out_of_fold_error(self._learn, features, targets, self.folds, self._library_seed("folds"))

    def _learn(self, features: np.ndarray, targets: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        import warnings

        from sklearn.exceptions import ConvergenceWarning
        from sklearn.neural_network import MLPRegressor
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        network = MLPRegressor(
            hidden_layer_sizes=self.hidden,
            alpha=self.penalty,
            batch_size=min(32, len(targets)),
            learning_rate_init=self.learning_rate,
            max_iter=self.epochs,
            tol=0.0,  # all epochs: stopping by a loss that stalls would depend on the scale of its noise
            random_state=self._library_seed("weights"),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            predict: Callable[[np.ndarray], np.ndarray] = (
                make_pipeline(StandardScaler(), network).fit(features, targets).predict
            )
        return predict

    def _predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._predict_mean(features), np.full(len(features), self._error)
