"""BOSHNAS: Bayesian optimisation that descends, with second-order steps, on the input of its own surrogate.

An exploiting round starts at random members of a library, follows ``mean - 0.5 uncertainty`` downhill through the
embedding (``archsmith.train.gobi``), and takes the nearest members that are new. Of these, all are proposed that can
take over most weights of a network that was trained before; if none can, the most promising one. Now and then the
member of highest uncertainty, or a random one, is proposed instead.

Source: Tuli et al. 2022, "FlexiBERT", arXiv 2205.11656.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from archsmith.core.errors import UserError
from archsmith.core.rng import numpy_stream, seed_of
from archsmith.predictors.boshnas import BoshnasSurrogate
from archsmith.space import Architecture, Objective, Result, Space, Trial
from archsmith.space.values import number_from_json, number_to_json
from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy
from archsmith.strategies.candidates import CandidatePool, Features, default_features
from archsmith.strategies.unseen import unseen_sample

STRATEGIES = (
    {
        "name": "boshnas",
        "class": "Boshnas",
        "title": "Second-order descent on the input of a surrogate with noise and uncertainty, over a library",
        "paper": "arXiv 2205.11656",
        "extra": None,
    },
)

Overlap = Callable[[Architecture, Architecture], float]
"""Returns which share of the first network's weights the second, trained one can give it, 0 to 1."""

SAME = 1e-12


