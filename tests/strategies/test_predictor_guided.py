"""Predictor-guided search: what it proposes and why, what it refuses, and how few real networks it needs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from shared_data import shared_data

from archsmith.core.errors import UserError
from archsmith.families.cell_features import (
    NB201_FEATURE_GROUPS,
    nas_bench_201_codes,
    nas_bench_201_features,
    path_encoding,
)
from archsmith.families.cell_spaces import nas_bench_201_space
from archsmith.predictors import GaussianProcess, Predictor, Ridge
from archsmith.space import Categorical, Objective, ProductSpace, Real, Result
from archsmith.strategies.candidates import CandidatePool, default_features, hashed_decisions
from archsmith.strategies.predictor_guided import PredictorGuided, bananas


def grid_space(canonical=None):
    elements = {name: Categorical(tuple(range(5))) for name in "abc"}
    return ProductSpace("grid", elements, canonical=canonical)


def score(architecture):
    return -sum((int(value) - target) ** 2 for value, target in zip(architecture.values(), (4, 0, 3), strict=True))


def run(strategy, n, value=score):
    asked = []
    for _ in range(n):
        for trial in strategy.ask():
            asked.append(trial)
            strategy.tell(trial.id, Result(metrics={"valid_accuracy": float(value(trial.architecture))}))
    return asked


class Oracle(Predictor):
    """Knows the sum of the features; certain of it."""

    def _fit(self, features, targets):
        pass

    def _predict(self, features):
        return features.sum(1), np.zeros(len(features))


def by_value(architecture):
    return np.array([float(architecture[name]) for name in "abc"])


@pytest.mark.parametrize("whole", [0, 1000])
def test_it_proposes_what_the_predictor_ranks_first(whole):
    """With a predictor that knows, the best of the whole space comes at once, and the best of what is drawn soon."""
    strategy = PredictorGuided(
        grid_space(), features=by_value, predictor=lambda seed: Oracle(), acquisition="mean", initial=3, whole=whole
    )
    asked = run(strategy, 14, lambda a: sum(a.values()))
    sums = [sum(trial.architecture.values()) for trial in asked]
    if whole:
        # 1 cell has 12, 3 have 11, 6 have 10, then 9; those of the random start are not asked again
        start = sums[:3]
        ranked = sorted((sum(a.values()) for a in grid_space().enumerate()), reverse=True)
        for each in start:
            ranked.remove(each)
        assert sums[3:] == ranked[:11]
    else:
        assert max(sums) == 12


def test_minimising_is_maximising_the_negative():
    up = run(PredictorGuided(grid_space(), initial=4, seed=3), 20)
    down = PredictorGuided(grid_space(), initial=4, seed=3, objectives=[Objective("loss", "minimize")])
    for each in up:
        (trial,) = down.ask()
        assert trial.architecture == each.architecture
        down.tell(trial.id, Result(metrics={"loss": -float(score(trial.architecture))}))


def test_it_finds_the_summit_of_a_small_space_long_before_the_end():
    for seed in range(3):
        asked = run(PredictorGuided(grid_space(), initial=5, seed=seed), 30)
        assert max(score(trial.architecture) for trial in asked) == 0  # 1 of 125; at random 24 %


def test_a_finite_space_ends_and_equal_networks_are_asked_once():
    """Sorted values are the network: 35 multisets of 125."""
    space = grid_space(canonical=lambda a: sorted(a.values()))
    for whole in (0, 1000):
        strategy = PredictorGuided(space, initial=5, whole=whole, candidates=20)
        asked = run(strategy, 40)
        assert len({trial.architecture.network_digest for trial in asked}) == len(asked) == 35
        assert strategy.done and strategy.ask() == []


def test_a_batch_spreads_out():
    """Pending trials count as median results with what they take of the uncertainty: no two neighbours of one guess."""
    strategy = PredictorGuided(grid_space(), initial=5, seed=1)
    run(strategy, 12)
    batch = strategy.ask(4)
    assert len({trial.architecture.digest for trial in batch}) == 4
    for trial in batch:
        strategy.tell(trial.id, Result(metrics={"valid_accuracy": 0.0}))


def test_failures_keep_the_search_away():
    """Where a = 4 everything crashes; what is best there is never worth the third try."""

    def result(architecture):
        return math.nan if architecture["a"] == 4 else score(architecture)

    asked = run(PredictorGuided(grid_space(), initial=8, seed=2), 40, result)
    late = [trial.architecture["a"] for trial in asked[15:]]
    assert late.count(4) <= len(late) / 5
    assert max(score(t.architecture) for t in asked if t.architecture["a"] != 4) == -1


def test_a_shared_pool_limits_the_search():
    listed = [a for a in grid_space().enumerate() if a["a"] in (1, 2)]
    pool = CandidatePool(listed, by_value)
    asked = [run(PredictorGuided(grid_space(), pool=pool, initial=4, seed=s), 60) for s in (0, 1)]
    assert all(len(each) == 50 and {t.architecture["a"] for t in each} == {1, 2} for each in asked)
    assert [t.architecture for t in asked[0]] != [t.architecture for t in asked[1]]


def test_the_predictor_learns_anew_when_the_data_have_grown():
    seen = []

    class Counted(Ridge):
        def fit(self, features_ND, targets_N):
            seen.append(len(targets_N))
            super().fit(features_ND, targets_N)

    strategy = PredictorGuided(grid_space(), predictor=lambda seed: Counted(), initial=4, refit=1.5)
    run(strategy, 30)
    assert seen == [4, 6, 9, 13, 19, 28]


def test_default_features_are_one_hot_and_hashed_where_they_must():
    space = grid_space()
    cell = space.sample(np.random.default_rng(0))
    np.testing.assert_array_equal(default_features(space)(cell), space.encode(cell, "one-hot"))
    mixed = ProductSpace("mixed", {"op": Categorical(("x", "y")), "rate": Real(0.0, 1.0)})
    low, high = (mixed.validate({"op": "x", "rate": rate}) for rate in (0.25, 0.75))
    rows = [default_features(mixed)(each) for each in (low, high)]
    np.testing.assert_array_equal(rows[0], hashed_decisions(mixed, low))
    assert rows[0].shape == (256,) and np.abs(rows[0] - rows[1]).sum() == pytest.approx(0.5)


def test_bananas_is_near_the_paper():
    strategy = bananas(grid_space(), seed=1, candidates=20, features=by_value)
    assert (strategy.acquisition, strategy.scaling, strategy.whole) == ("thompson", "none", 0)
    assert strategy.predictor.members == 5 and strategy.predictor.make(0).hidden == (20,) * 10
    assert len(run(strategy, 11)) == 11


def test_bad_settings_are_named():
    space = grid_space()
    with pytest.raises(UserError, match="initial: got 1; allowed: a number from 2"):
        PredictorGuided(space, initial=1)
    with pytest.raises(UserError, match=r"refit: got 0\.5; allowed: a number from 1"):
        PredictorGuided(space, refit=0.5)
    with pytest.raises(UserError, match=r"exploration: got nan"):
        PredictorGuided(space, exploration=math.nan)
    with pytest.raises(UserError, match="acquisition: got 'EI'"):
        PredictorGuided(space, acquisition="EI")
    with pytest.raises(UserError, match="scaling: got 'log'"):
        PredictorGuided(space, scaling="log")
    with pytest.raises(UserError, match=r"objectives: got .*1 to 1 for PredictorGuided"):
        PredictorGuided(space, objectives=[Objective("a"), Objective("b")])
    with pytest.raises(UserError, match="features: got arrays of shape"):
        PredictorGuided(space, features=lambda a: np.ones(int(a["a"]) + 1)).ask()
    with pytest.raises(UserError, match=r"features: got NaN or infinity for \{'a': 0"):
        PredictorGuided(space, features=lambda a: np.array([math.nan])).ask()
    with pytest.raises(UserError, match=r"architectures: got \[\]"):
        CandidatePool([], by_value)


def test_few_real_networks_are_needed():
    """NAS-Bench-201, CIFAR-10: the best of all cells within 100 queries for each of five seeds.

    Measured over 100 seeds, the median is far below that (benchmarks/results/queries_to_optimum_202611.md); random
    search is a percentage point short after 50 queries, and finds the best one in 100 queries once in 65 searches.
    """
    with np.load(shared_data("nas-benchmarks") / "nas-bench-201.npz") as table:
        row = {tuple(codes): index for index, codes in enumerate(table["ops"].tolist())}
        accuracy = table["val_acc_200ep_cifar10"].astype(float)
    space = nas_bench_201_space()
    pool = CandidatePool(space.enumerate(), nas_bench_201_features)

    def value(cell):
        return accuracy[row[nas_bench_201_codes(cell)]]

    for seed in range(5):
        strategy = PredictorGuided(
            space,
            features=nas_bench_201_features,
            predictor=lambda own: GaussianProcess(groups=NB201_FEATURE_GROUPS, seed=own),
            pool=pool,
            initial=5,
            seed=seed,
        )
        best = 0.0
        for _ in range(100):
            best = max(best, value(run(strategy, 1, value)[0].architecture))
            if best == accuracy.max():
                break
        assert best == accuracy.max(), seed


def test_the_path_encoding_is_a_feature_function():
    space = nas_bench_201_space()
    cell = space.sample(np.random.default_rng(0))
    strategy = PredictorGuided(space, features=path_encoding, whole=0, initial=4, candidates=10)
    run(strategy, 8, lambda a: float(path_encoding(a).sum()))
    assert strategy.features(cell).shape == (84,)
