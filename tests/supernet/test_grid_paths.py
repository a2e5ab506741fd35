from itertools import product

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.supernet.grid_paths import (
    GridCosts,
    GridPath,
    bottom_up_path,
    cheapest_path,
    dearest_path,
    longest_path,
    priced_path,
    top_down_path,
)


def grid(seed, layers=3, widths=3, operations=2):
    return np.random.default_rng(seed).normal(size=(layers, widths, widths, operations))


def all_paths(weights):
    layers, widths, _, operations = weights.shape
    for passed in product(range(widths), repeat=layers + 1):
        for chosen in product(range(operations), repeat=layers):
            yield GridPath(passed, chosen)


def total(weights, path):
    return GridCosts(weights, np.zeros(weights.shape[1]), np.zeros(weights.shape[1])).of(path)


@pytest.mark.parametrize("seed", range(6))
def test_the_longest_path_is_that_of_all_paths(seed):
    weights = grid(seed)
    best = max(all_paths(weights), key=lambda path: total(weights, path))
    assert longest_path(weights) == best


@pytest.mark.parametrize("seed", range(4))
def test_costs_of_both_ends_count(seed):
    rng = np.random.default_rng(seed)
    costs = GridCosts(grid(seed, layers=2) ** 2, 3 * rng.random(3), 3 * rng.random(3), fixed=7.0)
    by_cost = sorted(all_paths(costs.steps), key=costs.of)
    assert (cheapest_path(costs), dearest_path(costs)) == (by_cost[0], by_cost[-1])
    for price in (0.3, 2.0):
        weights = grid(seed + 10, layers=2)
        unit = price / costs.of(by_cost[-1])
        best = max(all_paths(weights), key=lambda path: total(weights, path) - unit * costs.of(path))
        assert priced_path(weights, costs, price) == best


def test_a_price_leads_from_the_longest_path_to_the_cheapest():
    weights, costs = grid(0), GridCosts(grid(1) ** 2, np.ones(3), np.ones(3))
    assert priced_path(weights, costs, 0) == longest_path(weights)
    assert priced_path(weights, costs, 1e9) == cheapest_path(costs)
    paid = [costs.of(priced_path(weights, costs, price)) for price in (0, 0.5, 1, 2, 4, 8, 1e9)]
    assert paid == sorted(paid, reverse=True)


def test_greedy_paths_take_the_strongest_step_at_hand():
    weights = np.zeros((2, 2, 2, 1))
    weights[0, 0, 0, 0], weights[0, 1, 1, 0] = 0.6, 0.5
    weights[1, 0, 0, 0], weights[1, 1, 1, 0], weights[1, 1, 0, 0] = 0.1, 0.9, 0.2
    assert top_down_path(weights) == GridPath((0, 0, 0), (0, 0))  # 0.6 first, then what is left
    assert bottom_up_path(weights) == GridPath((1, 1, 1), (0, 0))
    assert longest_path(weights) == GridPath((1, 1, 1), (0, 0))


@pytest.mark.parametrize("seed", range(6))
def test_one_layer_leaves_every_rule_the_same_step(seed):
    weights = grid(seed, layers=1)
    assert longest_path(weights) == bottom_up_path(weights) == top_down_path(weights)


@pytest.mark.parametrize("seed", range(6))
def test_a_shift_of_a_layer_changes_no_path(seed):
    """Max-W shifts all weights of a layer alike, so it derives what its softmax does."""
    weights = grid(seed)
    shifted = weights + np.array([0.5, -2.0, 1.0]).reshape(3, 1, 1, 1)
    for rule in (longest_path, bottom_up_path, top_down_path):
        assert rule(shifted) == rule(weights)


def test_wrong_grids_are_refused():
    for bad, text in (
        (np.zeros((2, 3, 2, 1)), r"weights: got shape \(2, 3, 2, 1\); allowed: \(layers, widths, widths, operations\)"),
        (np.full((1, 2, 2, 1), np.nan), "weights: got 'NaN'"),
    ):
        for rule in (longest_path, bottom_up_path, top_down_path):
            with pytest.raises(UserError, match=text):
                rule(bad)
    costs = GridCosts(np.ones((1, 2, 2, 1)), np.ones(2), np.ones(2))
    with pytest.raises(UserError, match="price: got -1"):
        priced_path(np.ones((1, 2, 2, 1)), costs, -1)
    with pytest.raises(UserError, match="allowed: the grid of the costs"):
        priced_path(np.ones((2, 2, 2, 1)), costs, 1)
