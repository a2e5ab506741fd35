"""The shipped contract of a strategy, attached to every strategy on spaces of every kind."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

import archsmith.strategies as room
from archsmith.families.cell_spaces import nas_bench_201_space
from archsmith.space import Categorical, Count, Given, Group, Ordinal, Predicate, ProductSpace, Repeat, Space, When
from archsmith.space.module_space import ModuleSpace
from archsmith.space.modules import (
    Affine,
    Concat,
    Conv2D,
    Dropout,
    MaxPooling2D,
    MaybeSwap,
    Optional,
    ReLU,
    Tanh,
)
from archsmith.space.modules import (
    Repeat as Again,
)
from archsmith.strategies import MonteCarloTreeSearch, RandomSearch, Strategy, SurrogateSearch
from archsmith.testing.strategies import Make, StrategyContract


def deep() -> ProductSpace:
    layer = Group(
        {
            "op": Categorical(["conv", "pool"]),
            "kernel": Given(When("op", "conv"), Ordinal([3, 5])),
            "width": Count(1, 4),
        }
    )
    odd = Predicate("an odd first width", lambda layers: layers["layers/0/width"] % 2 == 1)
    return ProductSpace("deep", {"layers": Repeat(Count(1, 3), layer)}, constraints=[odd])


def language() -> ModuleSpace:
    conv = Conv2D([8, 16], [3, 9], paddings=["SAME", "VALID"])
    body = Again(Concat([conv, MaybeSwap(ReLU(), MaxPooling2D([2], [2]))]), [1, 2])
    return ModuleSpace("language", Concat([body, Optional(Dropout([0.5, 0.9])), Tanh(), Affine([10])]), (3, 12, 12))


SPACES: dict[str, Callable[[], Space]] = {"flat": nas_bench_201_space, "deep": deep, "language": language}
STRATEGIES: dict[str, Callable[[Space, int], Strategy]] = {
    "random": lambda space, seed: RandomSearch(space, seed=seed),
    "mcts": lambda space, seed: MonteCarloTreeSearch(space, seed=seed),
    "mcts bisected": lambda space, seed: MonteCarloTreeSearch(space, bisect=True, enter_child=True, seed=seed),
    "smbo": lambda space, seed: SurrogateSearch(space, candidates=5, threshold=1, seed=seed),
}


def test_every_strategy_is_attached() -> None:
    exported = {getattr(room, name) for name in room.__all__}
    classes = {
        each for each in exported if inspect.isclass(each) and issubclass(each, Strategy) and each is not Strategy
    }
    assert classes == {type(make(nas_bench_201_space(), 0)) for make in STRATEGIES.values()}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("strategy", STRATEGIES)
class TestStrategies(StrategyContract):
    @pytest.fixture
    def make(self, strategy: str, space: str) -> Make:
        found = SPACES[space]()
        return lambda seed: STRATEGIES[strategy](found, seed)
