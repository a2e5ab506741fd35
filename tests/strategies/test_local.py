from __future__ import annotations

import pytest

from archsmith.core.errors import UserError
from archsmith.space import Count, ProductSpace, Result, Trial
from archsmith.strategies import LocalSearch
from archsmith.testing.strategies import flat_space, toy_score


def line(n: int) -> ProductSpace:
    return ProductSpace("line", {"x": Count(0, n)})


def climbed(search: LocalSearch, heights: list[float], steps: int) -> list[int]:
    """Return the positions in the order in which they are evaluated."""
    visited = []
    for _ in range(steps):
        for trial in search.ask():
            x = int(trial.architecture["x"])  # type: ignore[call-overload]
            visited.append(x)
            search.tell(trial.id, Result(metrics={"valid_accuracy": heights[x]}))
    return visited


def test_a_hill_is_climbed_step_by_step() -> None:
    heights = [float(x) for x in range(30)]
    visited = climbed(LocalSearch(line(29), seed=1), heights, 80)
    start = visited[0]
    # Each step looks at what is not known yet beside the current position: first both sides, then the next above.
    assert set(visited[1:3]) == {start - 1, start + 1}
    assert visited[3 : 3 + 28 - start] == list(range(start + 2, 30))


def test_each_summit_is_left_for_a_new_start_until_the_space_is_through() -> None:
    heights = [0.0, 5.0, 0.0, 1.0, 9.0, 1.0, 0.0]
    search = LocalSearch(line(6), seed=0)
    visited = climbed(search, heights, 20)
    assert sorted(visited) == list(range(7))
    assert search.done


def neighbours_before_the_first_move(improvement: str) -> tuple[int, float]:
    space = flat_space()
    search = LocalSearch(space, seed=2, improvement=improvement)  # type: ignore[arg-type]
    (start,) = search.ask()
    search.tell(start.id, Result(metrics={"valid_accuracy": toy_score(space, start.architecture)}))
    asked: list[Trial] = []
    while True:
        (trial,) = search.ask()
        if trial.parent != start.id:
            moved = next(t for t in asked if t.id == trial.parent)
            return len(asked), toy_score(space, moved.architecture) - toy_score(space, start.architecture)
        asked.append(trial)
        search.tell(trial.id, Result(metrics={"valid_accuracy": toy_score(space, trial.architecture)}))


def test_best_improvement_looks_at_all_neighbours_and_first_does_not() -> None:
    assert neighbours_before_the_first_move("best") == (8 * 4, 12.5)
    looked, gain = neighbours_before_the_first_move("first")
    assert looked < 32
    assert gain == 12.5


def test_the_climb_starts_from_the_best_of_the_starts() -> None:
    search = LocalSearch(line(99), seed=0, starts=10)
    heights = [float(x) for x in range(100)]
    visited = climbed(search, heights, 12)
    assert {abs(x - max(visited[:10])) for x in visited[10:12]} <= {1, 2}


def test_failed_neighbours_are_not_climbed_to() -> None:
    search = LocalSearch(line(2), seed=0)
    (start,) = search.ask()
    search.tell(start.id, Result(metrics={"valid_accuracy": 1.0}))
    for _ in range(4):
        for trial in search.ask():
            assert trial.parent in (None, start.id)
            search.tell(trial.id, Result.failed("crashed"))


def test_bad_settings_are_named() -> None:
    with pytest.raises(UserError, match="'best' or 'first'"):
        LocalSearch(line(3), improvement="any")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="starts: got 0"):
        LocalSearch(line(3), starts=0)
