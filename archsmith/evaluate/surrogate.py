"""A surrogate benchmark: a black box fitted once to real measurements, cheap to ask anywhere in the space.

Kernel ridge regression on the masked one-hot encoding: ``y(x) = m + k(x, Z) (K + r I)^-1 (Y - m)`` with
``k(a, b) = exp(-g |a - b|^2)`` and m the mean of the measurements. It is smooth, has no noise and is not additive, so
that searches on it can be compared by the hundred, while the truth behind it is that of real networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from archsmith.core.errors import Shown, UserError
from archsmith.evaluate.base import WeightStore
from archsmith.space import COSTS, Architecture, ProductSpace, Result, Trial

# N rows, D columns of the encoding, M columns of measurements


class KernelSurrogate:
    """Kernel ridge regression through measured architectures.

    Args:
        space: Space of the architectures.
        architectures: Those that were measured.
        columns: Per name one number for each of them; all are learned together.
        width: g of the kernel.
        ridge: r, added to the diagonal of the kernel matrix.

    Raises:
        UserError: Columns of another length than the architectures, or numbers that are not finite.
    """

    def __init__(
        self,
        space: ProductSpace,
        architectures: Sequence[Architecture],
        columns: Mapping[str, Sequence[float] | np.ndarray],
        *,
        width: float = 0.03,
        ridge: float = 0.05,
    ) -> None:
        self.space, self.names, self.width = space, tuple(columns), width
        targets_NM = np.stack([np.asarray(columns[name], dtype=np.float64) for name in self.names], axis=1)
        if len(targets_NM) != len(architectures) or not np.isfinite(targets_NM).all() or not len(targets_NM):
            raise UserError(
                "columns",
                Shown(f"{len(targets_NM)} numbers each"),
                allowed=f"as many finite numbers as architectures, {len(architectures)}",
            )
        self._rows_ND = space.encode_many(architectures, "one-hot")
        self._mean_M = targets_NM.mean(axis=0)
        kernel_NN = self._kernel(self._rows_ND)
        kernel_NN[np.diag_indices_from(kernel_NN)] += ridge
        self._weights_NM = np.linalg.solve(kernel_NN, targets_NM - self._mean_M)

    def _kernel(self, rows: np.ndarray) -> np.ndarray:
        squares = (rows**2).sum(axis=1)[:, None] + (self._rows_ND**2).sum(axis=1)[None] - 2 * rows @ self._rows_ND.T
        return np.asarray(np.exp(-self.width * np.maximum(squares, 0.0)))

    def values(self, architectures: Sequence[Architecture]) -> np.ndarray:
        """Return what the black box says, float64 of shape (N, M), columns in the order of ``names``."""
        return self._mean_M + self._kernel(self.space.encode_many(architectures, "one-hot")) @ self._weights_NM


class SurrogateEvaluator:
    """Answers trials by a surrogate; nothing is trained, and an evaluation takes no simulated time.

    Args:
        surrogate: The black box.

    Columns named like costs ("macs", "latency") become ``Result.costs``, the others ``Result.metrics``.
    """

    def __init__(self, surrogate: KernelSurrogate) -> None:
        self.surrogate = surrogate

    def evaluate(self, trial: Trial, *, weights: WeightStore | None = None) -> Result:
        """Evaluate one trial.

        Raises:
            UserError: The architecture is not of the surrogate's space, or a fidelity is asked for; there is only one.
        """
        if trial.fidelity is not None:
            raise UserError("trial.fidelity", trial.fidelity, allowed="None: a surrogate has no fidelity")
        architecture = self.surrogate.space.validate(trial.architecture)
        numbers = dict(zip(self.surrogate.names, map(float, self.surrogate.values([architecture])[0]), strict=True))
        costs = {name: value for name, value in numbers.items() if name in COSTS}
        return Result(metrics={name: numbers[name] for name in numbers if name not in costs}, costs=costs)
