"""Every predictor obeys the contract."""

from __future__ import annotations

import numpy as np
import pytest

from archsmith.predictors import (
    Boosting,
    Ensemble,
    GaussianProcess,
    GraphNetwork,
    Mlp,
    RandomForest,
    Ridge,
    SupportVectors,
    Tuned,
    graph_features,
)
from archsmith.predictors.boshnas import BoshnasSurrogate
from archsmith.testing.predictors import PredictorContract


class TestRidge(PredictorContract):
    @pytest.fixture
    def make(self):
        return lambda seed: Ridge(seed=seed)


class TestBoshnasSurrogate(PredictorContract):
    @pytest.fixture
    def make(self):
        return lambda seed: BoshnasSurrogate(epochs=60, seed=seed)


class TestSupportVectors(PredictorContract):
    @pytest.fixture
    def make(self):
        return lambda seed: SupportVectors(seed=seed)


class TestTuned(PredictorContract):
    @pytest.fixture
    def make(self):
        return lambda seed: Tuned(seed=seed)


class TestStacked(PredictorContract):
    @pytest.fixture
    def make(self):
        return lambda seed: Tuned(stacked=True, seed=seed)


class TestMatern(PredictorContract):
    @pytest.fixture
    def make(self):
        return lambda seed: GaussianProcess(groups=(3, 5), seed=seed)


class TestGaussianKernel(PredictorContract):
    @pytest.fixture
    def make(self):
        return lambda seed: GaussianProcess(kernel="gaussian", seed=seed)


class TestForest(PredictorContract):
    @pytest.fixture
    def make(self):
        return lambda seed: RandomForest(trees=30, seed=seed)


class TestBoosting(PredictorContract):
    @pytest.fixture
    def make(self):
        return lambda seed: Boosting(rounds=30, members=2, seed=seed)


class TestLightGbm(PredictorContract):
    @pytest.fixture
    def make(self):
        pytest.importorskip("lightgbm")
        return lambda seed: Boosting(engine="lightgbm", rounds=30, members=2, seed=seed)


class TestMlp(PredictorContract):
    @pytest.fixture
    def make(self):
        return lambda seed: Mlp(hidden=(16,), epochs=40, folds=2, seed=seed)


class TestDeepEnsemble(PredictorContract):
    @pytest.fixture
    def make(self):
        return lambda seed: Ensemble(lambda s: Mlp(hidden=(16,), epochs=40, folds=0, seed=s), members=2, seed=seed)


class TestBaggedMixture(PredictorContract):
    @pytest.fixture
    def make(self):
        return lambda seed: Ensemble(lambda s: Ridge(seed=s), bagging=True, spread="mixture", members=3, seed=seed)


class TestGraphNetwork(PredictorContract):
    @pytest.fixture
    def make(self):
        return lambda seed: GraphNetwork(vertices=4, operations=3, hidden=16, layers=2, epochs=40, seed=seed)

    @pytest.fixture
    def features(self):
        rng = np.random.default_rng(0)
        chains = np.triu(rng.random((60, 4, 4)) < 0.6, 1)
        codes = rng.integers(0, 3, (60, 4))
        return np.stack([graph_features(a, c, vertices=4, operations=3) for a, c in zip(chains, codes, strict=True)])

    @pytest.fixture
    def targets(self, features):
        """Something that does not depend on the numbering of the vertices: operations and edges, counted."""
        counts = features[:, 6:].reshape(-1, 4, 3).sum(1)
        return 90 + counts @ np.array([3.0, -2.0, 0.0]) + 2 * features[:, :6].sum(1)
