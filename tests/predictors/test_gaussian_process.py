"""The exact Gaussian process against closed forms, finite differences and a literal computation."""

from __future__ import annotations

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.predictors import GaussianProcess
from archsmith.predictors.gaussian_process import gaussian, matern52, squared_distances


def _data(n=30, d=5, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    return x, np.sin(x[:, 0]) + x[:, 1] ** 2 + 0.01 * rng.normal(size=n)


def test_squared_distances_are_literal():
    x, z = np.random.default_rng(0).normal(size=(2, 7, 3))
    literal = [[sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in z] for p in x]
    np.testing.assert_allclose(squared_distances(x, z), literal, atol=1e-12)


@pytest.mark.parametrize("kernel", [matern52, gaussian])
def test_correlations_start_at_one_and_have_their_slope(kernel):
    r2 = np.array([1e-12, 0.3, 2.0, 30.0])
    value, slope = kernel(r2)
    assert value[0] == pytest.approx(1, abs=1e-6) and (np.diff(value) < 0).all()
    h = 1e-6
    r2 = r2[1:]
    np.testing.assert_allclose(slope[1:], (kernel(r2 + h)[0] - kernel(r2 - h)[0]) / (2 * h), rtol=1e-5)


def test_matern_at_one_length_scale():
    a = 5**0.5
    assert matern52(np.array(1.0))[0] == pytest.approx((1 + a + 5 / 3) * np.exp(-a), rel=1e-12)


@pytest.mark.parametrize("kernel", ["matern52", "gaussian"])
def test_gradient_of_the_loss_is_its_finite_difference(kernel):
    x, y = _data()
    model = GaussianProcess(kernel=kernel, groups=(2, 3))
    model.fit(x, y)
    distances = model._distances(x, x)
    logs = model._centre + np.array([0.3, -0.4, 0.5, -0.2])
    target = (y - y.mean()) / y.std()
    _, gradient = model.loss(logs, distances, target)
    for i, h in enumerate(np.eye(4) * 1e-5):
        numeric = (model.loss(logs + h, distances, target)[0] - model.loss(logs - h, distances, target)[0]) / 2e-5
        assert gradient[i] == pytest.approx(numeric, rel=1e-5, abs=1e-6)


def test_posterior_is_the_literal_one():
    x, y = _data()
    new = np.random.default_rng(5).normal(size=(4, 5))
    model = GaussianProcess(groups=(2, 3))
    model.fit(x, y)
    found = model.predict(new)
    signal, noise, squares = model._parameters(model._logs)

    def k(a, b):
        r2 = sum(((a[s] - b[s]) ** 2).sum() / q for s, q in zip((slice(0, 2), slice(2, 5)), squares, strict=True))
        return signal * float(matern52(np.array(r2))[0])

    gram = np.array([[k(a, b) for b in x] for a in x]) + noise * np.eye(len(x))
    cross = np.array([[k(a, b) for b in x] for a in new])
    target = (y - y.mean()) / y.std()
    mean = y.mean() + y.std() * cross @ np.linalg.solve(gram, target)
    variance = [k(a, a) - c @ np.linalg.solve(gram, c) for a, c in zip(new, cross, strict=True)]
    np.testing.assert_allclose(found.mean, mean, rtol=1e-8)
    np.testing.assert_allclose(found.std, y.std() * np.sqrt(variance), rtol=1e-5)


def test_fitting_improves_on_the_start_and_finds_the_useless_group():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 2))
    y = np.sin(2 * x[:, 0])
    model = GaussianProcess(groups=(1, 1), prior_strength=0.01)
    model.fit(x, y)
    useful, useless = model._parameters(model._logs)[2]
    assert useless > 100 * useful
    fixed = GaussianProcess(groups=(1, 1), max_iterations=0)
    fixed.fit(x, y)
    new = rng.normal(size=(200, 2))
    errors = [np.abs(m.predict(new).mean - np.sin(2 * new[:, 0])).mean() for m in (model, fixed)]
    assert errors[0] < 0.5 * errors[1]


def test_far_away_it_knows_nothing_and_near_by_it_interpolates():
    x, y = _data()
    model = GaussianProcess()
    model.fit(x, y)
    far, near = model.predict(x + 1e6), model.predict(x)
    signal = model._parameters(model._logs)[0]
    np.testing.assert_allclose(far.mean, y.mean(), atol=1e-6)
    np.testing.assert_allclose(far.std, y.std() * signal**0.5, rtol=1e-6)
    assert (near.std < 0.5 * far.std).all() and np.corrcoef(near.mean, y)[0, 1] > 0.99


def test_bad_settings_are_named():
    with pytest.raises(UserError, match=r"kernel: got 'rbf'; allowed: one of \['gaussian', 'matern52'\]"):
        GaussianProcess(kernel="rbf")
    with pytest.raises(UserError, match=r"groups: got \[3, 0\]"):
        GaussianProcess(groups=(3, 0))
    with pytest.raises(UserError, match="prior_strength: got -1"):
        GaussianProcess(prior_strength=-1)
    with pytest.raises(UserError, match=r"groups: got \[2, 2\]; allowed: numbers that add up to the 5 columns"):
        GaussianProcess(groups=(2, 2)).fit(*_data())
