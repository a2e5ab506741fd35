from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from archsmith.core.errors import UserError
from archsmith.run.statistics import (
    bootstrap_interval,
    compare,
    compare_paired,
    holm,
    kendall_tau,
    median_of,
    relative_improvement,
    spearman_rho,
    summarise,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "nas-eval-protocol.json").read_text())["cases"]
PUBLISHED = [name for name in GOLDEN if name.startswith("RI/")]


@pytest.mark.parametrize("name", PUBLISHED)
def test_relative_improvement_of_the_published_runs(name: str) -> None:
    case = GOLDEN[name]
    found = compare(case["input"]["searched"], case["input"]["random"])
    expected = case["expected"]
    assert found.improvement == pytest.approx(expected["RI"], abs=case["tolerance"])
    assert found.searched.mean == pytest.approx(expected["mean_searched"], abs=1e-9)
    assert found.searched.std == pytest.approx(expected["std_searched_ddof1"], abs=1e-9)
    assert found.random.mean == pytest.approx(expected["mean_random"], abs=1e-9)
    assert found.random.std == pytest.approx(expected["std_random_ddof1"], abs=1e-9)
    assert found.welch_p == pytest.approx(expected["welch_p"], abs=1e-9)
    assert found.mannwhitney_p == pytest.approx(expected["mannwhitney_two_sided_p"], abs=1e-9)
    assert found.low < found.improvement < found.high


def test_recomputed_figures_agree_with_the_published_table_except_where_the_release_does_not() -> None:
    known_to_differ = {("PDARTS", "CIFAR100"), ("DARTS", "Flowers102"), ("PDARTS", "Flowers102")}
    columns = ["CIFAR10", "CIFAR100", "Sport8", "MIT67", "Flowers102"]
    differing = set()
    for name in PUBLISHED:
        _, method, data = name.split("/")
        published = GOLDEN["published_table"]["expected"][method][columns.index(data)]
        runs = GOLDEN[name]["input"]
        if abs(relative_improvement(runs["searched"], runs["random"]) - published) > 0.006:
            differing.add((method, data))
    assert differing <= known_to_differ


def test_relative_improvement_does_not_change_with_the_unit() -> None:
    searched, random = [0.93, 0.94, 0.95], [0.90, 0.91, 0.89]
    assert relative_improvement([100 * a for a in searched], [100 * a for a in random]) == pytest.approx(
        relative_improvement(searched, random), rel=1e-12
    )
    assert relative_improvement(random, random) == 0


def test_a_search_that_is_a_random_sampler_gains_nothing_on_average() -> None:
    rng = np.random.default_rng(0)
    population = 87 + 9 * rng.standard_normal(15_625).clip(-4, 1.2)
    found = [relative_improvement(rng.choice(population, 8), rng.choice(population, 8)) for _ in range(1_000)]
    bias = 100 * population.var() / (8 * population.mean() ** 2)  # of a ratio of means, second order
    assert abs(np.mean(found) - bias) < 4 * np.std(found) / math.sqrt(1_000)


def test_kendalls_tau_of_the_published_depths_and_with_ties() -> None:
    case = GOLDEN["rank/depth_8_vs_20"]
    assert kendall_tau(case["input"]["acc_8_cells"], case["input"]["acc_20_cells"]) == pytest.approx(
        case["expected"]["kendall_tau_b"], abs=case["tolerance"]
    )
    # pairs: (1,2) tied in the first, (2,3) and (1,3) concordant: tau-b = 2 / sqrt(2 * 3)
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(6))
    with pytest.raises(UserError, match=r"second: got '2 values'; allowed: as many as the first \(3\)"):
        kendall_tau([1, 2, 3], [1, 2])


def test_spearmans_rho_with_ties_and_without_variation() -> None:
    assert spearman_rho([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman_rho([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    # ranks (1.5, 1.5, 3) and (1, 2, 3), centred (-.5, -.5, 1) and (-1, 0, 1): 1.5 / sqrt(1.5 * 2)
    assert spearman_rho([1, 1, 2], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(3))
    assert math.isnan(spearman_rho([1, 1, 1], [1, 2, 3]))
    with pytest.raises(UserError, match=r"second: got '2 values'; allowed: as many as the first \(3\)"):
        spearman_rho([1, 2, 3], [1, 2])


def test_a_mean_is_never_printed_without_n_and_spread() -> None:
    assert summarise([93.0, 94.0]).text() == "93.50 ± 0.71 (n = 2)"
    with pytest.raises(UserError, match="a mean is not printed without its spread"):
        summarise([93.0]).text()
    with pytest.raises(UserError, match="at least one value, all of them finite"):
        summarise([])
    with pytest.raises(UserError, match="all of them finite"):
        summarise([1.0, math.nan])


def test_intervals_cover_the_mean_about_95_times_of_100() -> None:
    rng = np.random.default_rng(1)
    draws = rng.normal(5.0, 2.0, size=(400, 40))
    intervals = [bootstrap_interval(lambda values: values.mean(axis=-1), row, resamples=500) for row in draws]
    covered = sum(low <= 5.0 <= high for low, high in intervals)
    # The percentile bootstrap of 40 values covers a little less than 95 %; 4 standard errors around 0.945.
    assert abs(covered / 400 - 0.945) < 4 * math.sqrt(0.945 * 0.055 / 400)
    assert bootstrap_interval(median_of, [3.0, 3.0, 3.0]) == (3.0, 3.0)


def test_pairs_see_what_groups_do_not() -> None:
    rng = np.random.default_rng(2)
    seeds = 5 * rng.standard_normal(12)  # large differences between seeds, a small one between contenders
    first, second = seeds + 0.5 + 0.1 * rng.standard_normal(12), seeds
    paired = compare_paired(first.tolist(), second.tolist())
    assert (paired.wins, paired.losses, paired.n) == (12, 0, 12)
    assert paired.wilcoxon_p == pytest.approx(2 / 2**12)  # exact: all differences have one sign
    assert 0.4 < paired.low < paired.difference < paired.high < 0.6
    assert compare((first + 50).tolist(), (second + 50).tolist()).welch_p > 0.5
    same = compare_paired([1.0, 2.0], [1.0, 2.0])
    assert (same.wilcoxon_p, same.ties, same.difference) == (1.0, 2, 0.0)
    with pytest.raises(UserError, match="one for each of the 2 of the first"):
        compare_paired([1.0, 2.0], [1.0])


def test_constant_groups_have_no_welch_test() -> None:
    found = compare([90.0, 90.0], [90.0, 90.0])
    assert math.isnan(found.welch_p) and found.improvement == 0
    with pytest.raises(UserError, match=r"random: got 0\.0; allowed: accuracies with a positive mean"):
        relative_improvement([1.0], [0.0])


def test_holm_equals_its_definition() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    p_values = np.random.default_rng(3).random(20)
    assert holm(p_values.tolist()) == pytest.approx(
        np.maximum.accumulate((20 - np.arange(20)) * np.sort(p_values))[np.argsort(np.argsort(p_values))].clip(max=1)
    )
    assert stats.rankdata(holm(p_values.tolist())).argmin() == p_values.argmin()
