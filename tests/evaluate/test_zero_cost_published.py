"""Rank agreement with the published per-architecture scores of NAS-Bench-201, on real CIFAR-10 images.

The published values stem from the networks of the benchmark (C = 16, N = 5) with one initialisation. The quick test
scores networks of C = 4, N = 1 with 16 images. Its bounds: over three draws of cells, images and weights the smallest
coefficients were naswot 0.976, logsynflow 0.964, synflow 0.931, nregions 0.903; each bound lies 4 standard errors below
in Fisher's z (1.06 / sqrt(40 - 3)).
"""

from __future__ import annotations

import numpy as np
import pytest
from cell_samples import cells_of_table, cifar10_batch, nas_bench_201_columns, zero_cost_columns
from scipy.stats import spearmanr

from archsmith.evaluate.zero_cost import Batch, ZeroCostEvaluator
from archsmith.families.cells import NasBench201Family
from archsmith.space import Trial

QUICK = {"naswot": 0.90, "logsynflow": 0.86, "synflow": 0.74, "nregions": 0.65}
LARGE = {"naswot": 0.98, "logsynflow": 0.95, "synflow": 0.95, "nregions": 0.90}


def family(**size: int) -> NasBench201Family:
    return NasBench201Family(image=(3, 32, 32), num_classes=10, **size)


def agreement(networks: NasBench201Family, count: int, images: int, seed: int) -> dict[str, float]:
    """Return Spearman's coefficient with the published values by score."""
    published, columns = zero_cost_columns(), nas_bench_201_columns()
    rows = np.random.default_rng(seed).choice(15625, count, replace=False)
    evaluator = ZeroCostEvaluator(networks, Batch(*cifar10_batch(images, seed)), scores=list(QUICK))
    found = [
        evaluator.evaluate(Trial(id=number, architecture=cell, seed=seed)).metrics
        for number, cell in enumerate(cells_of_table(columns["ops"][rows]))
    ]
    return {
        name: float(spearmanr([metrics[name] for metrics in found], published[name][rows]).statistic) for name in QUICK
    }


def test_small_networks_rank_as_published():
    found = agreement(family(channels=4, cells=1), 40, 16, seed=0)
    assert {name: value for name, value in found.items() if value < QUICK[name]} == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_networks_of_the_benchmark_rank_as_published():
    found = agreement(family(channels=16, cells=5), 100, 32, seed=1)
    print(found)
    assert {name: value for name, value in found.items() if value < LARGE[name]} == {}
