from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.families.cell_spaces import nas_bench_201_space
from archsmith.space import Categorical, Objective, ProductSpace, Result
from archsmith.strategies import MutateWithin, RegularizedEvolution

NB201_MUTATION = MutateWithin([[f"edge/{source}-{target}" for source in range(target)] for target in (1, 2, 3)])


def test_the_nb201_mutation_draws_target_then_source_then_operation() -> None:
    space = nas_bench_201_space()
    rng = np.random.default_rng(0)
    cell = space.sample(rng)
    n = 6_000
    edges, operations = Counter[str](), Counter[str]()
    for _ in range(n):
        child = NB201_MUTATION(space, cell, rng)
        changed = [path for path in cell if child[path] != cell[path]]
        assert len(changed) == 1
        edges[changed[0]] += 1
        if changed[0] == "edge/0-1":
            operations[str(child["edge/0-1"])] += 1
    for path in cell:
        share = 1 / 3 / int(path[-1])  # a third for each target, then one of its sources
        assert abs(edges[path] - n * share) < 4 * np.sqrt(n * share * (1 - share)), path
    total = edges["edge/0-1"]
    assert len(operations) == 4
    assert all(abs(count - total / 4) < 4 * np.sqrt(total * 3 / 16) for count in operations.values())


def test_the_oldest_dies_however_good_it_is() -> None:
    search = RegularizedEvolution(nas_bench_201_space(), population=4, tournament=2)
    for i in range(7):
        (trial,) = search.ask()
        search.tell(trial.id, Result(metrics={"valid_accuracy": 100.0 - i}))
        assert [member.trial for member in search.members] == list(range(max(1, i - 2), i + 2))


def test_the_worst_dies_without_ageing() -> None:
    search = RegularizedEvolution(nas_bench_201_space(), population=3, tournament=2, drop="worst")
    for value in (5.0, 1.0, 3.0, 4.0, 2.0):
        (trial,) = search.ask()
        search.tell(trial.id, Result(metrics={"valid_accuracy": value}))
    assert sorted(-member.loss for member in search.members) == [3.0, 4.0, 5.0]


def test_a_tournament_of_all_without_replacement_breeds_the_best() -> None:
    search = RegularizedEvolution(nas_bench_201_space(), population=5, tournament=5, replacement=False)
    for value in (1.0, 2.0, 9.0, 3.0, 4.0):
        (trial,) = search.ask()
        search.tell(trial.id, Result(metrics={"valid_accuracy": value}))
    best = search.members[2].architecture
    for trial in search.ask(20):
        assert trial.parent == 3
        assert sum(trial.architecture[path] != best[path] for path in best) == 1


def test_a_tournament_with_replacement_picks_by_rank() -> None:
    # The best of 3 draws with replacement from 10 has rank r with probability ((11-r)^3 - (10-r)^3) / 1000.
    search = RegularizedEvolution(nas_bench_201_space(), population=10, tournament=3)
    for i in range(10):
        (trial,) = search.ask()
        search.tell(trial.id, Result(metrics={"valid_accuracy": float(10 - i)}))
    n = 4_000
    parents = Counter(trial.parent for trial in search.ask(n))
    for rank in range(1, 11):
        share = ((11 - rank) ** 3 - (10 - rank) ** 3) / 1_000
        assert abs(parents[rank] - n * share) < 4 * np.sqrt(n * share * (1 - share)), rank


def test_a_minimised_objective_breeds_the_smallest() -> None:
    search = RegularizedEvolution(
        nas_bench_201_space(),
        objectives=[Objective("loss", "minimize")],
        population=3,
        tournament=3,
        replacement=False,
    )
    for value in (2.0, 0.5, 1.0):
        (trial,) = search.ask()
        search.tell(trial.id, Result(metrics={"loss": value}))
    assert {trial.parent for trial in search.ask(9)} == {2}


def test_failures_are_never_born() -> None:
    search = RegularizedEvolution(nas_bench_201_space(), population=3, tournament=1)
    for i in range(5):
        (trial,) = search.ask()
        assert trial.parent is None  # still random: two of these five fail, so three are born
        search.tell(trial.id, Result.failed("crashed") if i % 2 else Result(metrics={"valid_accuracy": 1.0}))
    assert search.ask()[0].parent in (1, 3, 5)


def test_bad_settings_are_named() -> None:
    space = ProductSpace("toy", {"a": Categorical([1, 2])})
    with pytest.raises(UserError, match="population: got 0"):
        RegularizedEvolution(space, population=0)
    with pytest.raises(UserError, match="at most the population, 2"):
        RegularizedEvolution(space, population=2, tournament=3, replacement=False)
    with pytest.raises(UserError, match="'oldest' or 'worst'"):
        RegularizedEvolution(space, drop="best")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="1 to 1 for RegularizedEvolution"):
        RegularizedEvolution(space, objectives=[Objective("a"), Objective("b")])
    with pytest.raises(UserError, match="paths of the architecture"):
        MutateWithin([["nowhere"]])(space, space.sample(np.random.default_rng(0)), np.random.default_rng(0))
