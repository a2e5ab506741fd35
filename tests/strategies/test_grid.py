from __future__ import annotations

import json

import pytest

from archsmith.core.errors import UserError
from archsmith.space import Categorical, ProductSpace, Space
from archsmith.strategies import GridSearch
from archsmith.testing.strategies import ChainSpace, deep_space, recipe_space, rising_space, small_space

DEEP = pytest.param(deep_space(), marks=pytest.mark.slow)


@pytest.mark.parametrize("space", [small_space(), DEEP, rising_space(), ChainSpace()], ids=lambda s: s.name)
def test_a_grid_is_the_enumeration_also_when_resumed_anywhere(space: Space) -> None:
    everything = list(space.enumerate())
    assert len(everything) == space.size
    search = GridSearch(space)
    found = []
    while not search.done:
        state = json.loads(json.dumps(search.state_dict()))
        search = GridSearch(space)
        search.load_state_dict(state)
        found += [trial.architecture for trial in search.ask(7)]
    assert found == everything
    assert search.ask(3) == []


@pytest.mark.parametrize("space", [DEEP, rising_space(), ChainSpace()], ids=lambda s: s.name)
def test_enumeration_goes_on_behind_any_architecture(space: Space) -> None:
    everything = list(space.enumerate())
    for i in range(0, len(everything), 5):
        assert list(space.enumerate(after=everything[i])) == everything[i + 1 :]
    assert list(space.enumerate(after=everything[-1])) == []


def test_a_grid_is_lazy() -> None:
    space = ProductSpace("huge", {f"x{i}": Categorical(range(10)) for i in range(100)})
    assert len(GridSearch(space).ask(5)) == 5


def test_an_infinite_space_has_no_grid() -> None:
    with pytest.raises(UserError, match="use RandomSearch instead"):
        GridSearch(recipe_space())
