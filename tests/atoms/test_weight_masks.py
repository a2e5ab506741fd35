"""Mask families and their choices: the published pool and closed-form oracles, limits, and brute force."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from archsmith.atoms.weight_masks import (
    FIXED_POOL,
    Filters,
    Kernels,
    NOfM,
    Patterns,
    Unstructured,
    all_patterns,
    frequent_patterns,
    importance,
    kept_weights,
    pattern_pool,
    percents_by_ranking,
    removed_count,
)
from archsmith.core.errors import UserError
from archsmith.train.mask_lasso import complement_lasso

CASES = {
    case["name"]: case
    for case in json.loads((Path(__file__).parents[1] / "golden" / "clicktrain.json").read_text())["cases"]
}


def closed_form(case: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and gradient of an oracle: w[i] = sin(a + 1.7 i), g[i] = cos(b + 0.9 i)."""
    shape = case["input"]["shape"]
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    a, b = (0.1, 0.4) if len(shape) == 4 and shape[2] == 3 else (0.3, 0.2)
    assert str(a) in case["input"]["weight"] and str(b) in case["input"]["grad"]
    return torch.sin(a + 1.7 * i).view(shape), torch.cos(b + 0.9 * i).view(shape)


def gone(kept: torch.Tensor) -> list[list[int]]:
    return (~kept).nonzero().tolist()


def test_the_pool_is_the_published_one() -> None:
    published = CASES["pattern_pool"]["expected"]["kept_positions_in_order"]
    assert [list(pattern) for pattern in FIXED_POOL] == published
    for count in (4, 8, 12):
        assert [list(pattern) for pattern in pattern_pool("fixed", count)] == published[:count]


@pytest.mark.parametrize("name", ["masks_4patterns", "masks_12patterns"])
def test_masks_of_the_published_code(name: str) -> None:
    case = CASES[name]
    weight, gradient = closed_form(case)
    scores, expected = importance(weight, gradient), case["expected"]
    kernels = Kernels(case["input"]["kernel_prune_percent"])
    patterns = Patterns(pattern_pool("fixed", case["input"]["num_patterns"]))
    kept, ids = kernels.choose_kernels(scores), patterns.choose_ids(scores)
    assert gone(kept) == expected["pruned_kernels_out_in"]
    assert ids.tolist() == expected["best_pattern"]
    by_kernel, by_pattern = kernels.choose(scores), patterns.choose(scores)
    assert float(complement_lasso(weight, by_pattern)) == pytest.approx(expected["group_lasso_pattern"], abs=1e-9)
    assert float(complement_lasso(weight, by_kernel)) == pytest.approx(expected["group_lasso_kernel"], abs=1e-9)
    pruned = weight * by_pattern * by_kernel
    assert int(pruned.count_nonzero()) == expected["nonzero_after_hard_prune"]
    assert float(pruned.sum()) == pytest.approx(expected["sum_after_hard_prune"], abs=1e-9)


def test_kernels_of_1x1_layers() -> None:
    case = CASES["masks_1x1_kernel_only"]
    kept = Kernels(case["input"]["kernel_prune_percent"]).choose_kernels(importance(*closed_form(case)))
    assert gone(kept) == case["expected"]


@pytest.mark.parametrize("name", ["masks_4patterns", "masks_12patterns"])
def test_magnitude_would_choose_otherwise(name: str) -> None:
    case = CASES[name]
    weight, gradient = closed_form(case)
    percent, count = case["input"]["kernel_prune_percent"], case["input"]["num_patterns"]
    magnitude, taylor = weight.abs(), importance(weight, gradient)
    assert gone(Kernels(percent).choose_kernels(magnitude)) != gone(Kernels(percent).choose_kernels(taylor))
    pool = Patterns(pattern_pool("fixed", count))
    assert not torch.equal(pool.choose_ids(magnitude), pool.choose_ids(taylor))


def test_a_common_factor_of_the_gradients_changes_nothing() -> None:
    weight, gradient = closed_form(CASES["masks_12patterns"])
    one, other = importance(weight, gradient), importance(weight.float(), 65536 * gradient.float())
    assert torch.equal(Kernels(40).choose(one), Kernels(40).choose(other))
    assert torch.equal(Patterns(FIXED_POOL).choose(one), Patterns(FIXED_POOL).choose(other))


