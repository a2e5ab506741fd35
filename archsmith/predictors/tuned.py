"""Ridge and support vector regression whose settings a cross-validation chooses: the predictors of LINAS.

Labels are divided by a power of ten so that the largest has two digits in front of the point, candidates are compared
by the mean absolute percentage error on held-out fifths, and the best one learns from everything. ``Stacked`` joins
both families by a third regression on their held-out predictions.

Source: Cummings et al. 2022, "A Hardware-Aware Framework for Accelerating Neural Architecture Search Across
Modalities", arXiv 2205.10358.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from archsmith.core.errors import UserError
from archsmith.core.rng import numpy_stream
from archsmith.predictors.base import Predictor, at_least

# N examples, D features

Family = Literal["ridge", "svr"]
Model = Callable[[np.ndarray], np.ndarray]

RIDGE_PENALTIES = tuple(round(0.1 * step, 1) for step in range(1, 101))
"""Penalties of the grid: 0.1 to 10 in steps of 0.1."""

SVR_PENALTIES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""C of the grid, 1 to 100."""


def label_divisor(labels_N: np.ndarray) -> float:
    """Return the power of ten that leaves two digits in front of the point of the largest label; 1 when all are 0.

    Example:
        >>> label_divisor(np.array([431e6, 2e6])), label_divisor(np.array([77.25])), label_divisor(np.array([0.93]))
        (10000000.0, 1.0, 0.01)
    """
    largest = float(np.abs(labels_N).max())
    return 1.0 if largest == 0 else 10.0 ** (math.floor(math.log10(largest)) - 1)


