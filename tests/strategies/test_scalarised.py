"""A strategy for one objective finds the exact optima of constrained and scalarised problems."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from benchmark_tables import real_table

from archsmith.core.errors import UserError
from archsmith.evaluate.tables import TableEvaluator
from archsmith.run.study import JournalStore, recorded_trials, run_study
from archsmith.space import Architecture, Objective, Result, Trial
from archsmith.space.formulations import (
    CostTerm,
    FeasibleFirst,
    Formulation,
    Lagrangian,
    Rejected,
    WeightedProduct,
    at_most,
)
from archsmith.strategies import GridSearch, LocalSearch, Nsga2, RandomSearch, RegularizedEvolution, Strategy
from archsmith.strategies.scalarised import SCORE, Scalarised
from archsmith.testing.strategies import small_space

ACCURACY = Objective("accuracy", reference=0.0)
LIMIT = (at_most("latency", 5.0),)


def result_of(trial: Trial) -> Result:
    """Letters are worth 1, 2, 3 and cost their squares: under a sum of squares of 10 the best sum is 1 + 2 + 2."""
    worth = ["abc".index(str(value)) + 1 for value in trial.architecture.values()]
    return Result(metrics={"accuracy": float(sum(worth))}, costs={"latency": float(sum(w * w for w in worth))})


def searched(strategy: Strategy, n: int) -> list[tuple[Architecture, Result]]:
    found = []
    for _ in range(n):
        if not (trials := strategy.ask()):
            break
        result = result_of(trials[0])
        strategy.tell(trials[0].id, result)
        found.append((trials[0].architecture, result))
    return found


def test_what_the_wrapped_strategy_is_told() -> None:
    strategy = Scalarised(small_space(), formulation=Rejected(objective=ACCURACY, limits=LIMIT), inner=RandomSearch)
    fast = strategy.scored(Result(metrics={"accuracy": 80.0}, costs={"latency": 5.0}, seconds=3.0))
    assert (fast.status, fast.metrics, fast.seconds) == ("ok", {"score": 80.0}, 3.0)
    slow = strategy.scored(Result(metrics={"accuracy": 90.0}, costs={"latency": 6.0}))
    assert (slow.status, slow.reason) == ("infeasible", "the formulation rejects it")
    assert strategy.scored(crashed := Result.failed("crashed")) is crashed
    refused = strategy.scored(Result.infeasible("too large", costs={"latency": 1.0}))
    assert refused.status == "infeasible"
    assert strategy.objectives == (ACCURACY,)
    assert strategy.inner.objectives == (SCORE,)


@pytest.mark.parametrize(
    "problem",
    [
        Rejected(objective=ACCURACY, limits=(at_most("latency", 10.0),)),
        FeasibleFirst(objective=ACCURACY, limits=(at_most("latency", 10.0),)),
    ],
    ids=lambda each: type(each).__name__,
)
@pytest.mark.parametrize("inner", [GridSearch, LocalSearch, partial(RegularizedEvolution, population=6, tournament=3)])
def test_the_constrained_optimum_of_a_small_space(problem: Formulation, inner: object) -> None:
    strategy = Scalarised(small_space(), formulation=problem, inner=inner, seed=1)  # type: ignore[arg-type]
    found = searched(strategy, 150)
    best = max((problem.score(result), result.metrics["accuracy"]) for _, result in found)
    assert best == (5.0, 5.0)  # 1 + 2 + 2; without the limit it would be 9
    if not isinstance(inner, partial):
        assert strategy.done  # both promise no repetition: 27 architectures are soon through


def test_ids_seeds_and_parents_are_the_wrapped_ones() -> None:
    problem = FeasibleFirst(objective=ACCURACY, limits=LIMIT)
    inner = partial(RegularizedEvolution, population=4, tournament=2)
    whole = Scalarised(small_space(), formulation=problem, inner=inner, seed=7)
    bare = inner(small_space(), objectives=(SCORE,), seed=7)
    for _ in range(12):
        (trial,), (plain,) = whole.ask(), bare.ask()
        assert trial == plain
        result = result_of(trial)
        whole.tell(trial.id, result)
        bare.tell(plain.id, Result(metrics={"score": problem.score(result)}))


def test_multipliers_move_with_every_result_and_are_part_of_the_state() -> None:
    problem = Lagrangian(objective=ACCURACY, limits=LIMIT, rate=0.5)

    def made() -> Scalarised:
        return Scalarised(small_space(), formulation=problem, inner=RandomSearch, seed=2)

    strategy, expected = made(), 0.0
    for _, result in searched(strategy, 10):
        expected = max(0.0, expected + 0.5 * (result.costs["latency"] - 5) / 5)
    assert strategy.formulation.state == (pytest.approx(expected),)
    assert expected > 0
    resumed = made()
    resumed.load_state_dict(json.loads(json.dumps(strategy.state_dict())))
    assert resumed.formulation == strategy.formulation
    assert resumed.ask() == strategy.ask()


class Evaluator:
    def evaluate(self, trial: Trial, *, weights: object = None) -> Result:
        return result_of(trial)


def test_a_study_that_was_cut_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """With multipliers that move, in two sessions: replayed from the journal, and from a snapshot of the state."""
    problem = Lagrangian(objective=ACCURACY, limits=LIMIT, rate=0.5)

    def study(folder: Path, budget: int, snapshot_seconds: float) -> list[Trial]:
        inner = partial(RegularizedEvolution, population=4, tournament=2)
        strategy = Scalarised(small_space(), formulation=problem, inner=inner, seed=5)
        store = JournalStore(folder)
        run_study(strategy, Evaluator(), budget=budget, store=store, snapshot_seconds=snapshot_seconds)
        return [trial for trial, _ in recorded_trials(folder)]

    whole = study(tmp_path / "whole", 40, 1e9)
    for name, seconds in (("replayed", 1e9), ("snapshot", 0.0)):
        study(tmp_path / name, 17, seconds)
        journal = tmp_path / name / "journal.jsonl"
        journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))  # without its end
        assert study(tmp_path / name, 40, seconds) == whole


def test_a_strategy_of_other_objectives_is_refused() -> None:
    def stubborn(space: object, *, objectives: object, seed: int) -> Strategy:
        return RandomSearch(space, objectives=(ACCURACY,), seed=seed)  # type: ignore[arg-type]

    with pytest.raises(UserError, match="a fresh strategy with the space and objectives it was given"):
        Scalarised(small_space(), formulation=Rejected(objective=ACCURACY, limits=LIMIT), inner=stubborn)  # type: ignore[arg-type]


def real_search(problem: Formulation, inner: object, *, seed: int, evaluations: int) -> float:
    """Return the best score of a search on the real table."""
    table = real_table("nas-bench-201", "nas-bench-201-latency-help.parquet")
    evaluator = TableEvaluator(table, dataset="cifar100", devices=["pixel3"])
    strategy = Scalarised(table.space, formulation=problem, inner=inner, seed=seed)  # type: ignore[arg-type]
    best = -math.inf
    for _ in range(evaluations):
        (trial,) = strategy.ask()
        result = evaluator.evaluate(trial)
        strategy.tell(trial.id, result)
        best = max(best, problem.score(result))
    return best


TEST_ACCURACY = Objective("test_accuracy", reference=0.0)
PROBLEMS: dict[str, Formulation] = {
    "limit": FeasibleFirst(objective=TEST_ACCURACY, limits=(at_most("latency", 10.0),)),
    "product": WeightedProduct(objective=TEST_ACCURACY, costs=(CostTerm(cost="latency", target=10.0, weight=-0.07),)),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_evolution_comes_near_the_exact_optimum_of_the_real_table_and_beats_random(name: str) -> None:
    """500 of 15,625 evaluations, eight seeds, against the exact optimum over all rows."""
    problem = PROBLEMS[name]
    table = real_table("nas-bench-201", "nas-bench-201-latency-help.parquet")
    columns = {
        "test_accuracy": table.values("test_accuracy", dataset="cifar100"),
        "latency": table.values("latency_pixel3", dataset="cifar100"),
    }
    exact = float(np.max(problem.scores(columns)))
    evolution = partial(RegularizedEvolution, population=30, tournament=10)
    ours = [real_search(problem, evolution, seed=seed, evaluations=500) for seed in range(8)]
    random = [real_search(problem, RandomSearch, seed=seed, evaluations=500) for seed in range(8)]
    print(f"{name}: exact {exact:.3f}, evolution {np.mean(ours):.3f} ({min(ours):.3f} to {max(ours):.3f}), "
          f"random {np.mean(random):.3f} ({min(random):.3f} to {max(random):.3f})")  # fmt: skip
    assert max(ours + random) <= exact + 1e-9
    error = math.sqrt((np.var(ours, ddof=1) + np.var(random, ddof=1)) / 8)
    assert np.mean(ours) - np.mean(random) > 2 * error
    assert np.mean(ours) > 0.99 * exact


def test_nsga_needs_no_wrapper() -> None:
    """It takes several objectives itself; wrapped, it is told one."""
    problem = FeasibleFirst(objective=ACCURACY, limits=(at_most("latency", 10.0),))
    pytest.importorskip("pymoo")
    found = searched(Scalarised(small_space(), formulation=problem, inner=partial(Nsga2, population=6), seed=3), 120)
    assert max(problem.score(result) for _, result in found) == 5.0
