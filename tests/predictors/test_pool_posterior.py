"""One row at a time equals the process fitted from the start."""

from __future__ import annotations

import numpy as np

from archsmith.predictors import GaussianProcess
from archsmith.predictors import pool_posterior as module
from archsmith.predictors.pool_posterior import PoolPosterior


def test_it_equals_conditioning_from_the_start(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 7)  # several blocks, the last one short
    rng = np.random.default_rng(0)
    pool = rng.normal(size=(60, 4))
    value = np.sin(pool[:, 0]) + pool[:, 1] * pool[:, 2]
    order = rng.permutation(60)
    process = GaussianProcess(groups=(1, 3))
    process.fit(pool[order[:8]], value[order[:8]])
    posterior = PoolPosterior(process, pool, order[:8].tolist())
    for n in range(8, 50):  # past the first capacity
        posterior.observe(int(order[n]))
        if n % 10 == 0:
            seen = order[: n + 1]
            mean, std = posterior.predict(value[seen])
            process.condition(pool[seen], value[seen])
            expected = process.predict(pool)
            np.testing.assert_allclose(mean, expected.mean, rtol=1e-6, atol=1e-8)
            np.testing.assert_allclose(std, expected.std, rtol=1e-4, atol=1e-6)


def test_observing_twice_is_two_observations():
    pool = np.array([[0.0], [1.0], [5.0]])
    process = GaussianProcess(max_iterations=0)
    process.fit(pool, np.array([0.0, 1.0, 2.0]))
    once, twice = PoolPosterior(process, pool, [0, 1]), PoolPosterior(process, pool, [0, 1, 0])
    targets = np.array([0.0, 1.0])
    assert (twice.predict(np.array([0.0, 1.0, 0.0]))[1][0] / np.std([0.0, 1.0, 0.0])) < (
        once.predict(targets)[1][0] / np.std(targets)
    )
