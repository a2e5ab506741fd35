"""A Gaussian process over a fixed, finite set of candidates, one observation at a time.

Scoring M candidates after each of N observations from the start costs N^2 M each time. With the rows of ``L^-1 K``
kept, where K is the covariance between observations and candidates and L the Cholesky factor of that among
observations, one more observation is one more row: N M. So a search can score its whole space at every step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from archsmith.predictors.gaussian_process import GaussianProcess

# M candidates, N observed

BLOCK = 8_192
"""Candidates whose distances are computed at once: bounds the memory, and keeps it near the processor."""


class PoolPosterior:
    """Posterior over candidates given which of them were observed; targets may change at every question.

    Args:
        process: A fitted process; its hyperparameters are used, not its observations.
        features_MD: Features of the candidates.
        observed: Candidates observed so far.

    Example:
        >>> posterior = PoolPosterior(process, features, [3, 1])
        >>> posterior.observe(2)
        >>> mean, std = posterior.predict(np.array([0.2, 0.4, 0.9]))
    """

    def __init__(self, process: GaussianProcess, features_MD: np.ndarray, observed: Sequence[int]) -> None:
        from scipy.linalg import solve_triangular

        self.process, self.features = process, features_MD
        self.observed = list(observed)
        n, m = len(self.observed), len(features_MD)
        capacity = max(32, n + n // 2)
        self._factor = np.zeros((capacity, capacity))
        self._rows = np.zeros((capacity, m))
        seen = features_MD[self.observed]
        gram = process.covariance(seen, seen)
        gram[np.diag_indices(n)] += process.noise
        self._factor[:n, :n] = np.linalg.cholesky(gram)
        for start in range(0, m, BLOCK):
            part = process.covariance(seen, features_MD[start : start + BLOCK])
            self._rows[:n, start : start + BLOCK] = solve_triangular(self._factor[:n, :n], part, lower=True)
        self._explained = (self._rows[:n] ** 2).sum(0)

    def observe(self, candidate: int) -> None:
        """Add one observation: a candidate, which may have been observed before."""
        n = len(self.observed)
        if n == len(self._factor):
            self._grow()
        row = np.empty(self._rows.shape[1])
        for start in range(0, len(row), BLOCK):
            block = self.features[start : start + BLOCK]
            row[start : start + BLOCK] = self.process.covariance(self.features[[candidate]], block)[0]
        known = self._rows[:n, candidate].copy()
        left = self.process.signal + self.process.noise - float(known @ known)
        pivot = float(np.sqrt(max(left, self.process.noise)))
        row -= known @ self._rows[:n]
        row /= pivot
        self._factor[n, :n], self._factor[n, n] = known, pivot
        self._rows[n] = row
        self._explained += row**2
        self.observed.append(candidate)

    def predict(self, targets_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean and standard deviation of every candidate, shape (M,), in the units of the targets.

        Args:
            targets_N: One target for each observation, in the order they were observed; not all equal.
        """
        from scipy.linalg import solve_triangular

        n = len(self.observed)
        offset, scale = float(targets_N.mean()), float(targets_N.std())
        weights = solve_triangular(self._factor[:n, :n], (targets_N - offset) / scale, lower=True)
        mean = weights @ self._rows[:n]
        std = np.sqrt(np.maximum(self.process.signal - self._explained, 0.0))
        return offset + scale * mean, scale * std

    def _grow(self) -> None:
        old = len(self._factor)
        more = old // 2
        self._factor = np.pad(self._factor, ((0, more), (0, more)))
        self._rows = np.concatenate([self._rows, np.zeros((more, self._rows.shape[1]))])
