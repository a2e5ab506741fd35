from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from benchmark_tables import real_table
from shared_data import shared_data

from archsmith.core.errors import UserError
from archsmith.evaluate.tables import TableEvaluator
from archsmith.families.cell_spaces import NB201_EDGES, NB201_OPERATIONS, nas_bench_201_space
from archsmith.methods import load_method
from archsmith.methods.nas_bench_201 import regularised_evolution, search
from archsmith.methods.nas_eval_protocol import (
    LADDER,
    Settings,
    depth_gap,
    epoch_correlation,
    number_of_cells,
    operation_ablation,
    protocol,
    random_accuracies,
    rank_change,
    seed_sensitivity,
    space_spread,
    training_ladder,
)
from archsmith.run.statistics import relative_improvement
from archsmith.space import Architecture, Categorical, ProductSpace

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "nas-eval-protocol.json").read_text())["cases"]
SPACE = nas_bench_201_space()


def convolutions(architecture: Architecture) -> float:
    """A known accuracy: 50 and 8 for each 3x3 convolution."""
    return 50.0 + 8 * sum(value == "nor_conv_3x3" for value in architecture.values())


def all_convolutions(seed: int) -> Architecture:
    return SPACE.validate({f"edge/{s}-{t}": "nor_conv_3x3" for s, t in NB201_EDGES})


def test_listed_as_a_protocol() -> None:
    row, _ = load_method("nas-eval-protocol", kind="protocol")
    assert row["arxiv"] == "1912.12522"


def test_the_best_search_gains_what_the_space_allows() -> None:
    found = protocol(SPACE, all_convolutions, convolutions, Settings(runs=200))
    # E[3x3 convolutions] = 6/5, so the average random architecture has 59.6: RI = 100 (98 - 59.6) / 59.6.
    spread = 8 * np.sqrt(6 * 0.2 * 0.8 / 200)
    assert abs(found.random.mean - 59.6) < 4 * spread
    assert found.improvement == pytest.approx(100 * (98 / found.random.mean - 1))
    assert found.searched.n == found.random.n == 200
    assert found.mannwhitney_p < 1e-10


def test_a_search_that_returns_its_first_sample_gains_nothing() -> None:
    found = protocol(
        SPACE, lambda seed: SPACE.sample(np.random.default_rng(10_000 + seed)), convolutions, Settings(runs=200)
    )
    assert found.low < 0 < found.high
    assert found.welch_p > 0.01


def test_random_architectures_do_not_depend_on_the_search() -> None:
    first = random_accuracies(SPACE, convolutions, Settings(runs=4, seed=1))
    protocol(SPACE, all_convolutions, convolutions, Settings(runs=4, seed=2))
    assert random_accuracies(SPACE, convolutions, Settings(runs=4, seed=1)) == first
    assert random_accuracies(SPACE, convolutions, Settings(runs=4, seed=2)) != first
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        Settings(runs=1)


def test_spread_and_poorer_operations() -> None:
    spread = space_spread(SPACE, convolutions, samples=500)
    assert abs(spread.std - 8 * np.sqrt(0.96)) < 1.2 and spread.n == 500 and spread.smallest == 50
    poorer = ProductSpace("poorer", {path: Categorical(NB201_OPERATIONS[:3]) for path in SPACE.paths})
    found = operation_ablation(SPACE, poorer, convolutions, samples=100)
    assert found.random.mean == 50 and found.improvement > 10


def test_epoch_correlation_against_its_definition() -> None:
    rng = np.random.default_rng(0)
    curves = rng.random((30, 12)).cumsum(axis=1)
    expected = [np.corrcoef(curves[:, e], curves[:, -1])[0, 1] for e in range(12)]
    assert epoch_correlation(curves) == pytest.approx(expected, abs=1e-12)
    smooth = np.array([[row[max(0, e - 1) : e + 2].mean() for e in range(12)] for row in curves])
    expected = [np.corrcoef(smooth[:, e], curves[:, -1])[0, 1] for e in range(12)]
    assert epoch_correlation(curves, window=3) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(UserError, match=r"curves: got \(12,\)"):
        epoch_correlation(curves[0])


