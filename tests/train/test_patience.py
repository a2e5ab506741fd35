import json
import math

import pytest

from archsmith.core.errors import UserError
from archsmith.train.patience import Patience, PatienceState


def states(rule: Patience, scores: list[float], rate: float = 1.0, seconds: float = 0.0) -> list[PatienceState]:
    state, found = rule.start(rate), []
    for number, score in enumerate(scores):
        state = rule.after_epoch(state, score, seconds=seconds * (number + 1))
        found.append(state)
    return found


def test_the_rate_falls_after_each_run_of_bad_epochs() -> None:
    rule = Patience(rate_patience=2, rate_mult=0.5, stop_patience=100)
    rates = [state.rate for state in states(rule, [0.5, 0.4, 0.4, 0.4, 0.4, 0.6, 0.6, 0.5, 0.7])]
    # bad: -, 1, 2 -> halve, 1, 2 -> halve, improvement, 1 (equal is no improvement), 2 -> halve, improvement
    assert rates == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125]


def test_an_improvement_resets_both_counters() -> None:
    rule = Patience(rate_patience=3, stop_patience=4)
    found = states(rule, [0.1, 0.0, 0.0, 0.2, 0.0, 0.0])
    assert [(s.bad_for_rate, s.bad_for_stop) for s in found] == [(0, 0), (1, 1), (2, 2), (0, 0), (1, 1), (2, 2)]
    assert all(state.rate == 1.0 for state in found)
    assert (found[-1].best, found[-1].best_epoch, found[-1].epochs) == (0.2, 3, 6)


def test_the_rate_has_a_floor_and_is_never_raised_to_it() -> None:
    rule = Patience(rate_patience=1, rate_mult=0.1, rate_min=0.05)
    assert [s.rate for s in states(rule, [1.0, 0.0, 0.0, 0.0])] == pytest.approx([1.0, 0.1, 0.05, 0.05])
    assert [s.rate for s in states(rule, [1.0, 0.0], rate=0.01)] == [0.01, 0.01]


def test_it_stops_after_bad_epochs_but_a_lowered_rate_does_not_prolong_it() -> None:
    rule = Patience(rate_patience=1, stop_patience=3)
    found = states(rule, [0.5, 0.5, 0.5, 0.5])
    assert [bool(state.stopped) for state in found] == [False, False, False, True]
    assert found[-1].stopped == "no improvement in 3 epochs"


def test_it_stops_at_the_end_of_the_epoch_that_passes_the_time_limit() -> None:
    found = states(Patience(seconds=10), [0.1, 0.2, 0.3], seconds=4.0)
    assert [state.stopped for state in found] == ["", "", "the time limit of 10 s"]


def test_nan_is_a_bad_epoch_and_states_survive_json() -> None:
    rule = Patience(rate_patience=1)
    first = rule.start(0.1)
    assert PatienceState.from_json(json.loads(json.dumps(first.to_json()))) == first
    bad = rule.after_epoch(first, math.nan)
    assert (bad.bad_for_stop, bad.best_epoch) == (1, -1)
    assert PatienceState.from_json(json.loads(json.dumps(bad.to_json(), allow_nan=False))) == bad


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"rate_patience": 0}, r"patience\.rate_patience: got 0; allowed: an integer from 1"),
        ({"stop_patience": 1.5}, r"patience\.stop_patience: got 1\.5"),
        ({"rate_mult": 1.5}, r"patience\.rate_mult: got 1\.5; allowed: a factor above 0, at most 1"),
        ({"rate_min": -1}, r"patience\.rate_min: got -1"),
        ({"seconds": 0}, r"patience\.seconds: got 0; allowed: a number above 0"),
    ],
)
def test_rules_out_of_range_are_refused(wrong: dict[str, float], text: str) -> None:
    with pytest.raises(UserError, match=text):
        Patience(**wrong)  # type: ignore[arg-type]
