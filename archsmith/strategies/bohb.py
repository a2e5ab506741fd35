"""BOHB: Hyperband whose brackets start from a model of what was good.

Falkner, Klein and Hutter 2018 (arXiv 1807.01774). At the highest fidelity with enough results, one kernel density is
laid over the good ones and one over the rest; of some samples of the first (with wider bandwidths), the one with the
largest ratio good : rest is asked next. A share of all starts stays random.

What differs: densities are over decisions instead of vectors (``archsmith.strategies.density``), so that conditional
and repeated decisions need no imputation; failures count as the worst. NAS-Bench-201 uses eta 3, 4 samples, random
fraction 0 and bandwidth factor 3. On its table the smallest bandwidth of unordered decisions matters most: without one
the good architectures soon agree, and the model asks for them again and again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space import Architecture, DeadEnd, Objective, Result, Space, Trial
from archsmith.space.values import number_from_json, number_to_json
from archsmith.strategies.base import DEFAULT_OBJECTIVE
from archsmith.strategies.density import Coordinate, DecisionDensity, coordinates
from archsmith.strategies.halving import Halving, checked_rounds, hyperband_plan

STRATEGIES = (
    {
        "name": "bohb",
        "class": "Bohb",
        "title": "Hyperband that starts from a density of what was good",
        "paper": "arXiv 1807.01774",
        "extra": None,
    },
)


class Bohb(Halving):
    """Hyperband with starts drawn from a kernel density of good architectures.

    Args:
        space: Where to search.
        fidelities: Of the rungs, rising; the last may be None for a full evaluation.
        objectives: One.
        seed: Seed of everything drawn.
        rounds: How often all brackets are run; ``None`` for ever.
        eta: One in so many is promoted.
        open_brackets: How many brackets may be under way at once.
        samples: Of the good density, of which the best is asked. Paper: 64; NAS-Bench-201: 4.
        random_fraction: Share of starts that stay random, in [0, 1]. Paper: 1/3; NAS-Bench-201: 0.
        bandwidth_factor: By which the bandwidths of ordered and real decisions are widened for sampling.
        good_fraction: Share of the results that counts as good.
        min_bandwidth: Smallest bandwidth of ordered and real decisions, on a scale of [0, 1].
        min_redraw: Smallest bandwidth of unordered decisions: the probability that one is drawn anew, in [0, 1].

    Memory grows with the search: the model needs every result.

    Raises:
        UserError: Fidelities that do not rise, or a setting out of its range.
    """

    def __init__(
        self,
        space: Space,
        *,
        fidelities: Sequence[float | None],
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
        rounds: int | None = None,
        eta: float = 3.0,
        open_brackets: int = 1,
        samples: int = 64,
        random_fraction: float = 1 / 3,
        bandwidth_factor: float = 3.0,
        good_fraction: float = 0.15,
        min_bandwidth: float = 1e-3,
        min_redraw: float = 0.3,
    ) -> None:
        super().__init__(
            space, fidelities=fidelities, objectives=objectives, seed=seed, eta=eta, open_brackets=open_brackets
        )
        if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
            raise UserError("samples", samples, allowed="an integer from 1")
        if not 0 <= random_fraction <= 1:
            raise UserError("random_fraction", random_fraction, allowed="a number in [0, 1]")
        if not 0 <= min_redraw <= 1:
            raise UserError("min_redraw", min_redraw, allowed="a number in [0, 1]")
        if not 0 < good_fraction < 1:
            raise UserError("good_fraction", good_fraction, allowed="a number in (0, 1)")
        for name, given in (("bandwidth_factor", bandwidth_factor), ("min_bandwidth", min_bandwidth)):
            if not 0 < given < math.inf:
                raise UserError(name, given, allowed="a positive number")
        self.rounds = checked_rounds(rounds)
        self.samples, self.random_fraction = samples, random_fraction
        self.bandwidth_factor, self.min_bandwidth = bandwidth_factor, min_bandwidth
        self.good_fraction, self.min_redraw = good_fraction, min_redraw
        self.results: list[list[tuple[float, Architecture]]] = [[] for _ in self.fidelities]
        self._placed: list[list[dict[str, Coordinate]]] = [[] for _ in self.fidelities]
        self._model: tuple[DecisionDensity, DecisionDensity] | None = None  # of the results so far

    def _plan(self, number: int) -> tuple[int, int] | None:
        return hyperband_plan(number, len(self.fidelities), self.eta, self.rounds)

    def _fresh(self) -> Architecture:
        if self.rng.random() < self.random_fraction or (model := self._densities()) is None:
            return self.space.sample(self.rng)
        good, rest = model
        drawn: list[tuple[Architecture, dict[str, Coordinate]]] = []
        for _ in range(self.samples):
            with suppress(DeadEnd):
                drawn.append(good.sample(self.rng))
        if not drawn:
            return self.space.sample(self.rng)
        points = [point for _, point in drawn]
        return drawn[int(np.argmax(good.log_densities(points) - rest.log_densities(points)))][0]

    def _densities(self) -> tuple[DecisionDensity, DecisionDensity] | None:
        """Return the densities of good and other results at the highest fidelity that has enough of them."""
        if self._model is None:
            for results, placed in zip(reversed(self.results), reversed(self._placed), strict=True):
                least = 1 + max((len(point) for point in placed), default=0)
                good = max(least, int(self.good_fraction * len(results)))
                if len(results) >= least + 2:
                    order = np.argsort([loss for loss, _ in results], kind="stable").tolist()
                    # Each has at least ``least`` members; while results are few the two overlap.
                    parts = (order[:good], order[-max(least, len(results) - good) :])
                    self._model = self._density(placed, parts[0]), self._density(placed, parts[1])
                    break
        return self._model

    def _density(self, placed: Sequence[Mapping[str, Coordinate]], which: Sequence[int]) -> DecisionDensity:
        chosen = [placed[i] for i in which]
        return DecisionDensity(
            self.space,
            chosen,
            factor=self.bandwidth_factor,
            least=self.min_bandwidth,
            least_unordered=self.min_redraw,
        )

    def _learn(self, trial: Trial, result: Result) -> None:
        super()._learn(trial, result)
        loss = self._loss(result)
        self._take(int(trial.info["rung"]), math.inf if math.isnan(loss) else loss, trial.architecture)

    def _take(self, rung: int, loss: float, architecture: Architecture) -> None:
        self.results[rung].append((loss, architecture))
        self._placed[rung].append(coordinates(self.space, architecture))
        self._model = None

    def _state(self) -> dict[str, Any]:
        results = [[[number_to_json(loss), a.to_json()] for loss, a in rung] for rung in self.results]
        return {**super()._state(), "results": results}

    def _load(self, state: Mapping[str, Any]) -> None:
        super()._load(state)
        self.results = [[] for _ in self.fidelities]
        self._placed = [[] for _ in self.fidelities]
        for rung, results in enumerate(state["results"]):
            for loss, data in results:
                self._take(rung, number_from_json(loss, "state.loss"), self._architecture(data))
