"""Forests and boosting: interactions, spreads, settings."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from archsmith.core.errors import MissingExtra, UserError
from archsmith.predictors import Boosting, RandomForest


def _xor():
    x = np.random.default_rng(0).integers(0, 2, (200, 4)).astype(float)
    return x, (x[:, 0] != x[:, 1]).astype(float)


@pytest.mark.parametrize("model", [RandomForest(features_per_split=1.0), Boosting(members=2, rounds=40)])
def test_an_interaction_that_no_linear_model_sees(model):
    x, y = _xor()
    model.fit(x, y)
    assert np.abs(model.predict(x).mean - y).mean() < 0.1


def test_forest_spread_is_over_its_trees():
    x, y = _xor()
    model = RandomForest(trees=7)
    model.fit(x, y)
    votes = np.array([tree.predict(x) for tree in model._model.estimators_]) * y.std() + y.mean()
    found = model.predict(x)
    np.testing.assert_allclose(found.mean, votes.mean(0), atol=1e-12)
    np.testing.assert_allclose(found.std, votes.std(0), atol=1e-12)


def test_one_booster_has_no_spread_and_small_samples_can_split():
    x = np.arange(10.0)[:, None]
    model = Boosting(members=1)
    model.fit(x, (x[:, 0] > 4).astype(float))
    found = model.predict(x)
    assert (found.std == 0).all() and np.abs(found.mean - (x[:, 0] > 4)).max() < 0.05


def test_missing_lightgbm_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(MissingExtra, match=r"needs the package 'lightgbm'.*archsmith\[boost\]"):
        Boosting(engine="lightgbm").fit(*_xor())


def test_bad_settings_are_named():
    with pytest.raises(UserError, match="engine: got 'xgboost'; allowed: 'sklearn' or 'lightgbm'"):
        Boosting(engine="xgboost")
    with pytest.raises(UserError, match="members: got 0"):
        Boosting(members=0)
    with pytest.raises(UserError, match="trees: got 1; allowed: a number from 2"):
        RandomForest(trees=1)
    with pytest.raises(UserError, match=r"features_per_split: got 1\.5"):
        RandomForest(features_per_split=1.5)
