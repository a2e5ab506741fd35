from __future__ import annotations

import subprocess
import sys

import pytest

from archsmith.core.errors import UserError
from archsmith.strategies import RandomSearch, open_strategy, strategy_table
from archsmith.testing.strategies import flat_space, small_space


def test_the_table_is_sorted_and_complete() -> None:
    rows = strategy_table()
    names = [row["name"] for row in rows]
    assert names == sorted(names)
    assert {"random", "regularized-evolution", "reinforce"} <= set(names)
    assert all(row["title"] and "paper" in row and row["file"].startswith("archsmith/strategies/") for row in rows)


def test_opening_by_name() -> None:
    strategy = open_strategy("regularized-evolution", flat_space(), seed=3, population=7, tournament=2)
    assert (strategy.seed, strategy.population) == (3, 7)  # type: ignore[attr-defined]


def test_errors_of_opening() -> None:
    with pytest.raises(UserError, match="strategy: got 'randon'; allowed: one of"):
        open_strategy("randon", flat_space())
    with pytest.raises(UserError, match=r"settings of 'random': got \['populaton'\]; allowed: \['objectives', 'seed'"):
        open_strategy("random", flat_space(), populaton=3)


def test_strategies_import_no_torch_and_no_optional_package() -> None:
    code = (
        "import sys, archsmith.strategies\n"
        "heavy = {'torch', 'optuna', 'pymoo', 'sklearn', 'scipy', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unique_random_search_goes_through_a_finite_space() -> None:
    search = RandomSearch(small_space(), unique=True)
    trials = search.ask(100)
    assert len({trial.architecture for trial in trials}) == len(trials) == 27
    assert search.done
    assert search.ask() == []


def test_plain_random_search_keeps_nothing() -> None:
    search = RandomSearch(small_space())
    search.ask(100)
    assert not search.seen
    assert not search.done
