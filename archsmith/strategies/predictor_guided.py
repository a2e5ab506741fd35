"""Predictor-guided search: learn from what was evaluated what to evaluate next.

Source: White, Neiswanger and Savani 2021, "BANANAS", arXiv 1910.11858 - a predictor with uncertainty on an encoding of
the cell, an acquisition function, candidates by mutation of the best - as one frame with exchangeable parts.
``bananas`` returns a search after the paper. The default differs: an exact Gaussian process in place of five networks,
and expected improvement on the logarithm of the regret; a space of up to ``whole`` architectures is scored whole, so
that no candidate is missed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from archsmith.core.errors import UserError
from archsmith.predictors import Ensemble, GaussianProcess, Mlp, Predictor
from archsmith.predictors.pool_posterior import PoolPosterior
from archsmith.space import Architecture, Objective, Result, Space, Trial
from archsmith.space.values import number_from_json, number_to_json
from archsmith.strategies.acquisition import ACQUISITIONS, SCALINGS, Acquisition, Scaling, acquire, scaled
from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy
from archsmith.strategies.candidates import CandidatePool, Features, default_features, feature_rows
from archsmith.strategies.unseen import unseen_sample

STRATEGIES = (
    {
        "name": "predictor-guided",
        "class": "PredictorGuided",
        "title": "A predictor with uncertainty picks from the whole space, or from mutations of the best",
        "paper": "arXiv 1910.11858",
        "extra": None,
    },
)


REWRITTEN = 10_000
"""Known networks, written in a new way, that a random sample may hit in a row before the search waits."""


class PredictorGuided(Strategy):
    """Evaluates what promises most according to a predictor fitted to all results so far.

    The first ``initial`` trials are random. Then the predictor is fitted to the results, scaled so that good and best
    can be told apart, and the candidate with the largest acquisition value is proposed; equal values are decided by
    chance. No network is proposed twice (``network_digest``).

    Candidates are all networks of the space that are left, if it has at most ``whole`` architectures; otherwise
    ``candidates`` of them: half mutations of the ``parents`` best (one or two decisions changed), half random samples.

    Results that failed, are infeasible or not finite count as the worst value seen: the search keeps away from them.
    Pending trials count as median results, so that a batch spreads out.

    Args:
        space: Any space.
        features: Vector of an architecture for the predictor; the space's one-hot encoding by default.
        predictor: Makes the predictor from a seed; a Gaussian process over all features by default.
        initial: Random trials at the start, from 2.
        acquisition: "ei", "pi", "ucb", "thompson" or "mean" (``archsmith.strategies.acquisition``).
        exploration: Weight of the uncertainty in "ucb" and "pi", from 0.
        scaling: "log-regret", "rank" or "none".
        refit: The predictor learns anew when the number of results has grown by this factor (at least by one), from 1.
            Between, a Gaussian process takes in every result with the hyperparameters it has; others do not.
        candidates: Candidates of a proposal where the space is larger than ``whole``, from 2.
        parents: How many of the best are mutated, from 1.
        whole: Largest size of a space that is scored whole.
        pool: Candidates listed beforehand, with their features: searches over one space may share them, and a table may
            list what it has. ``features`` is then not asked.
        objectives: One objective.
        seed: Seed of all draws.

    The state is the list of trials with their results; memory grows with it, and by ``observations x candidates``
    numbers where a Gaussian process scores a whole space.

    Raises:
        UserError: A setting out of its range.
    """

    repeats = False

    def __init__(
        self,
        space: Space,
        *,
        features: Features | None = None,
        predictor: Callable[[int], Predictor] | None = None,
        initial: int = 10,
        acquisition: Acquisition = "ei",
        exploration: float = 1.0,
        scaling: Scaling = "log-regret",
        refit: float = 1.1,
        candidates: int = 100,
        parents: int = 10,
        whole: int = 20_000,
        pool: CandidatePool | None = None,
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
    ) -> None:
        super().__init__(space, objectives=objectives, seed=seed)
        for name, number, low in (
            ("initial", initial, 2),
            ("exploration", exploration, 0),
            ("refit", refit, 1),
            ("candidates", candidates, 2),
            ("parents", parents, 1),
            ("whole", whole, 0),
        ):
            if isinstance(number, bool) or not math.isfinite(number) or number < low:
                raise UserError(name, number, allowed=f"a number from {low}")
        if acquisition not in ACQUISITIONS:
            raise UserError("acquisition", acquisition, allowed=f"one of {list(ACQUISITIONS)}")
        if scaling not in SCALINGS:
            raise UserError("scaling", scaling, allowed=f"one of {list(SCALINGS)}")
        self.initial, self.acquisition, self.exploration, self.scaling = initial, acquisition, exploration, scaling
        self.refit, self.candidates, self.parents, self.whole = refit, candidates, parents, whole
        self.features = default_features(space) if features is None else features
        self.predictor = (predictor or _gaussian_process)(seed)
        self._pool = pool
        self._asked: list[Architecture] = []
        self._digests: set[str] = set()
        self._exact: set[str] = set()
        self._rows: list[np.ndarray] = []
        self._losses: dict[int, float] = {}  # by position in _asked, in the order of tell
        self._fitted = (0, 0)  # results and trials at the last fit
        self._posterior: PoolPosterior | None = None
        self._prediction: tuple[np.ndarray, np.ndarray] | None = None
        self._exhausted = False

    @property
    def done(self) -> bool:
        """Whether every network of the space has been asked for, as far as that is known."""
        return self._exhausted or (self._pool is not None and len(self._asked) >= len(self._pool))

    # ------------------------------------------------------------------------------------------------- proposing

    def _propose(self) -> Proposal | None:
        self._list_pool()
        if self.done:
            return None
        if len(self._asked) < self.initial or len(self._losses) < 2:
            chosen = self._random()
        else:
            self._learn_model()
            chosen = self._best_of_pool() if self._pool is not None else self._best_of_drawn()
        if chosen is None:
            return None
        self._remember(chosen)
        return Proposal(chosen)

    def _list_pool(self) -> None:
        if self._pool is None and self.space.size <= self.whole:
            self._pool = CandidatePool(self.space.enumerate(), self.features)

    def _remember(self, architecture: Architecture) -> None:
        place = None if self._pool is None else self._pool.place(architecture)
        self._asked.append(architecture)
        self._digests.add(architecture.network_digest)
        self._exact.add(architecture.digest)
        if place is None or self._pool is None:
            self._rows.append(feature_rows(self.features, [architecture])[0])
        else:
            self._rows.append(self._pool.features_MD[place])

    def _random(self) -> Architecture | None:
        if self._pool is None:
            for _ in range(REWRITTEN):
                found = unseen_sample(self.space, self.rng, self._exact)
                if found is None or found.network_digest not in self._digests:
                    self._exhausted = found is None
                    return found
                self._exact.add(found.digest)  # the same network written otherwise
            return None
        left = np.flatnonzero(self._open())
        return self._pool.architectures[int(left[int(self.rng.integers(len(left)))])]

    def _open(self) -> np.ndarray:
        """Return which candidates of the pool are not asked yet."""
        assert self._pool is not None
        mask = np.ones(len(self._pool), dtype=bool)
        mask[[place for each in self._asked if (place := self._pool.place(each)) is not None]] = False
        return mask

    def _best_of_pool(self) -> Architecture:
        assert self._pool is not None
        targets = self._targets()
        mean, std = self._scores_of_pool(targets)
        return self._pool.architectures[self._pick(mean, std, targets, self._open())]

    def _scores_of_pool(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert self._pool is not None
        if (targets == targets[0]).all():
            return np.full(len(self._pool), targets[0]), np.zeros(len(self._pool))
        if self._posterior is None:
            if self._prediction is None:
                found = self.predictor.predict(self._pool.features_MD)
                self._prediction = found.mean, found.std
            return self._prediction
        for architecture in self._asked[len(self._posterior.observed) :]:
            place = self._pool.place(architecture)
            assert place is not None
            self._posterior.observe(place)
        return self._posterior.predict(targets)

    def _best_of_drawn(self) -> Architecture | None:
        drawn = self._drawn()
        if not drawn:
            return self._random()
        targets = self._targets()
        if isinstance(self.predictor, GaussianProcess) and self.predictor.ready:
            self.predictor.condition(np.stack(self._rows), targets)
        found = self.predictor.predict(feature_rows(self.features, drawn))
        return drawn[self._pick(found.mean, found.std, targets, np.ones(len(drawn), dtype=bool))]

    def _drawn(self) -> list[Architecture]:
        """Return new networks: mutations of the best, then random samples."""
        drawn: dict[str, Architecture] = {}

        def add(architecture: Architecture) -> None:
            if architecture.network_digest not in self._digests:
                drawn.setdefault(architecture.network_digest, architecture)

        best = sorted(self._losses, key=lambda at: (not math.isfinite(self._losses[at]), self._losses[at]))
        for number in range(self.candidates // 2):
            with suppress(UserError):  # an architecture without any valid neighbour
                child = self.space.mutate(self._asked[best[number % min(self.parents, len(best))]], self.rng)
                if self.rng.random() < 0.5:
                    child = self.space.mutate(child, self.rng)
                add(child)
        for _ in range(self.candidates - self.candidates // 2):
            add(self.space.sample(self.rng))
        return list(drawn.values())

    def _pick(self, mean: np.ndarray, std: np.ndarray, targets: np.ndarray, allowed: np.ndarray) -> int:
        """Return the allowed candidate with the largest acquisition value; chance decides between equal ones."""
        value = acquire(self.acquisition, mean, std, float(targets.max()), self.rng, self.exploration)
        value = np.where(allowed, value, -np.inf)
        equal = np.flatnonzero(value == value.max())
        return int(equal[int(self.rng.integers(len(equal)))]) if len(equal) > 1 else int(equal[0])

    # -------------------------------------------------------------------------------------------------- learning

    def _learn(self, trial: Trial, result: Result) -> None:
        self._losses[trial.id - 1] = self._loss(result)

    def _learn_model(self) -> None:
        """Fit the predictor when there is enough news, and take in what was asked since."""
        results, _ = self._fitted
        if results == 0 or len(self._losses) >= max(results + 1, math.floor(results * self.refit)):
            self._fit(len(self._losses), len(self._asked))

    def _fit(self, results: int, trials: int) -> None:
        """Fit to the first results, in the order of tell; a posterior over the pool starts with the first trials."""
        self._fitted = (results, trials)
        told = list(self._losses.items())[:results]
        rows = np.stack([self._rows[at] for at, _ in told])
        self.predictor.fit(rows, scaled(self.scaling, _utilities([loss for _, loss in told])))
        self._posterior = self._prediction = None
        if self._pool is not None and isinstance(self.predictor, GaussianProcess) and self.predictor.ready:
            places = [self._pool.place(each) for each in self._asked[:trials]]
            known = [place for place in places if place is not None]
            assert len(known) == trials
            self._posterior = PoolPosterior(self.predictor, self._pool.features_MD, known)

    def _targets(self) -> np.ndarray:
        """Return a target for every trial asked so far, in that order; pending ones are taken for median results."""
        told = scaled(self.scaling, _utilities(list(self._losses.values())))
        targets = np.full(len(self._asked), float(np.median(told)))
        targets[list(self._losses)] = told
        return targets

    # ----------------------------------------------------------------------------------------------------- state

    def _state(self) -> dict[str, Any]:
        return {
            "asked": [architecture.to_json() for architecture in self._asked],
            "losses": [[at, number_to_json(loss)] for at, loss in self._losses.items()],
            "fitted": list(self._fitted),
            "exact": sorted(self._exact),
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        if state["asked"]:
            self._list_pool()
        self._asked, self._digests, self._rows = [], set(), []
        for data in state["asked"]:
            self._remember(self._architecture(data))
        self._exact = set(state["exact"])
        self._losses = {int(at): number_from_json(loss, "state.loss") for at, loss in state["losses"]}
        self._fitted = (0, 0)
        self._posterior = self._prediction = None
        results, trials = (int(number) for number in state["fitted"])
        if results:
            self._fit(results, trials)


def bananas(space: Space, **settings: Any) -> PredictorGuided:
    """Return a search after the paper: five networks, independent Thompson sampling, mutations of the best.

    Args:
        space: Any space; give ``features=path_encoding`` (``archsmith.families.cell_features``) on NAS-Bench-201.
        settings: Others of ``PredictorGuided``, or these anew.

    As in the paper: ten random trials, networks of ten layers of 20 units, accuracies as they are. Different: the
    networks minimise the squared error (the paper's a percentage error), learn anew after every tenth of growth instead
    of every ten trials, and half of the candidates are random.
    """
    own: dict[str, Any] = {"predictor": _deep_ensemble, "acquisition": "thompson", "scaling": "none", "whole": 0}
    return PredictorGuided(space, **(own | settings))


def _gaussian_process(seed: int) -> GaussianProcess:
    return GaussianProcess(seed=seed)


def _deep_ensemble(seed: int) -> Ensemble:
    return Ensemble(lambda each: Mlp(hidden=(20,) * 10, folds=0, seed=each), members=5, seed=seed)


def _utilities(losses: Sequence[float]) -> np.ndarray:
    """Return negated losses; what is not finite counts as the worst that is."""
    values = -np.array(losses, dtype=np.float64)
    finite = np.isfinite(values)
    values[~finite] = values[finite].min() if finite.any() else 0.0
    return values
