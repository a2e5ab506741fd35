"""Ensembles: what mean and spread are taken over."""

from __future__ import annotations

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.predictors import Ensemble, Mlp, Predictor, Ridge


class Fixed(Predictor):
    """Answers a constant that depends on its seed alone."""

    def _fit(self, features, targets):
        pass

    def _predict(self, features):
        return np.full(len(features), float(self.seed % 7)), np.full(len(features), 2.0)


X, Y = np.arange(4.0)[:, None], np.array([-1.0, 1.0, -1.0, 1.0])  # mean 0, variance 1: units are kept


def test_mean_and_spread_are_over_the_members():
    seeds = []
    model = Ensemble(lambda seed: seeds.append(seed) or Fixed(seed=seed), members=5)
    model.fit(X, Y)
    values = np.array([seed % 7 for seed in seeds], float)
    assert len(set(seeds)) == 5
    np.testing.assert_allclose(model.predict(X).mean, values.mean())
    np.testing.assert_allclose(model.predict(X).std, values.std())
    np.testing.assert_allclose(model.member_means(X), np.repeat(values[:, None], 4, axis=1))


def test_mixture_adds_the_members_own_variance():
    one, both = (Ensemble(lambda s: Fixed(seed=s), spread=spread) for spread in ("members", "mixture"))
    one.fit(X, Y)
    both.fit(X, Y)
    np.testing.assert_allclose(both.predict(X).std ** 2, one.predict(X).std ** 2 + 4.0)


def test_bags_make_deterministic_members_differ():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 3))
    y = x @ [1.0, 2.0, 3.0] + rng.normal(size=30)
    same, bagged = Ensemble(lambda s: Ridge(seed=s)), Ensemble(lambda s: Ridge(seed=s), bagging=True)
    same.fit(x, y)
    bagged.fit(x, y)
    assert (same.predict(x).std < 1e-12).all() and (bagged.predict(x).std > 0.01).all()


def test_networks_disagree_more_where_nothing_was_seen():
    x = np.linspace(-1, 1, 30)[:, None]
    model = Ensemble(lambda s: Mlp(hidden=(16,), epochs=100, folds=0, seed=s), members=4)
    model.fit(x, np.sin(3 * x[:, 0]))
    assert model.predict(np.array([[4.0], [-4.0]])).std.min() > 3 * model.predict(x).std.mean()


def test_bad_settings_are_named():
    with pytest.raises(UserError, match="members: got 1; allowed: a number from 2"):
        Ensemble(lambda s: Ridge(), members=1)
    with pytest.raises(UserError, match="spread: got 'all'; allowed: 'members' or 'mixture'"):
        Ensemble(lambda s: Ridge(), spread="all")
    with pytest.raises(UserError, match="predict: got a call before fit"):
        Ensemble(lambda s: Ridge()).member_means(X)
