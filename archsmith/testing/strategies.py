"""The contract of a strategy: inherit ``StrategyContract`` in a test file and override the fixture ``make``.

Every law is checked on the spaces that the test file gives, with a known landscape as evaluator.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Result, Trial
from archsmith.strategies import Strategy

TRIALS = 40

Make = Callable[[int], Strategy]
"""Returns a fresh strategy for a seed."""


def landscape(architecture: Architecture) -> float:
    """Return a value in [0, 1) that depends on the decisions alone."""
    return int(architecture.digest[:8], 16) / 2**32


def evaluated(trial: Trial) -> Result:
    """Return the result of a trial on the landscape; every ninth trial fails."""
    if trial.id % 9 == 0:
        return Result.failed("the landscape has a hole here")
    return Result(metrics={"valid_accuracy": landscape(trial.architecture)})


def advance(strategy: Strategy, trials: int) -> list[Trial]:
    """Ask and tell one trial after the other."""
    asked: list[Trial] = []
    for _ in range(trials):
        for trial in strategy.ask():
            asked.append(trial)
            strategy.tell(trial.id, evaluated(trial))
    return asked


class StrategyContract:
    """Laws of ``archsmith.strategies.Strategy``."""

    @pytest.fixture
    def make(self) -> Make:
        """Return a function that makes the strategy under test for a seed."""
        raise NotImplementedError("override the fixture 'make'")

    def test_proposes_valid_architectures_numbered_from_1(self, make: Make) -> None:
        """Ids count up from 1; every architecture is of the space; seeds fit into 32 bits."""
        strategy = make(0)
        trials = advance(strategy, TRIALS)
        assert [trial.id for trial in trials] == list(range(1, len(trials) + 1))
        assert all(strategy.space.contains(trial.architecture) for trial in trials)
        assert all(0 <= trial.seed < 2**32 for trial in trials)
        assert len({trial.seed for trial in trials}) == len(trials)

    def test_same_seed_same_stream(self, make: Make) -> None:
        """The same seed and the same results give the same trials; another seed gives others."""
        assert advance(make(3), TRIALS) == advance(make(3), TRIALS)
        assert advance(make(3), TRIALS) != advance(make(4), TRIALS)

    @pytest.mark.parametrize("before", [0, 1, 7, 23])
    def test_resumed_equals_uninterrupted(self, make: Make, before: int) -> None:
        """The state, through JSON text and with trials pending, continues exactly."""
        whole = make(1)
        advance(whole, before)
        waiting = whole.ask(3)
        resumed = make(1)
        resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
        assert sorted(resumed.pending) == [trial.id for trial in waiting]
        assert list(resumed.pending.values()) == waiting
        for strategy in (whole, resumed):
            for trial in waiting:
                strategy.tell(trial.id, evaluated(trial))
        assert advance(resumed, TRIALS) == advance(whole, TRIALS)
        assert resumed.state_dict() == whole.state_dict()

    def test_no_repeats_where_promised(self, make: Make) -> None:
        """A strategy that promises it proposes each architecture once at each fidelity."""
        strategy = make(2)
        if strategy.repeats:
            pytest.skip("the strategy may repeat itself")
        seen = [(trial.architecture, trial.fidelity) for trial in advance(strategy, TRIALS)]
        assert len(set(seen)) == len(seen)

    def test_results_may_come_in_any_order(self, make: Make) -> None:
        """A batch told backwards, in part failed, infeasible and NaN, leaves nothing pending."""
        strategy = make(5)
        for _ in range(4):
            batch = strategy.ask(5)
            for trial in reversed(batch):
                strategy.tell(
                    trial.id,
                    (
                        Result(metrics={"valid_accuracy": float("nan")}),
                        Result.infeasible("too large"),
                        Result(metrics={}),
                        evaluated(trial),
                    )[trial.id % 4],
                )
        assert not strategy.pending
        assert strategy.told == strategy.asked

    def test_errors_name_what_is_wrong(self, make: Make) -> None:
        """Unknown ids, results told twice, a bad n and a foreign state are refused; nothing changes."""
        strategy = make(6)
        (trial,) = strategy.ask()
        strategy.tell(trial.id, evaluated(trial))
        with pytest.raises(UserError, match=r"trial_id: got 1; .* told already"):
            strategy.tell(1, evaluated(trial))
        with pytest.raises(UserError, match=r"trial_id: got 77; .* never asked"):
            strategy.tell(77, evaluated(trial))
        with pytest.raises(UserError, match=r"ask\(n\): got 0; allowed: an integer from 1"):
            strategy.ask(0)
        with pytest.raises(UserError, match=r"state\.kind: got 'Other'"):
            strategy.load_state_dict({**strategy.state_dict(), "kind": "Other"})
        with pytest.raises(UserError, match=r"state\.version: got 99"):
            strategy.load_state_dict({**strategy.state_dict(), "version": 99})

    def test_nothing_else_moves_the_stream(self, make: Make) -> None:
        """Numpy's global generator is neither used nor moved."""
        before = np.random.get_state()[1].tolist()  # type: ignore[index]
        advance(make(0), 5)
        assert np.random.get_state()[1].tolist() == before  # type: ignore[index]