def mape(predicted_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Return the mean absolute percentage error; labels of 0 count as the smallest positive number does."""
    floor = np.finfo(np.float64).eps
    return float(np.mean(np.abs(predicted_N - labels_N) / np.maximum(np.abs(labels_N), floor)) * 100)


def ridge_path(features: np.ndarray, labels: np.ndarray, penalties: Sequence[float]) -> Callable[[np.ndarray], Any]:
    """Return a function that gives the predictions of all penalties at once, shape (len(penalties), N).

    Ridge with an intercept that is not penalised; one eigendecomposition serves every penalty.
    """
    centre, middle = features.mean(axis=0), float(labels.mean())
    left, values, right = np.linalg.svd(features - centre, full_matrices=False)
    shrunk = values[None, :] / (values[None, :] ** 2 + np.asarray(penalties)[:, None])  # (P, r)
    weights = (shrunk * (left.T @ (labels - middle))[None, :]) @ right  # (P, D)
    return lambda rows: middle + weights @ (rows - centre).T


def ridge_model(features: np.ndarray, labels: np.ndarray, penalty: float) -> Model:
    """Return ridge regression with one penalty and an unpenalised intercept."""
    path = ridge_path(features, labels, (penalty,))
    return lambda rows: np.asarray(path(rows)[0])


def svr_model(features: np.ndarray, labels: np.ndarray, penalty: float) -> Model:
    """Return support vector regression with a Gaussian kernel of gamma 1 / D and a tube of width 0."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.svm import SVR

    machine = SVR(kernel="rbf", C=penalty, gamma="auto", epsilon=0.0, max_iter=100_000)
    machine.random_state = 0  # no setting of SVR; without it, fitting moves numpy's global stream for nothing
    with warnings.catch_warnings():  # a setting that does not converge loses the cross-validation, which is enough
        warnings.simplefilter("ignore", ConvergenceWarning)
        machine.fit(features, labels)
    predict: Model = machine.predict
    return predict


class Tuned(Predictor):
    """Ridge or RBF support vectors, whichever a cross-validation by percentage error prefers.

    Args:
        families: Which may be chosen: "ridge", "svr" or both.
        folds: Parts of the cross-validation, from 2 (at most one per example).
        stacked: Join the best of each family by a ridge on their held-out predictions, instead of choosing.
        seed: Seed of the folds.

    The standard deviation is one number: the root mean square error on held-out examples. Features are taken as they
    are (one-hot). Labels are taken in their own units; the predictor divides them by ``label_divisor``.

    Attributes:
        chosen: After ``fit``: family and penalty of each model in use.
        errors: After a search of the grid: family → smallest mean absolute percentage error on held-out examples.

    Raises:
        UserError: A setting out of range.
    """

    def __init__(
        self,
        *,
        families: Sequence[Family] = ("ridge", "svr"),
        folds: int = 5,
        stacked: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        if not families or len(set(families)) != len(families) or not set(families) <= {"ridge", "svr"}:
            raise UserError("families", list(families), allowed="'ridge', 'svr' or both")
        at_least("folds", folds, 2)
        self.families, self.folds, self.stacked = tuple(families), folds, stacked
        self.chosen: dict[Family, float] = {}
        self.errors: dict[Family, float] = {}

    def _fit(self, features: np.ndarray, targets: np.ndarray) -> None:
        labels = targets * self._scale + self._offset
        divisor = label_divisor(labels)
        labels = labels / divisor
        parts = self._parts(len(labels))
        if len(parts) < 2:
            self.chosen, self._error = {"ridge": 1.0}, 0.0
            self._models: list[Model] = [ridge_model(features, labels, 1.0)]
            self._join: Model = lambda rows: rows[:, 0]
        else:
            self._tune(features, labels, parts)
            held_out = self._held_out(features, labels, parts)
            self._models = [_model(family)(features, labels, penalty) for family, penalty in self.chosen.items()]
            self._join = ridge_model(held_out, labels, 1e-3) if self.stacked else (lambda rows: rows[:, 0])
            self._error = float(np.sqrt(np.mean((self._join(held_out) - labels) ** 2)))
        self._divisor = divisor

    def _predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        answers = self._join(np.stack([model(features) for model in self._models], axis=1)) * self._divisor
        spread = self._error * self._divisor / self._scale
        return (answers - self._offset) / self._scale, np.full(len(features), spread)

    def _parts(self, count: int) -> list[np.ndarray]:
        order = numpy_stream(self.seed, "folds").permutation(count)
        return [part for part in np.array_split(order, min(self.folds, count)) if 0 < len(part) < count]

    def _tune(self, features: np.ndarray, labels: np.ndarray, parts: list[np.ndarray]) -> None:
        """Search the grids by cross-validation."""
        best: dict[Family, float] = {}
        for family in self.families:
            grid = RIDGE_PENALTIES if family == "ridge" else SVR_PENALTIES
            errors = np.zeros(len(grid))
            for part in parts:
                rest = np.setdiff1d(np.arange(len(labels)), part)
                errors += [
                    mape(row, labels[part]) * len(part)
                    for row in _grid(family, features[rest], labels[rest], grid)(features[part])
                ]
            at = int(np.argmin(errors))
            best[family], self.errors[family] = grid[at], float(errors[at]) / len(labels)
        if not self.stacked:
            winner = min(best, key=lambda family: self.errors[family])
            best = {winner: best[winner]}
        self.chosen = best

    def _held_out(self, features: np.ndarray, labels: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
        """Return the chosen models' predictions of examples that they did not see, shape (N, models)."""
        found = np.zeros((len(labels), len(self.chosen)))
        for part in parts:
            rest = np.setdiff1d(np.arange(len(labels)), part)
            for column, (family, penalty) in enumerate(self.chosen.items()):
                found[part, column] = _model(family)(features[rest], labels[rest], penalty)(features[part])
        return found


def _model(family: Family) -> Callable[[np.ndarray, np.ndarray, float], Model]:
    return ridge_model if family == "ridge" else svr_model


def _grid(family: Family, features: np.ndarray, labels: np.ndarray, grid: Sequence[float]) -> Callable[..., Any]:
    """Return a function that gives one row of predictions for each setting of the grid."""
    if family == "ridge":
        return ridge_path(features, labels, grid)
    models = [svr_model(features, labels, penalty) for penalty in grid]
    return lambda rows: np.stack([model(rows) for model in models])
