"""Acquisition functions and scalings against closed forms and sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.strategies.acquisition import acquire, expected_improvement, scaled


def test_expected_improvement_by_hand():
    # at the best itself: std / sqrt(2 pi); certain: the gain, if there is one
    value = expected_improvement(np.array([1.0, 3.0, 0.5]), np.array([2.0, 0.0, 0.0]), 1.0)
    np.testing.assert_allclose(value, [2 / math.sqrt(2 * math.pi), 2.0, 0.0])


def test_expected_improvement_is_the_mean_of_the_improvement():
    rng = np.random.default_rng(0)
    n = 200_000
    for mean, std in ((0.0, 1.0), (-1.0, 0.7), (1.5, 0.3)):
        gains = np.maximum(mean + std * rng.standard_normal(n) - 0.4, 0)
        exact = expected_improvement(np.array([mean]), np.array([std]), 0.4)[0]
        assert abs(gains.mean() - exact) < 4 * gains.std() / math.sqrt(n)


def test_far_below_the_best_it_is_tiny_but_never_negative():
    value = expected_improvement(np.array([-40.0, -3.0]), np.array([1.0, 1.0]), 0.0)
    assert value[0] == 0.0 and value[1] > 0


def test_the_others_by_hand():
    mean, std = np.array([1.0, 2.0]), np.array([3.0, 0.5])
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    np.testing.assert_allclose(acquire("ucb", mean, std, 0.0, rng, 2.0), [7.0, 3.0])
    np.testing.assert_allclose(acquire("pi", mean, std, 0.0, rng, 0.5), [1 / 3 - 0.5, 3.5])
    np.testing.assert_allclose(acquire("mean", mean, std, 0.0, rng), mean)
    assert rng.bit_generator.state == before
    draws = np.stack([acquire("thompson", mean, std, 0.0, rng) for _ in range(20_000)])
    np.testing.assert_allclose(draws.mean(0), mean, atol=4 * 3 / math.sqrt(20_000))
    np.testing.assert_allclose(draws.std(0), std, rtol=0.05)
    assert abs(np.corrcoef(draws.T)[0, 1]) < 4 / math.sqrt(20_000)  # independent
    with pytest.raises(UserError, match="acquisition: got 'kg'; allowed: one of"):
        acquire("kg", mean, std, 0.0, rng)


def test_log_regret_by_hand():
    # regrets 0, 1, 2, 3, 80: median 2
    found = scaled("log-regret", np.array([90.0, 89.0, 88.0, 87.0, 10.0]))
    np.testing.assert_allclose(found, -np.log1p([0, 2, 4, 6, 160]))
    # more than half at the best: the mean takes the median's place; all equal: nothing to tell
    np.testing.assert_allclose(scaled("log-regret", np.array([1.0, 1.0, 1.0, 0.0])), -np.log1p([0, 0, 0, 16]))
    np.testing.assert_array_equal(scaled("log-regret", np.full(3, 5.0)), np.zeros(3))


def test_ranks_are_normal_scores():
    found = scaled("rank", np.array([3.0, 1.0, 2.0]))
    from scipy.stats import norm

    np.testing.assert_allclose(found, norm.ppf([5 / 6, 1 / 6, 1 / 2]))
    tied = scaled("rank", np.array([1.0, 2.0, 2.0, 3.0]))
    assert tied[1] == tied[2] == pytest.approx(0)


@pytest.mark.parametrize("kind", ["log-regret", "rank", "none"])
def test_scalings_keep_the_order(kind):
    values = np.random.default_rng(0).normal(size=50) ** 3
    found = scaled(kind, values)
    np.testing.assert_array_equal(np.argsort(found), np.argsort(values))
    assert np.isfinite(found).all() and scaled(kind, values[:0]).shape == (0,)


def test_unknown_scaling_is_named():
    with pytest.raises(UserError, match="scaling: got 'log'"):
        scaled("log", np.ones(2))
