"""Phases of a training."""

from __future__ import annotations

import pytest

from archsmith.core.errors import UserError
from archsmith.train.phases import Phase, PhaseSchedule


def test_every_epoch_has_its_phase() -> None:
    schedule = PhaseSchedule([Phase("pretrain", 2), Phase("prune", 1, ("scores",)), Phase("finetune", 3)])
    assert [schedule.at(epoch).name for epoch in range(8)] == [*["pretrain"] * 2, "prune", *["finetune"] * 5]
    assert schedule.epochs == 6 and [schedule.start(p.name) for p in schedule] == [0, 2, 3]
    assert schedule.at(2).trains == ("scores",) and schedule.at(0).trains == ("weights",)


def test_empty_phases_are_left_out_and_the_last_may_be_endless() -> None:
    schedule = PhaseSchedule([Phase("plain", 0), Phase("regularise", 0), Phase("prune", None)])
    assert schedule.at(0).name == schedule.at(10**6).name == "prune" and schedule.epochs is None
    assert PhaseSchedule([Phase("train", 2), Phase("tail", 0)]).at(5).name == "train"
    assert PhaseSchedule([Phase("nothing", 0)]).at(0).name == "nothing"


def test_wrong_schedules_are_refused() -> None:
    for phases in ([], [Phase("a", 1), Phase("a", 2)]):
        with pytest.raises(UserError, match="phases: got"):
            PhaseSchedule(phases)
    with pytest.raises(UserError, match=r"phases.a: got None; allowed: a length; only the last phase may be endless"):
        PhaseSchedule([Phase("a", None), Phase("b", 1)])
    with pytest.raises(UserError, match=r"phases.a: got -1; allowed: a number of epochs from 0"):
        PhaseSchedule([Phase("a", -1)])
    with pytest.raises(UserError, match="phase: got 'c'; allowed: a, b"):
        PhaseSchedule([Phase("a", 1), Phase("b", 1)]).start("c")