def test_rank_change_of_the_published_depths() -> None:
    case = GOLDEN["rank/depth_8_vs_20"]
    found = rank_change(case["input"]["acc_8_cells"], case["input"]["acc_20_cells"])
    assert found.tau == pytest.approx(case["expected"]["kendall_tau_b"], abs=1e-6)
    assert found.n == 32 and found.largest_shift >= 18  # the paper: shifts of up to 18 of 32 ranks, ties aside
    assert rank_change([1.0, 2.0, 4.0], [3.0, 2.0, 1.0]).largest_change == 3.0


def test_studies_train_what_they_say() -> None:
    samples = [SPACE.sample(np.random.default_rng(seed)) for seed in range(6)]
    assert seed_sensitivity(samples, lambda each, seed: convolutions(each) + 0.1 * seed).tau == pytest.approx(1.0)
    assert depth_gap(samples, lambda each, depth: convolutions(each) * (1 if depth == 8 else -1)).tau == pytest.approx(
        -1
    )
    cells = number_of_cells(samples, lambda each, depth: convolutions(each) + depth, [2, 4])
    assert cells[4].mean - cells[2].mean == pytest.approx(2)
    seen: list[dict[str, object]] = []

    def trained(each: Architecture, changes: object) -> float:
        seen.append(dict(changes))  # type: ignore[call-overload]
        return convolutions(each)

    rungs = training_ladder(samples, trained)
    assert list(rungs) == list(LADDER) and all(rung.n == 6 for rung in rungs.values())
    assert seen[0] == {} and seen[-1]["epochs"] == 1500 and seen[-1]["channels"] == 50


def test_the_214_networks_of_the_darts_space() -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    folder = shared_data("nas-benchmarks")
    table = pq.read_table(folder / "restricted" / "darts-space-214.parquet")
    curves = np.array(table["test_acc_curve"].to_pylist())
    summary, case = GOLDEN["darts214/summary"]["expected"], GOLDEN["darts214/epoch_correlation"]
    assert curves[:, -1].mean() == pytest.approx(summary["mean_last_epoch"], abs=1e-3)
    best = curves.max(axis=1)
    assert best.mean() == pytest.approx(summary["mean_best_epoch"], abs=1e-3)
    assert (best.std(), best.min(), best.max()) == pytest.approx(
        (summary["std_best_epoch_ddof0"], summary["min_best_epoch"], summary["max_best_epoch"]), abs=1e-3
    )
    correlation = epoch_correlation(curves)
    for epoch, expected in case["expected"].items():
        assert correlation[int(epoch) - 1] == pytest.approx(expected, abs=case["tolerance"])


def test_positive_and_negative_control_on_the_real_table() -> None:
    """Regularised evolution gains what it is known to gain; a search that returns its first sample gains nothing."""
    table = real_table("nas-bench-201")
    test = table.values("test_accuracy", dataset="cifar10")
    evaluator = TableEvaluator(table, dataset="cifar10", fidelity=12)

    def evolution(seed: int) -> Architecture:
        return table.architecture(search(regularised_evolution(table.space, seed), evaluator, 12_000.0).row)

    def accuracy(architecture: Architecture) -> float:
        row = table.row(architecture)
        assert row is not None
        return float(test[row])

    found = protocol(table.space, evolution, accuracy, Settings(runs=30))
    # Known: the average architecture has 87.06 and evolution finds 93.92, so RI = 7.9; 4 standard errors of the random
    # group's mean, whose architectures have a standard deviation of about 11.
    assert abs(found.improvement - 7.9) < 4 * 100 * test.std() / test.mean() / np.sqrt(30)
    assert found.searched.mean == pytest.approx(93.92, abs=0.2)
    assert found.mannwhitney_p < 1e-8
    first = protocol(
        table.space, lambda seed: table.space.sample(np.random.default_rng(50_000 + seed)), accuracy, Settings(runs=30)
    )
    assert min(first.mannwhitney_p, first.welch_p) > 0.01


def test_relative_improvement_of_random_draws_on_the_real_table_is_near_zero() -> None:
    test = real_table("nas-bench-201").values("test_accuracy", dataset="cifar10")
    rng = np.random.default_rng(0)
    found = [relative_improvement(rng.choice(test, 8), rng.choice(test, 8)) for _ in range(1_000)]
    bias = 100 * test.var() / (8 * test.mean() ** 2)
    assert bias == pytest.approx(0.28, abs=0.05)  # the card of the protocol
    assert abs(np.mean(found) - bias) < 4 * np.std(found) / np.sqrt(1_000)
