"""Surrogate-based search: ridge regression on n-grams of the network's module names.

Source: Negrinho and Gordon 2017, "DeepArchitect", arXiv 1704.08792 (SMBO).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Objective, Result, Space, Trial
from archsmith.strategies.base import DEFAULT_OBJECTIVE, Proposal, Strategy

STRATEGIES = (
    {
        "name": "surrogate",
        "class": "SurrogateSearch",
        "title": "Ridge regression on n-grams of module names ranks random samples (SMBO)",
        "paper": "arXiv 1704.08792",
        "extra": None,
    },
)

Tokens = Callable[[Architecture], Sequence[str]]

# N networks, D features


class NgramFeatures:
    """Feature 0 is the number of modules; then how often each known n-gram of module names occurs.

    Args:
        longest: N-grams have 1 to ``longest`` names.
        threshold: An n-gram is known when it occurs at least this often in all fitted networks together.
        complete: Also count the n-grams that end with the last name. The paper's reference stops its windows one short
            and never does; that is the default here, for comparable figures.

    "Empty" counts as a module in feature 0 and is left out of the n-grams.
    """

    def __init__(self, *, longest: int = 4, threshold: int = 3, complete: bool = False) -> None:
        self.longest, self.threshold, self.complete = longest, threshold, complete
        self.known: dict[tuple[str, ...], int] = {}

    def fit(self, networks: Sequence[Sequence[str]]) -> None:
        """Learn which n-grams are known, in the order of their first appearance; what was known before is forgotten."""
        counts: Counter[tuple[str, ...]] = Counter()
        for names in networks:
            counts.update(self._ngrams(names))
        known = [ngram for ngram, count in counts.items() if count >= self.threshold]
        self.known = {ngram: column for column, ngram in enumerate(known, start=1)}

    def transform(self, networks: Sequence[Sequence[str]]) -> np.ndarray:
        """Return float64 features of shape (N, D), D = 1 + number of known n-grams."""
        features_ND = np.zeros((len(networks), 1 + len(self.known)))
        for row, names in enumerate(networks):
            features_ND[row, 0] = len(names)
            for ngram in self._ngrams(names):
                if (column := self.known.get(ngram)) is not None:
                    features_ND[row, column] += 1
        return features_ND

    def _ngrams(self, names: Sequence[str]) -> list[tuple[str, ...]]:
        words = [name for name in names if name != "Empty"]
        last = 1 if self.complete else 0
        return [
            tuple(words[start : start + length])
            for length in range(1, self.longest + 1)
            for start in range(len(words) - length + last)
        ]


def ridge_predictions(
    features_ND: np.ndarray, targets_N: np.ndarray, queries_ND: np.ndarray, penalty: float
) -> np.ndarray:
    """Return the predictions of a ridge regression with an intercept that is not penalised.

    Args:
        features_ND: Features of the N examples.
        targets_N: Their targets.
        queries_ND: Features of what is predicted.
        penalty: Weight of the squared norm of the coefficients.
    """
    from scipy.linalg import solve

    centre_D, mean = features_ND.mean(axis=0), targets_N.mean()
    centred_ND = features_ND - centre_D
    gram_DD = centred_ND.T @ centred_ND + penalty * np.eye(features_ND.shape[1])
    weights_D = solve(gram_DD, centred_ND.T @ (targets_N - mean), assume_a="pos")
    return np.asarray((queries_ND - centre_D) @ weights_D + mean)


class SurrogateSearch(Strategy):
    """Draws random architectures and proposes the one that a surrogate ranks first.

    Each proposal: draw ``candidates`` samples; with probability ``explore`` take a random one of them, else the one
    with the best prediction. The surrogate is fitted anew to everything told so far; without data all predictions are
    0.

    Args:
        space: Any space.
        candidates: Samples of each proposal.
        explore: Probability of ignoring the surrogate.
        penalty: Of the ridge regression.
        longest: Longest n-gram; the paper's ``ngram_maxlen`` 5 excludes 5.
        threshold: Occurrences that make an n-gram known.
        complete: See ``NgramFeatures``.
        tokens: Returns the module names of an architecture; by default ``space.tokens`` where there is one, else
            "group=value" for each decision of the walk.
        objectives: One objective.
        seed: Seed of samples and exploration.

    Results that are failed, infeasible or NaN are not learned from. The state holds every observation.

    Raises:
        UserError: A setting out of its range.
    """

    def __init__(
        self,
        space: Space,
        *,
        candidates: int = 50,
        explore: float = 0.25,
        penalty: float = 1000.0,
        longest: int = 4,
        threshold: int = 3,
        complete: bool = False,
        tokens: Tokens | None = None,
        objectives: Sequence[Objective] = (DEFAULT_OBJECTIVE,),
        seed: int = 0,
    ) -> None:
        super().__init__(space, objectives=objectives, seed=seed)
        for name, given, good in (
            ("candidates", candidates, candidates >= 1),
            ("longest", longest, longest >= 1),
            ("threshold", threshold, threshold >= 1),
            ("explore", explore, 0 <= explore <= 1),
            ("penalty", penalty, penalty > 0),
        ):
            if not good:
                raise UserError(name, given, allowed="a probability" if name == "explore" else "a positive number")
        self.candidates, self.explore, self.penalty = candidates, explore, penalty
        self.features = NgramFeatures(longest=longest, threshold=threshold, complete=complete)
        self._tokens = tokens or getattr(space, "tokens", None) or self._decisions_as_tokens
        self._seen: list[tuple[list[str], float]] = []

    def predict(self, architectures: Sequence[Architecture]) -> np.ndarray:
        """Return predictions of the objective, shape (N,); zeros without data."""
        if not self._seen:
            return np.zeros(len(architectures))
        networks = [names for names, _ in self._seen]
        self.features.fit(networks)
        queries_ND = self.features.transform([self._tokens(each) for each in architectures])
        targets_N = np.array([value for _, value in self._seen])
        return ridge_predictions(self.features.transform(networks), targets_N, queries_ND, self.penalty)

    def _propose(self) -> Proposal:
        drawn = [self.space.sample(self.rng) for _ in range(self.candidates)]
        if self.rng.random() < self.explore:
            return Proposal(drawn[int(self.rng.integers(len(drawn)))])
        scores = self.predict(drawn)
        best = np.argmax(scores) if self.objective.direction == "maximize" else np.argmin(scores)
        return Proposal(drawn[int(best)])

    def _learn(self, trial: Trial, result: Result) -> None:
        value = self.objective.value(result)
        if math.isfinite(value):
            self._seen.append((list(self._tokens(trial.architecture)), value))

    def _state(self) -> dict[str, Any]:
        return {"seen": [[names, value] for names, value in self._seen]}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._seen = [(list(names), float(value)) for names, value in state["seen"]]

    def _decisions_as_tokens(self, architecture: Architecture) -> list[str]:
        return [f"{each.group}={each.choice!r}" for each in self.space.trace(architecture)]