class Boshnas(Strategy):
    """Second-order search on inputs, with a heteroscedastic surrogate; needs torch.

    Args:
        space: Any space.
        features: The embedding: a vector for an architecture; the space's one-hot encoding by default.
        pool: The library with its embedding; ``features`` is then not asked. By default the whole space if it has at
            most ``library`` architectures, else so many random ones.
        library: Size of the default library, from 2.
        initial: Random trials at the start, from 2.
        exploit: Probability of an exploiting round.
        uncertain: Probability of the most uncertain member; what is left over is the probability of a random one.
        weight: Of the uncertainty in the acquisition, from 0.
        starts: Descents of a round, from 1.
        steps: Steps of a descent, at most.
        trust: Share of the embedding's range that a descent may leave its start by, None for all; 0.25 is published.
        patience: Exploiting results without a new best until the noise of the data is added to the uncertainty; after
            as many more without one, the search has converged.
        stops: Whether a search that has converged is done, as published; if not, it begins again without the noise.
        overlap: How much of its weights a network can take over from another; nothing is taken over if None.
        threshold: Overlap from which a network is trained on from its neighbour (``Trial.parent``).
        surrogate: Makes the surrogate from a seed.
        refit: The surrogate learns anew when the number of results has grown by this factor, at least by one; from 1.
        objectives: One objective.
        seed: Seed of all draws.

    Failed results and such without a finite number count as the worst. No network is proposed twice.

    Raises:
        UserError: A setting out of range.
    """

    repeats = False

    def __init__(
        self,
        space: Space,
        *,
        features: Features | None = None,
        pool: CandidatePool | None = None,
        library: int = 5_000,
        initial: int = 10,
        exploit: float = 0.8,
        uncertain: float = 0.1,
        weight: float = 0.5,
        starts: int = 10,
        steps: int = 200,
        trust: float | None = None,
        patience: int = 5,
        stops: bool = False,
        overlap: Overlap | None = None,
        threshold: float = 0.8,
        surrogate: Callable[[int], BoshnasSurrogate] | None = None,
        refit: float = 1.1,
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
    ) -> None:
        super().__init__(space, objectives=objectives, seed=seed)
        limits: tuple[tuple[str, float, float, float], ...] = (
            ("library", library, 2, math.inf),
            ("initial", initial, 2, math.inf),
            ("exploit", exploit, 0, 1),
            ("uncertain", uncertain, 0, 1 - exploit),
            ("weight", weight, 0, math.inf),
            ("starts", starts, 1, math.inf),
            ("steps", steps, 1, math.inf),
            ("patience", patience, 1, math.inf),
            ("threshold", threshold, 0, 1),
            ("refit", refit, 1, math.inf),
        )
        for name, number, low, high in limits:
            if isinstance(number, bool) or not low <= number <= high + SAME:
                raise UserError(
                    name, number, allowed=f"a number from {low:g}" + ("" if math.isinf(high) else f" to {high:g}")
                )
        if trust is not None and not 0 < trust <= 1:
            raise UserError("trust", trust, allowed="above 0 to 1, or None")
        self.features = default_features(space) if features is None else features
        self.library, self.initial, self.exploit, self.uncertain = library, initial, exploit, uncertain
        self.weight, self.starts, self.steps, self.trust = weight, starts, steps, trust
        self.patience, self.stops, self.overlap, self.threshold = patience, stops, overlap, threshold
        self.refit = refit
        self._make = surrogate or (lambda own: BoshnasSurrogate(seed=own))
        self._pool = pool
        self._asked: list[int] = []  # places in the library, in the order of trials
        self._losses: dict[int, float] = {}  # by trial number, in the order of tell
        self._weights: dict[int, str] = {}  # keys of kept weights, by trial number
        self._queue: list[tuple[int, int | None]] = []  # places still to be proposed in this round, with a parent
        self._calm = 0  # exploiting results in a row without a new best
        self._fitted = 0  # results behind the surrogate
        self._surrogate: BoshnasSurrogate | None = None

    @property
    def aleatoric(self) -> bool:
        """Whether the noise of the data counts as uncertainty now."""
        phase = self._calm // self.patience
        return phase >= 1 if self.stops else phase % 2 == 1

    @property
    def done(self) -> bool:
        """Whether the library is through, or the search has converged and stops then."""
        through = self._pool is not None and len(self._asked) >= len(self._pool)
        return through or (self.stops and self._calm >= 2 * self.patience)

    # ------------------------------------------------------------------------------------------------- proposing

    def _propose(self) -> Proposal | None:
        pool = self._listed()
        if self.done:
            return None
        kind, parent = "random", None
        if len(self._asked) < self.initial or not self._learn_model():
            place = self._random(pool)
        elif self._queue:
            kind, (place, parent) = "exploit", self._queue.pop(0)
        elif (drawn := self.rng.random()) < self.exploit:
            kind, (place, parent) = "exploit", self._exploited(pool)
        elif drawn < self.exploit + self.uncertain:
            kind, place = "uncertain", self._most_uncertain(pool)
        else:
            place = self._random(pool)
        self._asked.append(place)
        info: dict[str, Any] = {"kind": kind}
        if parent is not None:
            info["parent_architecture"] = pool.architectures[self._asked[parent - 1]].to_json()
            info["weights"] = self._weights.get(parent)
        return Proposal(pool.architectures[place], parent=parent, info=info)

    def _listed(self) -> CandidatePool:
        if self._pool is None:
            if self.space.size <= self.library:
                self._pool = CandidatePool(self.space.enumerate(), self.features)
            else:
                rng, seen, members = numpy_stream(self.seed, "library"), set[str](), list[Architecture]()
                while len(members) < self.library and (new := unseen_sample(self.space, rng, seen)) is not None:
                    seen.add(new.digest)
                    members.append(new)
                self._pool = CandidatePool(members, self.features)
        return self._pool

    def _open(self, pool: CandidatePool) -> np.ndarray:
        """Return the places that nothing was asked of yet, and that wait in no round."""
        mask = np.ones(len(pool), dtype=bool)
        mask[self._asked] = False
        if (left := mask.copy()) is not None and self._queue:
            left[[place for place, _ in self._queue]] = False
            mask = left if left.any() else mask
        return np.flatnonzero(mask)

    def _random(self, pool: CandidatePool) -> int:
        left = self._open(pool)
        return int(left[int(self.rng.integers(len(left)))])

    def _most_uncertain(self, pool: CandidatePool) -> int:
        assert self._surrogate is not None
        left = self._open(pool)
        return int(left[int(self._surrogate.predict(pool.features_MD[left]).std.argmax())])

    def _exploited(self, pool: CandidatePool) -> tuple[int, int | None]:
        """Descend from random members, queue the new members nearest to where that ends, and return the first."""
        import torch

        from archsmith.train.gobi import optimise_inputs

        surrogate, left = self._surrogate, self._open(pool)
        assert surrogate is not None
        rows = pool.features_MD
        centre, spread = rows.mean(axis=0), rows.std(axis=0)
        spread = np.where(spread > SAME, spread, 1.0)
        scaled = (rows - centre) / spread
        shift, scale = torch.from_numpy(centre), torch.from_numpy(spread)

        def objective(x: torch.Tensor) -> torch.Tensor:
            return surrogate.acquisition(shift + scale * x, weight=self.weight, aleatoric=self.aleatoric)

        starts = torch.from_numpy(scaled[self.rng.integers(len(rows), size=self.starts)])
        found = optimise_inputs(
            objective,
            starts,
            low=torch.from_numpy(scaled.min(axis=0)),
            high=torch.from_numpy(scaled.max(axis=0)),
            steps=self.steps,
            trust=self.trust,
            generator=torch.Generator().manual_seed(int(self.rng.integers(1 << 31))),
        )
        gaps = np.abs(found.points.numpy()[:, None] - scaled[left]).mean(axis=-1)
        near = list(dict.fromkeys(int(left[at]) for at in gaps.argmin(axis=1)))
        with torch.no_grad():
            values = objective(torch.from_numpy(scaled[near])).numpy()
        near = [near[at] for at in np.argsort(values, kind="stable")]
        heirs: list[tuple[int, int | None]] = [
            (place, parent) for place in near if (parent := self._parent(pool, place)) is not None
        ]
        self._queue = heirs[1:]
        return heirs[0] if heirs else (near[0], None)

    def _parent(self, pool: CandidatePool, place: int) -> int | None:
        """Return the trial that can give most weights, if that is enough; the later one of equal trials."""
        if self.overlap is None:
            return None
        shares = {
            trial: self.overlap(pool.architectures[place], pool.architectures[self._asked[trial - 1]])
            for trial, loss in self._losses.items()
            if math.isfinite(loss)
        }
        best = max(shares, key=lambda trial: (shares[trial], trial), default=None)
        return best if best is not None and shares[best] >= self.threshold else None

    # -------------------------------------------------------------------------------------------------- learning

    def _learn(self, trial: Trial, result: Result) -> None:
        loss = self._loss(result)
        finite = [each for each in self._losses.values() if math.isfinite(each)]
        self._losses[trial.id] = loss
        if result.weights is not None:
            self._weights[trial.id] = result.weights
        if math.isfinite(loss) and loss < min(finite, default=math.inf):
            self._calm = 0
        elif trial.info.get("kind") == "exploit":
            self._calm += 1

    def _learn_model(self) -> bool:
        """Fit the surrogate where there is enough news; return whether there is one."""
        known = len(self._losses)
        if known >= 2 and known >= max(self._fitted + 1, math.floor(self._fitted * self.refit)):
            self._fit(known)
        elif self._fitted and self._surrogate is None:
            self._fit(self._fitted)
        return self._surrogate is not None

    def _fit(self, results: int) -> None:
        pool = self._listed()
        told = list(self._losses.items())[:results]
        losses = np.array([loss for _, loss in told])
        finite = np.isfinite(losses)
        losses[~finite] = losses[finite].max() if finite.any() else 0.0
        self._fitted, self._surrogate = results, None
        if np.ptp(losses) > 0:
            surrogate = self._make(seed_of(self.seed, "surrogate", results) >> 1)
            surrogate.unlabelled = pool.features_MD if surrogate.unlabelled is None else surrogate.unlabelled
            surrogate.fit(pool.features_MD[[self._asked[trial - 1] for trial, _ in told]], losses)
            self._surrogate = surrogate

    # ----------------------------------------------------------------------------------------------------- state

    def _state(self) -> dict[str, Any]:
        return {
            "asked": list(self._asked),
            "losses": [[trial, number_to_json(loss)] for trial, loss in self._losses.items()],
            "weights": [[trial, key] for trial, key in self._weights.items()],
            "queue": [list(each) for each in self._queue],
            "calm": self._calm,
            "fitted": self._fitted,
        }

    def _load(self, state: Mapping[str, Any]) -> None:
        self._asked = [int(place) for place in state["asked"]]
        self._losses = {int(trial): number_from_json(loss, "state.loss") for trial, loss in state["losses"]}
        self._weights = {int(trial): str(key) for trial, key in state["weights"]}
        self._queue = [(int(place), None if parent is None else int(parent)) for place, parent in state["queue"]]
        self._calm, self._fitted = int(state["calm"]), int(state["fitted"])
        self._surrogate = None
        if self._fitted:
            self._fit(self._fitted)
