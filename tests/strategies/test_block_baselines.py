"""Greedy, largest, random and uniform selections keep the limits that the exact one keeps, and never beat it."""

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.strategies.block_baselines import greedy, largest, random_within, uniform
from archsmith.strategies.milp import solve


def blocks(seed, groups=6, alternatives=5):
    """Scores that fall with the cost, as divergences do: alternative 0 is the parent with score 0."""
    rng = np.random.default_rng(seed)
    size = np.sort(rng.random((groups, alternatives)), axis=1)[:, ::-1]
    score = (1 - size / size[:, :1]) * rng.lognormal(0, 1, (groups, 1))
    return score.tolist(), {"a": size.tolist(), "b": (size * rng.uniform(0.8, 1.2, size.shape)).tolist()}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.9, 0.6])
def test_the_exact_selection_is_at_least_as_good_as_every_other(seed, share):
    scores, costs = blocks(seed)
    limits = {
        name: share * sum(row[0] for row in table) + (1 - share) * sum(min(row) for row in table)
        for name, table in costs.items()
    }
    exact = solve(scores, costs, limits)
    others = [
        largest(costs["a"], scores, costs, limits),
        random_within(scores, costs, limits, np.random.default_rng(seed)),
    ]
    for search in (greedy, uniform):
        try:
            others.append(search(scores, costs, limits))
        except UserError as error:  # both may find nothing where there is something
            assert "limits" in str(error)
    for other in others:
        assert exact.score <= other.score + 1e-9
        assert all(other.totals[name] <= limits[name] * (1 + 1e-9) for name in limits)
        assert not other.optimal


def test_greedy_spends_equal_shares_and_passes_on_what_is_left():
    # Shares of 3 each. Group 1 has the smaller mean score: it goes first, takes its parent (2) and leaves 1.
    scores = [[0.0, 8.0], [0.0, 1.0]]
    costs = {"a": [[4.0, 1.0], [2.0, 1.0]]}
    assert greedy(scores, costs, {"a": 6}).choice == (0, 0)
    assert greedy(scores, costs, {"a": 5}).choice == (1, 0)  # shares of 2.5: 0.5 left do not make 4
    assert solve(scores, costs, {"a": 5}).choice == (0, 1)  # the better use of the same 5
    assert greedy([[1.0, 0.2]], {"a": [[1.0, 1.0]]}, {"a": 1}, maximize=True).choice == (0,)


def test_greedy_says_that_it_found_nothing():
    with pytest.raises(UserError, match="a greedy selection within the limits"):
        greedy([[0.0], [0.0, 1.0]], {"a": [[9.0], [3.0, 2.9]]}, {"a": 11})


def test_the_largest_ignores_scores():
    scores, costs = [[0.0, 5.0], [0.0, 0.1]], {"a": [[3.0, 2.0], [3.0, 1.0]]}
    assert largest(costs["a"], scores, costs, {"a": 5}).choice == (1, 0)
    assert solve(scores, costs, {"a": 5}).choice == (0, 1)


def test_random_selections_differ_fill_the_limit_and_repeat_with_their_seed():
    scores, costs = blocks(3, groups=12)
    limit = 0.5 * sum(row[0] for row in costs["a"]) + 0.5 * sum(min(row) for row in costs["a"])
    drawn = [random_within(scores, costs, {"a": limit}, np.random.default_rng(seed)) for seed in range(20)]
    assert len({each.choice for each in drawn}) > 15
    assert all(0.9 * limit <= each.totals["a"] <= limit for each in drawn)
    assert random_within(scores, costs, {"a": limit}, np.random.default_rng(7)) == drawn[7]


def test_uniform_takes_one_alternative_everywhere():
    scores, costs = [[0.0, 1.0, 9.0]] * 3, {"a": [[3.0, 2.0, 1.0]] * 3}
    assert uniform(scores, costs, {"a": 7}).choice == (1, 1, 1)
    with pytest.raises(UserError, match="one alternative keeps in every group"):
        uniform(scores, costs, {"a": 2})
    with pytest.raises(UserError, match="the same alternatives"):
        uniform([[0.0], [0.0, 1.0]], {}, {})


def test_the_largest_of_a_subset_sum_is_nearly_the_largest_and_nothing_is_printed(capfd):
    scores, costs = blocks(9, 8, 6)
    limits = {
        name: 0.6 * sum(row[0] for row in table) + 0.4 * sum(min(row) for row in table) for name, table in costs.items()
    }
    found = largest(costs["a"], scores, costs, limits)
    assert not found.optimal
    assert capfd.readouterr().out == ""
    assert all(found.totals[name] <= limits[name] for name in limits)
    bound = solve(costs["a"], costs, limits, maximize=True, gap=1e-4).bound
    assert found.totals["a"] >= bound * (1 - 1.01e-4)


def test_the_stray_lines_of_the_solver_do_not_reach_standard_output(capfd):
    _, costs = blocks(10, 9, 6)  # HiGHS prints "HighsMipSolverData::transformNew..." here
    limits = {
        name: 0.6 * sum(row[0] for row in table) + 0.4 * sum(min(row) for row in table) for name, table in costs.items()
    }
    solve(costs["a"], costs, limits, maximize=True, gap=1e-5)
    assert capfd.readouterr().out == ""