def test_kernels_are_ranked_over_the_layer_not_by_filter() -> None:
    scores = torch.ones(2, 4, 3, 3, dtype=torch.float64)
    scores[1] *= 100
    kept = Kernels(50).choose_kernels(scores)
    assert kept.tolist() == [[False] * 4, [True] * 4]


def test_all_patterns_and_nothing_removed_is_the_four_best_of_every_kernel() -> None:
    scores = torch.rand(5, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert len(all_patterns()) == 126
    mask = Patterns(all_patterns()).choose(scores) & Kernels(0).choose(scores)
    best = scores.flatten(2).topk(4, dim=-1).indices
    expected = torch.zeros(5, 3, 9, dtype=torch.bool).scatter_(2, best, True).view_as(mask)
    assert torch.equal(mask, expected)


def test_everything_removed_leaves_nothing() -> None:
    scores = torch.rand(5, 3, 3, 3, dtype=torch.float64)
    assert not Kernels(100).choose(scores).any() and Kernels(0).choose(scores).all()
    assert not Unstructured(100).choose(scores).any() and not Filters(100).choose(scores).any()


def test_equal_patterns_are_decided_for_the_first() -> None:
    assert Patterns(FIXED_POOL).choose_ids(torch.ones(1, 1, 3, 3)).item() == 0
    assert Patterns(FIXED_POOL).choose_ids(torch.zeros(1, 1, 3, 3)).item() == 0


def test_unstructured_and_filters_equal_brute_force() -> None:
    scores = torch.rand(6, 4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = Unstructured(70).choose(scores)
    assert int((~mask).sum()) == removed_count(70, scores.numel())
    assert scores[mask].min() > scores[~mask].max()
    filters = Filters(33).choose(scores).flatten(1)
    sums = scores.flatten(1).sum(1)
    assert [bool(row.all()) for row in filters] == [bool(row.any()) for row in filters]
    assert (~filters[:, 0]).nonzero()[:, 0].tolist() == sorted(sums.argsort()[:2].tolist())


def test_two_of_four_along_the_inputs() -> None:
    scores = torch.rand(3, 8, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mask = NOfM(2, 4).choose(scores)
    for o in range(3):
        for a in range(3):
            for b in range(3):
                for first in (0, 4):
                    group = scores[o, first : first + 4, a, b]
                    kept = mask[o, first : first + 4, a, b]
                    assert int(kept.sum()) == 2 and group[kept].min() > group[~kept].max()
    assert NOfM(2, 4).choose(scores[:, :, 0, 0]).shape == (3, 8)
    with pytest.raises(UserError, match=r"of: got 3; allowed: a divisor of the input channels"):
        NOfM(2, 3).choose(scores)
    with pytest.raises(UserError, match=r"keep: got 5; allowed: 1 to 4"):
        NOfM(5, 4).choose(scores)


def test_the_most_frequent_patterns_make_the_pool() -> None:
    kernels = torch.zeros(1, 6, 9, dtype=torch.float64)
    for n, positions in enumerate([(0, 1, 2, 3)] * 3 + [(4, 5, 7, 8)] * 2 + [(0, 2, 6, 8)]):
        kernels[0, n, list(positions)] = 1.0 + n
    layer = kernels.view(1, 6, 3, 3)
    assert frequent_patterns([layer], 2) == ((0, 1, 2, 3), (4, 5, 7, 8))
    assert pattern_pool("frequent", 9, scores=[layer]) == ((0, 1, 2, 3), (4, 5, 7, 8), (0, 2, 6, 8))
    # As frequent: lexicographic order. Layers of other kernels are passed over.
    assert frequent_patterns([layer[:, 3:], torch.ones(2, 2, 1, 1)], 2) == ((4, 5, 7, 8), (0, 2, 6, 8))
    assert frequent_patterns([layer[:, 4:]], 2) == ((0, 2, 6, 8), (4, 5, 7, 8))
    assert all(4 in pattern for pattern in frequent_patterns([layer], 5, centre=True))
    assert frequent_patterns([layer], 1, centre=True) == ((0, 1, 2, 4),)


def test_natural_patterns_equal_a_literal_count() -> None:
    scores = torch.rand(7, 5, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    counts: dict[tuple[int, ...], int] = {}
    for kernel in scores.view(-1, 9).tolist():
        natural = tuple(sorted(sorted(range(9), key=lambda at: -kernel[at])[:4]))
        counts[natural] = counts.get(natural, 0) + 1
    expected = sorted(counts, key=lambda pattern: (-counts[pattern], pattern))
    assert frequent_patterns([scores], 8) == tuple(expected[:8])


def test_fixed_patterns_that_keep_the_centre() -> None:
    assert pattern_pool("fixed", 8, centre=True) == tuple(p for p in FIXED_POOL if 4 in p)[:8]
    with pytest.raises(UserError, match=r"patterns: got 12; allowed: 1 to 8, the fixed patterns that keep the centre"):
        pattern_pool("fixed", 12, centre=True)
    with pytest.raises(UserError, match=r"allowed: 1 to 12, the fixed patterns\."):
        pattern_pool("fixed", 13)


@pytest.mark.parametrize(
    ("percent", "total", "removed"), [(55, 12, 7), (50, 12, 6), (0, 7, 0), (100, 7, 7), (14.2857, 7, 1), (0.1, 3, 1)]
)
def test_counts_are_rounded_up_exactly(percent: float, total: int, removed: int) -> None:
    assert removed_count(percent, total) == removed


def test_decimal_percentages_do_not_round_up_by_accident() -> None:
    # 1.1 * 1000 / 100 is 11.000000000000002 in binary.
    assert removed_count(1.1, 1000) == 11
    assert kept_weights((4, 3, 3, 3), 55, per_kernel=4) == 20
    assert kept_weights((4, 3, 1, 1), 50) == 6


def test_ranking_over_layers_keeps_the_budget_and_no_layer_dies() -> None:
    generator = torch.Generator().manual_seed(4)
    scores = {
        "weak": 1e-9 * torch.rand(10, 10, 3, 3, generator=generator, dtype=torch.float64),
        "strong": torch.rand(20, 10, 3, 3, generator=generator, dtype=torch.float64),
        "point": torch.rand(10, 20, 1, 1, generator=generator, dtype=torch.float64),
    }
    per_kernel = {"weak": 4, "strong": 4, "point": 1}
    for budget in (1399, 700, 300, 100):
        percents = percents_by_ranking(scores, per_kernel, budget)
        kept = {name: Kernels(percents[name]).choose_kernels(scores[name]) for name in scores}
        total = sum(int(kept[name].sum()) * per_kernel[name] for name in scores)
        assert budget - 4 < total <= budget
        assert all(bool(mask.any()) for mask in kept.values())
    assert percents_by_ranking(scores, per_kernel, 1100)["weak"] >= 75  # the weak layer goes first
    assert percents_by_ranking(scores, per_kernel, 1400) == dict.fromkeys(scores, 0.0)
    with pytest.raises(UserError, match=r"ratio: got 50 weights to keep; allowed: at least 70"):
        percents_by_ranking(scores, per_kernel, 50)


def test_wrong_input_is_named() -> None:
    scores = torch.rand(2, 2, 3, 3, dtype=torch.float64)
    with pytest.raises(UserError, match=r"scores: got NaN or infinite values; allowed: finite importances"):
        Kernels(50).choose(torch.full_like(scores, float("nan")))
    with pytest.raises(UserError, match=r"weight: got kernels of \(1, 1\); allowed: 3x3 kernels"):
        Patterns(FIXED_POOL).choose(scores[:, :, :1, :1])
    with pytest.raises(UserError, match="percent: got 101"):
        Kernels(101).choose(scores)
    with pytest.raises(UserError, match=r"weight: got shape \(2, 2\)"):
        Kernels(50).choose(scores[:, :, 0, 0])
    with pytest.raises(UserError, match="pool: got"):
        Patterns(((3, 1),))
    with pytest.raises(UserError, match="kept: got 0"):
        all_patterns(0)
    with pytest.raises(UserError, match="pool: got 'frequent'; allowed: a network with 3x3 convolutions"):
        frequent_patterns([torch.ones(1, 1, 1, 1)], 4)
    with pytest.raises(UserError, match="patterns: got 0"):
        frequent_patterns([scores], 0)
