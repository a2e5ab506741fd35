from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.space import Categorical, Objective, ProductSpace, Real, Result
from archsmith.strategies import MonteCarloTreeSearch, RandomSearch, Strategy
from archsmith.strategies.mcts import Node

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "deeparchitect.json").read_text())["cases"]


def table_space(rewards: Any) -> ProductSpace:
    shape = np.shape(rewards)
    return ProductSpace("table", {f"d{i}": Categorical(range(n)) for i, n in enumerate(shape)})


def searched(rewards: Any, iterations: int, **settings: Any) -> tuple[MonteCarloTreeSearch, list[list[int]]]:
    search = MonteCarloTreeSearch(table_space(rewards), ties="first", rollout="first", **settings)
    leaves = []
    for _ in range(iterations):
        (trial,) = search.ask()
        at = [int(value) for value in trial.architecture.values()]  # type: ignore[arg-type]
        leaves.append(at)
        search.tell(trial.id, Result(metrics={"valid_accuracy": float(np.asarray(rewards)[tuple(at)])}))
    return search, leaves


def visits(node: Node) -> Any:
    """Return ``[visits, [children]]``, or the visits of a node whose children were never visited."""
    if not node.children or not any(child.visits for child in node.children):
        return node.visits
    return [node.visits, [visits(child) for child in node.children]]


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("UCT visit counts, 4-armed")])
def test_arms(name: str) -> None:
    case = GOLDEN[name]["input"]
    search, _ = searched(case["rewards"], case["iterations"], exploration=case["exploration_bonus"])
    assert visits(search.root) == GOLDEN[name]["expected"]
    random = MonteCarloTreeSearch(table_space(case["rewards"]), exploration=case["exploration_bonus"], seed=1)
    for _ in range(case["iterations"]):
        (trial,) = random.ask()
        random.tell(trial.id, Result(metrics={"valid_accuracy": case["rewards"][trial.architecture["d0"]]}))
    assert visits(random.root)[1] == GOLDEN[name]["expected"][1]  # ties do not matter here


@pytest.mark.parametrize("depth", [2, 3])
def test_trees(depth: int) -> None:
    name = next(name for name in GOLDEN if name.startswith(f"UCT visit counts, depth {depth}"))
    case, expected = GOLDEN[name]["input"], GOLDEN[name]["expected"]
    search, leaves = searched(case["reward_table"], case["iterations"], exploration=case["exploration_bonus"])
    assert visits(search.root) == expected["tree"]
    if "first_12_leaf_choices" in expected:
        assert leaves[:12] == expected["first_12_leaf_choices"]


@pytest.mark.parametrize("bisect", [True, False])
def test_bisection_shares_statistics(bisect: bool) -> None:
    start = "UCT on a bisected 8-way" if bisect else "UCT on the same flat 8-way"
    name = next(name for name in GOLDEN if name.startswith(start))
    case = GOLDEN[name]["input"]
    search, _ = searched(case["rewards"], case["iterations"], exploration=case["exploration_bonus"], bisect=bisect)
    assert visits(search.root) == GOLDEN[name]["expected"]["tree"]


def test_children_of_the_root_have_one_visit_less_or_none() -> None:
    rewards = np.random.default_rng(0).random((3, 3))
    for enter, total in ((False, 29), (True, 30)):
        search, _ = searched(rewards, 30, enter_child=enter)
        assert search.root.visits == 30
        assert sum(child.visits for child in search.root.children or []) == total


def test_pending_trials_count_as_visits_without_reward() -> None:
    search = MonteCarloTreeSearch(table_space([0.5] * 4), ties="first", rollout="first")
    for trial in search.ask(1):
        search.tell(trial.id, Result(metrics={"valid_accuracy": 0.5}))
    batch = search.ask(4)
    assert sorted(trial.architecture["d0"] for trial in batch) == [0, 1, 2, 3]  # type: ignore[type-var]
    assert [child.waiting for child in search.root.children or []] == [1, 1, 1, 1]


def mean_reward(strategy: Strategy, target: np.ndarray, noise: np.random.Generator) -> float:
    total = 0.0
    for _ in range(64):
        (trial,) = strategy.ask()
        v = [int(value) for value in trial.architecture.values()]  # type: ignore[arg-type]
        reward = 0.9 - 0.05 * abs(v[0] - target[0]) - 0.04 * abs(v[1] - target[1]) - 0.01 * (v[2] != 1)
        reward += -0.01 * (v[3] != 2) + 0.01 * noise.standard_normal()
        total += reward
        strategy.tell(trial.id, Result(metrics={"valid_accuracy": reward}))
    return total / 64


def test_tree_search_beats_chance_and_bisection_beats_it() -> None:
    space = ProductSpace("four", {f"d{i}": Categorical(range(n)) for i, n in enumerate((8, 8, 3, 3))})
    tree = bisected = 0
    for seed in range(20):
        target = np.random.default_rng(1_000 + seed).integers(8, size=2)
        found = [
            mean_reward(strategy, target, np.random.default_rng(2_000 + seed))
            for strategy in (
                RandomSearch(space, seed=seed),
                MonteCarloTreeSearch(space, seed=seed),
                MonteCarloTreeSearch(space, bisect=True, seed=seed),
            )
        ]
        tree += found[1] > found[0]
        bisected += found[2] > found[1]
    assert tree >= 16 and bisected >= 16, (tree, bisected)


def test_units_directions_and_failures() -> None:
    space = table_space([0.0, 0.0])
    percent = MonteCarloTreeSearch(space, reward_range=(0, 100))
    assert percent.reward(Result(metrics={"valid_accuracy": 93.0})) == pytest.approx(0.93)
    least = MonteCarloTreeSearch(space, objectives=[Objective("loss", "minimize")], reward_range=(0, 4))
    assert least.reward(Result(metrics={"loss": 1.0})) == pytest.approx(0.75)
    assert percent.reward(Result.failed("crash")) == 0.0
    with pytest.raises(UserError, match="reward_range: got"):
        MonteCarloTreeSearch(space, reward_range=(1, 1))
    with pytest.raises(UserError, match=r"exploration: got -1"):
        MonteCarloTreeSearch(space, exploration=-1)
    with pytest.raises(UserError, match=r"rollout: got 'last'"):
        MonteCarloTreeSearch(space, rollout="last")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"space: got 'lr'; allowed: decisions with finitely many options"):
        MonteCarloTreeSearch(ProductSpace("real", {"lr": Real(0.0, 1.0)})).ask()
    with pytest.raises(UserError, match="1 to 1 for MonteCarloTreeSearch"):
        MonteCarloTreeSearch(space, objectives=[Objective("a"), Objective("b")])
