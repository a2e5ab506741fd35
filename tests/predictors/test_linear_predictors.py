"""Ridge and support vectors: closed forms, and latencies of real devices."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from shared_data import shared_data

from archsmith.core.errors import UserError
from archsmith.predictors import Ridge, SupportVectors

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "latency_predictor.json"


def test_ridge_is_the_closed_form_at_its_own_penalty():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 4))
    y = 3 + x @ [1.0, -2.0, 0.5, 0.0] + 0.3 * rng.normal(size=40)
    model = Ridge()
    model.fit(x, y)
    penalty = model._model.lambda_ / model._model.alpha_
    centred = x - x.mean(0)
    weights = np.linalg.solve(centred.T @ centred + penalty * np.eye(4), centred.T @ (y - y.mean()))
    found = model.predict(x)
    np.testing.assert_allclose(found.mean, y.mean() + centred @ weights, rtol=1e-4)
    assert found.std.mean() == pytest.approx(0.3, rel=0.3)


def test_ridge_recovers_a_table_of_edges_exactly():
    """Additive quantities (FLOPs, parameters) of unseen cells follow from a few."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 5, (300, 6))
    hot = np.eye(5)[codes].reshape(300, 30)
    target = 7.0 + hot @ rng.normal(size=30)
    model = Ridge()
    model.fit(hot[:100], target[:100])
    np.testing.assert_allclose(model.predict(hot[100:]).mean, target[100:], atol=1e-3)


def test_support_vectors_bend():
    rng = np.random.default_rng(0)
    x = rng.uniform(-2, 2, (80, 1))
    model = SupportVectors()
    model.fit(x, x[:, 0] ** 2)
    new = np.linspace(-1.8, 1.8, 9)[:, None]
    found = model.predict(new)
    np.testing.assert_allclose(found.mean, new[:, 0] ** 2, atol=0.2)
    assert np.ptp(found.std) == 0 and 0 < found.std[0] < 0.3


def test_bad_settings_are_named():
    with pytest.raises(UserError, match="penalty: got 0"):
        SupportVectors(penalty=0)
    with pytest.raises(UserError, match="folds: got 1; allowed: a number from 2"):
        SupportVectors(folds=1)


@pytest.mark.parametrize("device", ["raspi4", "pixel3", "gold_6226", "1080ti_1", "fpga"])
def test_ridge_ranks_real_latencies_from_200_cells(device):
    """Spearman on the 15,425 cells left out, mean of five seeds: no worse than plain ridge regression was measured."""
    parquet = pytest.importorskip("pyarrow.parquet")
    from scipy.stats import spearmanr

    folder = shared_data("nas-benchmarks")
    with np.load(folder / "nas-bench-201.npz") as table:
        hot = np.eye(5)[table["ops"]].reshape(len(table["ops"]), 30)
    latency = parquet.read_table(folder / "nas-bench-201-latency-help.parquet", columns=[device])[device].to_numpy()
    found = []
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(hot))
        train, rest = order[:200], order[200:]
        model = Ridge()
        model.fit(hot[train], latency[train])
        found.append(spearmanr(model.predict(hot[rest]).mean, latency[rest]).statistic)
    # the published figures are rounded to three digits
    assert np.mean(found) >= json.loads(GOLDEN.read_text())["spearman"][device] - 0.0005, (device, found)
