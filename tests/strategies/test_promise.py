from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from archsmith.space.hypervolume import hypervolume
from archsmith.strategies.promise import chosen_by_hypervolume


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_the_first_choice_adds_most_by_the_definition(objectives: int) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        measured, candidates = rng.random((12, objectives)) + 0.3, rng.random((40, objectives))
        reference = np.full(objectives, 1.1)
        added = [hypervolume(np.vstack([measured, each]), reference).value for each in candidates]
        assert chosen_by_hypervolume(candidates, measured, reference, 1).tolist() == [int(np.argmax(added))]


def test_a_batch_spreads_because_what_was_chosen_counts() -> None:
    """Two equal candidates at the best place add nothing to each other; greedy finds the best pair here."""
    measured = np.array([[0.9, 0.9]])
    candidates = np.array([[0.2, 0.6], [0.2, 0.6], [0.6, 0.2], [0.85, 0.85]])
    reference = np.ones(2)
    chosen = chosen_by_hypervolume(candidates, measured, reference, 2)
    values = {
        pair: hypervolume(np.vstack([measured, candidates[list(pair)]]), reference).value
        for pair in combinations(range(4), 2)
    }
    assert tuple(sorted(chosen.tolist())) == max(values, key=values.__getitem__)
    assert candidates[chosen[0]].tolist() != candidates[chosen[1]].tolist()


def test_when_nothing_adds_any_the_nearest_to_the_front_follow() -> None:
    measured = np.array([[0.0, 1.0], [1.0, 0.0], [0.4, 0.4]])
    candidates = np.array([[0.9, 0.9], [0.45, 0.41], [0.6, 0.6]])
    chosen = chosen_by_hypervolume(candidates, measured, np.full(2, 1.5), 3)
    assert chosen.tolist() == [1, 2, 0]


def test_no_more_than_there_are() -> None:
    assert chosen_by_hypervolume(np.array([[0.5, 0.5]]), np.array([[1.0, 1.0]]), np.full(2, 2.0), 5).tolist() == [0]
    assert chosen_by_hypervolume(np.empty((0, 2)), np.array([[1.0, 1.0]]), np.full(2, 2.0), 5).tolist() == []
