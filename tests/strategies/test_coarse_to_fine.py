"""Coarse-to-fine selection: the grid, the mutations, and the best of every budget."""

from __future__ import annotations

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.space import AtMost, Budget, Categorical, Count, Ordinal, ProductSpace, Real, Result
from archsmith.strategies import CoarseToFine, coarse_grid
from archsmith.strategies.coarse_to_fine import mutate_each

ACCURACY = "valid_accuracy"


def staged(stages=3):
    """Return a space of stages with a width and a kernel each, whose groups tie them."""
    elements = {}
    for stage in range(stages):
        elements[f"mb{stage}/width"] = Ordinal((8, 16, 24), group="width")
        elements[f"mb{stage}/kernel"] = Ordinal((3, 5), group="kernel")
    return ProductSpace("staged", elements)


def width_of(architecture):
    return sum(value for path, value in architecture.items() if path.endswith("width"))


def costs(architecture):
    return {"macs": width_of(architecture)}


def tell_all(strategy, trials, score):
    for trial in trials:
        strategy.tell(trial.id, Result(metrics={ACCURACY: score(trial.architecture)}, costs=costs(trial.architecture)))


def test_the_grid_ties_the_choices_of_a_group():
    grid = coarse_grid(staged(), {"width": 3, "kernel": 2})
    assert [tuple(skeleton.values()) for skeleton in grid] == [(w, k) * 3 for w in (8, 16, 24) for k in (3, 5)]
    assert [tuple(skeleton.values()) for skeleton in coarse_grid(staged(), 1)] == [(16, 3) * 3]


def test_the_grid_follows_conditions_masks_and_real_numbers():
    widths = {f"w{i}": Count(1, 4, group="w") for i in range(3)}
    space = ProductSpace("masked", widths, constraints=[AtMost(list(widths), 6)])
    assert [tuple(skeleton.values()) for skeleton in coarse_grid(space)] == [(1, 1, 1), (4, 1, 1)]
    real = ProductSpace("real", {"lr": Real(0.01, 1.0, log=True)})
    assert [skeleton["lr"] for skeleton in coarse_grid(real, 3)] == pytest.approx([0.01, 0.1, 1.0])


def test_a_mutation_changes_each_decision_with_the_given_probability():
    space, rng = staged(10), np.random.default_rng(0)
    parent = coarse_grid(space, 1)[0]
    changes = [
        sum(parent[path] != value for path, value in mutate_each(space, parent, 0.3, rng).items()) for _ in range(500)
    ]
    assert min(changes) >= 1
    assert abs(np.mean(changes) - 20 * 0.3) < 4 * np.sqrt(20 * 0.3 * 0.7 / 500) + 0.01


def test_only_what_keeps_a_budget_is_evaluated():
    limits = [Budget.parse("macs<=32"), Budget.parse("macs<=48")]
    strategy = CoarseToFine(staged(), limits=limits, costs=costs, levels=3, mutations=20)
    coarse = strategy.ask(100)
    assert {width_of(trial.architecture) for trial in coarse} == {24, 48}
    assert strategy.phase == "coarse"
    assert strategy.ask() == []  # it waits for the grid
    tell_all(strategy, coarse, width_of)
    assert strategy.phase == "fine"
    asked = []
    while trials := strategy.ask():
        asked += trials
        tell_all(strategy, trials, width_of)
    assert strategy.done
    assert len(asked) == 20
    assert {trial.info["budget"] for trial in asked} == {0, 1}
    for trial in asked:
        assert width_of(trial.architecture) <= (32, 48)[trial.info["budget"]]


def test_the_best_of_each_budget_improves_step_by_step():
    """On a landscape with one summit both budgets reach theirs: as wide as allowed, kernels of 5."""
    limits = [Budget.parse("macs<=40"), Budget.parse("macs<=64")]

    def score(architecture):
        return width_of(architecture) + sum(value == 5 for value in architecture.values()) / 10

    strategy = CoarseToFine(staged(), limits=limits, costs=costs, mutation_probability=0.2, mutations=150)
    losses = []
    while trials := strategy.ask(4):
        tell_all(strategy, trials, score)
        losses.append([np.inf if best is None else best.loss for best in strategy.best])
        for trial in trials:
            if trial.parent is not None:
                assert trial.info["phase"] == "fine"
    assert all((after <= before).all() for before, after in zip(map(np.array, losses), losses[1:], strict=False))
    assert [best.loss for best in strategy.best] == pytest.approx([-40.3, -64.3])


def test_without_costs_the_results_decide():
    strategy = CoarseToFine(staged(), limits=[Budget.parse("macs<=40")], levels=3)
    coarse = strategy.ask(100)
    assert len(coarse) == 6
    tell_all(strategy, coarse, width_of)
    assert width_of(strategy.best[0].architecture) == 24


def test_failures_never_win():
    strategy = CoarseToFine(staged(), levels=2, mutations=5)
    for trial in strategy.ask(100):
        strategy.tell(trial.id, Result.failed("crashed"))
    assert strategy.best == [None]
    assert len(strategy.ask(10)) == 5  # there is no skeleton to mutate: anywhere


def test_a_space_that_is_through_ends_the_search():
    space = ProductSpace("pair", {"a": Categorical(("x", "y")), "b": Categorical(("x", "y"))})
    strategy = CoarseToFine(space)
    asked = []
    while trials := strategy.ask():
        asked += trials
        for trial in trials:
            strategy.tell(trial.id, Result(metrics={ACCURACY: 1.0}))
    assert len({trial.architecture.digest for trial in asked}) == len(asked) == 4
    assert strategy.done


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limits": [Budget.parse("macs<=0.5x")]}, r"limits: got 'macs<=0\.5x'; allowed: absolute limits"),
        ({"mutation_probability": 0}, r"mutation_probability: got 0; allowed: a number above 0, at most 1"),
        ({"mutations": -1}, r"mutations: got -1; allowed: an integer from 0, or None"),
        ({"levels": 0}, r"levels: got 0; allowed: integers from 1"),
        (
            {"limits": [Budget.parse("macs<=1")], "costs": costs},
            r"allowed: a budget that some architecture of the coarse grid keeps",
        ),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        CoarseToFine(staged(), **settings)
