from __future__ import annotations

import functools
import json
from collections import Counter

import pytest

from archsmith.core.errors import UserError
from archsmith.space import Result, Trial
from archsmith.strategies import Hyperband, SuccessiveHalving, geometric_fidelities
from archsmith.strategies.halving import Halving
from archsmith.testing.strategies import flat_space, toy_score


def run(search: Halving, limit: int = 10_000) -> list[Trial]:
    asked: list[Trial] = []
    while len(asked) < limit and (trials := search.ask(limit)):
        asked += trials
        for trial in trials:
            score = toy_score(search.space, trial.architecture)
            search.tell(trial.id, Result(metrics={"valid_accuracy": score}))
    return asked


def test_geometric_fidelities() -> None:
    assert geometric_fidelities(1, 81, 3) == (1.0, 3.0, 9.0, 27.0, 81.0)
    assert geometric_fidelities(10, 200, 4) == (12.5, 50.0, 200.0)
    assert geometric_fidelities(5, 5) == (5.0,)
    with pytest.raises(UserError, match="0 < lowest <= highest"):
        geometric_fidelities(3, 2)


def test_hyperband_has_the_brackets_of_the_paper() -> None:
    """Table 1 of arXiv 1603.06560: R = 81, eta = 3 (its n_i, r_i for s = 4, 3, 2, 1, 0)."""
    search = Hyperband(flat_space(), fidelities=geometric_fidelities(1, 81, 3), rounds=1)
    counts: dict[int, list[tuple[int, float]]] = {}
    asked = run(search)
    for (bracket, fidelity), n in sorted(Counter((int(t.info["bracket"]), t.fidelity) for t in asked).items()):
        assert fidelity is not None
        counts.setdefault(bracket, []).append((n, fidelity))
    assert counts == {
        0: [(81, 1), (27, 3), (9, 9), (3, 27), (1, 81)],
        1: [(34, 3), (11, 9), (3, 27), (1, 81)],
        2: [(15, 9), (5, 27), (1, 81)],
        3: [(8, 27), (2, 81)],
        4: [(5, 81)],
    }
    assert search.done
    assert search.ask() == []


def test_the_best_are_promoted_and_name_what_they_continue() -> None:
    space = flat_space()
    asked = run(SuccessiveHalving(space, fidelities=(1, 4, None), width=16, eta=4, brackets=1))
    by_id = {trial.id: trial for trial in asked}
    first, second, third = (asked[:16], asked[16:20], asked[20:])
    assert [len(part) for part in (first, second, third)] == [16, 4, 1]
    assert {t.fidelity for t in first} == {1} and {t.fidelity for t in second} == {4}
    assert third[0].fidelity is None
    for trial in (*second, *third):
        assert trial.parent is not None
        assert by_id[trial.parent].architecture == trial.architecture
    best = sorted((toy_score(space, t.architecture) for t in first), reverse=True)[:4]
    assert sorted((toy_score(space, t.architecture) for t in second), reverse=True) == best


def test_keys_of_kept_weights_are_passed_on_to_what_continues_them() -> None:
    make = functools.partial(SuccessiveHalving, flat_space(), fidelities=[1, 2], width=4, eta=2, brackets=1)
    search = make()
    for trial in search.ask(4):
        assert "weights" not in trial.info
        kept = None if trial.id == 2 else f"key{trial.id}"
        search.tell(trial.id, Result(metrics={"valid_accuracy": trial.id / 10}, weights=kept))
        state = json.loads(json.dumps(search.state_dict()))
        search = make()
        search.load_state_dict(state)
    assert [(trial.parent, trial.info.get("weights")) for trial in search.ask(2)] == [(4, "key4"), (3, "key3")]


def test_a_rung_waits_for_its_last_result() -> None:
    search = SuccessiveHalving(flat_space(), fidelities=(1, 2), width=4, eta=2)
    trials = search.ask(10)
    assert len(trials) == 4
    for trial in reversed(trials[1:]):
        search.tell(trial.id, Result(metrics={"valid_accuracy": float(trial.id)}))
        assert search.ask() == []
    search.tell(trials[0].id, Result(metrics={"valid_accuracy": 9.0}))
    assert [trial.parent for trial in search.ask(2)] == [1, 4]


def test_open_brackets_keep_workers_busy() -> None:
    search = SuccessiveHalving(flat_space(), fidelities=(1, 2), width=4, eta=2, open_brackets=2)
    assert len(search.ask(10)) == 8


def test_failures_are_never_promoted() -> None:
    search = SuccessiveHalving(flat_space(), fidelities=(1, 2), width=4, eta=2, brackets=2)
    for trial in search.ask(4):
        result = Result(metrics={"valid_accuracy": 1.0}) if trial.id == 2 else Result.failed("crashed")
        search.tell(trial.id, result)
    (promoted,) = [trial for trial in search.ask(1) if trial.parent]
    assert promoted.parent == 2
    search.tell(promoted.id, Result(metrics={"valid_accuracy": 1.0}))
    for trial in search.ask(4):
        search.tell(trial.id, Result.failed("crashed"))
    assert search.done


def test_bad_settings_are_named() -> None:
    for fidelities in ((), (2, 1), (None, 1), (0, 1), "12", (1, 1)):
        with pytest.raises(UserError, match="positive numbers that rise"):
            Hyperband(flat_space(), fidelities=fidelities)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="eta: got 1"):
        Hyperband(flat_space(), fidelities=(1, 2), eta=1)
    with pytest.raises(UserError, match="rounds: got 0"):
        Hyperband(flat_space(), fidelities=(1, 2), rounds=0)
    with pytest.raises(UserError, match="width: got 0"):
        SuccessiveHalving(flat_space(), fidelities=(1, 2), width=0)
    with pytest.raises(UserError, match="open_brackets: got 0"):
        SuccessiveHalving(flat_space(), fidelities=(1, 2), open_brackets=0)
