"""Exact Gaussian process regression, own and in numpy.

Why not scikit-learn's: a search fits a process after every evaluation and scores a whole space with it. This one keeps
squared distances between refits of its few hyperparameters, has one length scale for each *group* of features (the
columns of one encoding, say) instead of one for all or one for each, priors on them, and needs no import of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from archsmith.core.errors import Shown, UserError
from archsmith.predictors.base import Predictor

# N examples, M others, D features, G groups

JITTER = 1e-10
"""Least noise variance, relative to the signal's: keeps the factorisation of duplicate rows possible."""


class GaussianProcess(Predictor):
    """Gaussian process with constant mean and a stationary kernel of the distance between feature vectors.

    The squared distance is ``r^2 = sum_g |x_g - z_g|^2 / l_g^2`` over the groups of columns. Signal variance, noise
    variance and the ``l_g`` maximise the marginal likelihood times log-normal priors (Rasmussen & Williams 2006,
    Sec. 5.4), by L-BFGS from a fixed start. ``std`` is of the latent function, noise not included.

    Args:
        kernel: "matern52" or "gaussian".
        groups: Number of columns of each group, in order; None for one group of all columns.
        prior_strength: Precision of the normal priors on the logarithms; they sit at length scales of the typical
            distance between examples, signal variance 1 and noise variance 0.01 (of standardised targets). From 0.
        max_iterations: Of L-BFGS; 0 keeps the priors' centres.
        seed: Not used: nothing is drawn.

    Raises:
        UserError: An unknown kernel, groups that are no positive counts, or, on ``fit``, do not add up to D.
    """

    def __init__(
        self,
        *,
        kernel: Literal["matern52", "gaussian"] = "matern52",
        groups: Sequence[int] | None = None,
        prior_strength: float = 1.0,
        max_iterations: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        if kernel not in _KERNELS:
            raise UserError("kernel", kernel, allowed=f"one of {sorted(_KERNELS)}")
        if groups is not None and (not len(groups) or min(groups) < 1):
            raise UserError("groups", list(groups), allowed="a positive number of columns for each group")
        if not prior_strength >= 0:
            raise UserError("prior_strength", prior_strength, allowed="a number from 0")
        if max_iterations < 0:
            raise UserError("max_iterations", max_iterations, allowed="an integer from 0")
        self.kernel, self.groups = kernel, None if groups is None else tuple(groups)
        self.prior_strength, self.max_iterations = float(prior_strength), int(max_iterations)
        self._logs: np.ndarray | None = None

    def _fit(self, features: np.ndarray, targets: np.ndarray) -> None:
        if self.groups is not None and sum(self.groups) != features.shape[1]:
            raise UserError(
                "groups", list(self.groups), allowed=f"numbers that add up to the {features.shape[1]} columns"
            )
        self._seen = features
        distances_GNN = self._distances(features, features)
        typical = [float(np.median(d[d > 0])) if (d > 0).any() else 1.0 for d in distances_GNN]
        # logarithms of: signal variance, noise variance, squared length scales
        self._centre = np.log(np.array([1.0, 0.01, *typical]))
        self._logs = self._maximised(distances_GNN, targets)
        self._condition(targets)

    def condition(self, features_ND: np.ndarray, targets_N: np.ndarray) -> None:
        """Take in other examples with the hyperparameters as they are: one factorisation, no search.

        Raises:
            UserError: As ``fit``; or nothing was fitted yet, or what was fitted was constant.
        """
        if not self.ready:
            raise UserError("condition", Shown("a call before fit"), allowed="after fit with targets that differ")
        features, targets = self._checked(features_ND, targets_N)
        if not self._constant:
            self._seen = features
            self._condition((targets - self._offset) / self._scale)

    @property
    def ready(self) -> bool:
        """Whether ``fit`` has found hyperparameters: it saw targets that are not all equal."""
        return self._logs is not None

    @property
    def signal(self) -> float:
        """Variance of the latent function, of standardised targets."""
        return self._parameters(self._logs)[0]

    @property
    def noise(self) -> float:
        """Variance of the noise, of standardised targets."""
        return self._parameters(self._logs)[1]

    def covariance(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return the latent covariance of every pair of rows, shape (N, M), of standardised targets."""
        signal, _, scales = self._parameters(self._logs)
        return signal * self._correlation(self._distances(left, right), scales)

    def _condition(self, targets: np.ndarray) -> None:
        gram = self.covariance(self._seen, self._seen)
        gram[np.diag_indices_from(gram)] += self.noise
        self._factor = np.linalg.cholesky(gram)
        self._weights = _solved(self._factor, targets)

    def _maximised(self, distances_GNN: np.ndarray, targets: np.ndarray) -> np.ndarray:
        from scipy.optimize import minimize

        if not self.max_iterations:
            return self._centre
        found = minimize(
            lambda logs: self.loss(logs, distances_GNN, targets),
            self._centre,
            jac=True,
            method="L-BFGS-B",
            bounds=[(c - 9.0, c + 9.0) for c in self._centre],
            options={"maxiter": self.max_iterations},
        )
        return found.x if np.isfinite(found.fun) else self._centre

    def loss(self, logs: np.ndarray, distances_GNN: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the negative log marginal likelihood plus prior, and its gradient, in the logarithms of the settings.

        Args:
            logs: Shape (2 + G,): signal variance, noise variance, squared length scales.
            distances_GNN: Squared distances within each group.
            targets: Shape (N,), standardised.
        """
        signal, noise, scales = self._parameters(logs)
        n = len(targets)
        correlation, slope = _KERNELS[self.kernel](np.tensordot(1 / scales, distances_GNN, 1))
        covariance = signal * correlation
        covariance[np.diag_indices(n)] += noise
        try:
            factor = np.linalg.cholesky(covariance)
        except np.linalg.LinAlgError:
            return float("inf"), np.zeros_like(logs)
        weights = _solved(factor, targets)
        value = 0.5 * targets @ weights + np.log(np.diag(factor)).sum() + 0.5 * n * np.log(2 * np.pi)
        # d loss / d K = (K^-1 - w w^T) / 2 (Rasmussen & Williams, Eq. 5.9)
        sensitivity = 0.5 * (_solved(factor, np.eye(n)) - np.outer(weights, weights))
        by_scales = [
            float((sensitivity * slope * d).sum() * -signal / scale)
            for d, scale in zip(distances_GNN, scales, strict=True)
        ]
        by_noise = float(np.trace(sensitivity)) * noise
        by_signal = float((sensitivity * correlation).sum()) * signal
        gradient = np.array([by_signal, by_noise - float(np.trace(sensitivity)) * JITTER, *by_scales])
        away = logs - self._centre
        return value + 0.5 * self.prior_strength * float(away @ away), gradient + self.prior_strength * away

    def _parameters(self, logs: np.ndarray | None) -> tuple[float, float, np.ndarray]:
        assert logs is not None
        return float(np.exp(logs[0])), float(np.exp(logs[1])) + JITTER, np.exp(logs[2:])

    def _distances(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Return squared distances within each group, shape (G, N, M)."""
        widths = self.groups or (left.shape[1],)
        ends = np.cumsum(widths)
        parts = [(left[:, e - w : e], right[:, e - w : e]) for w, e in zip(widths, ends, strict=True)]
        return np.stack([squared_distances(a, b) for a, b in parts])

    def _correlation(self, distances: np.ndarray, scales: np.ndarray) -> np.ndarray:
        return _KERNELS[self.kernel](np.tensordot(1 / scales, distances, 1))[0]

    def _predict(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        from scipy.linalg import solve_triangular

        cross_NM = self.covariance(self._seen, features)
        reduced = solve_triangular(self._factor, cross_NM, lower=True)
        return cross_NM.T @ self._weights, np.sqrt(np.maximum(self.signal - (reduced**2).sum(0), 0.0))


def squared_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return |x - z|^2 for every row x of ``left`` and z of ``right``, shape (N, M), never negative."""
    square = (left**2).sum(1)[:, None] + (right**2).sum(1) - 2 * left @ right.T
    return np.maximum(square, 0.0)


def _solved(factor: np.ndarray, right: np.ndarray) -> np.ndarray:
    from scipy.linalg import cho_solve

    solution: np.ndarray = cho_solve((factor, True), right)
    return solution


def matern52(squared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the Matérn 5/2 correlation of a squared distance, and its derivative by the squared distance."""
    a = np.sqrt(5 * squared)
    decay = np.exp(-a)
    return (1 + a + a**2 / 3) * decay, -5 / 6 * (1 + a) * decay


def gaussian(squared: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the Gaussian correlation of a squared distance, and its derivative by the squared distance."""
    value = np.exp(-squared / 2)
    return value, -value / 2


_KERNELS = {"matern52": matern52, "gaussian": gaussian}
