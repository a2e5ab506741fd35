"""Latency before it is measured: what a search can leave out because it will not fit.

Measuring takes a second, a selection looks at thousands. So the first networks are all measured, and from ten on a
linear model of them foretells the others: a network is left out when even its latency less the model's own error breaks
the limit. What is kept or delivered was always measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from archsmith.predictors.latency import LatencyPredictor
from archsmith.space import Architecture, Space

FEWEST = 10
"""Measurements before anything is foretold, and between two fits."""

Known = Sequence[tuple[Architecture, float]]
"""Measured networks with their latency in ms, in the order of the search."""


class Foretold:
    """A latency predictor that is fitted anew after every ten measurements.

    What it foretells depends on the measurements alone, so that a search that goes on foretells the same.

    Args:
        space: Space of the networks.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self._fitted = 0
        self._predictor: LatencyPredictor | None = None

    def ms(self, architecture: Architecture, known: Known) -> float | None:
        """Return the expected latency in ms; None while too little was measured."""
        predictor = self._of(known)
        return None if predictor is None else float(predictor.predict([architecture]).mean[0])

    def least_ms(self, architecture: Architecture, known: Known) -> float:
        """Return the expected latency less the median error of the predictor; 0 while too little was measured."""
        predictor = self._of(known)
        if predictor is None:
            return 0.0
        error = min(1.0, min(predictor.errors.values()))
        return float(predictor.predict([architecture]).mean[0]) * (1 - error)

    def _of(self, known: Known) -> LatencyPredictor | None:
        count = len(known) // FEWEST * FEWEST
        if count and count != self._fitted:
            self._predictor = LatencyPredictor(self.space, model="ridge")
            examples = known[:count]
            self._predictor.fit([architecture for architecture, _ in examples], [ms for _, ms in examples])
            self._fitted = count
        return self._predictor if count else None
