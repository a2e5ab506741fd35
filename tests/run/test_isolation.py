import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from study_samples import SPACE, Misbehaving, Quick, wait_for_the_end_of

from archsmith.core.errors import UserError
from archsmith.run.isolation import Limits, WorkerPool, how_it_ended
from archsmith.run.study import run_study
from archsmith.space import Result, Trial
from archsmith.strategies import RandomSearch

MIB = 1 << 20


def test_whatever_a_candidate_does_is_a_recorded_failure() -> None:
    faults = {
        2: "raise", 3: "exit", 4: "segfault", 5: "kill", 6: "hang", 7: "memory", 8: "nan", 9: "unsendable",
    }  # fmt: skip
    outcome = run_study(
        RandomSearch(SPACE),
        Misbehaving(faults),
        budget=11,
        workers=2,
        time_limit=0.6,
        memory_limit=512 * MIB,
        attempts=2,
    )
    reasons = [result.reason for _, result in outcome.history]
    assert reasons == [
        None,
        "ArithmeticError: loss diverged",
        "the process of the evaluation ended with exit code 3",
        "the process of the evaluation was ended by SIGSEGV",
        "given up after 2 attempts: the worker process was ended by SIGKILL",
        "time limit: not finished after 0.6 s, killed",
        "out of memory",
        "valid_accuracy is NaN",
        "the result cannot be sent (TypeError: this result stays here)",
        None,
        None,
    ]
    hung = outcome.history[5][1]
    assert hung.seconds >= 0.6


def test_limits_hold_in_an_executor_that_knows_none() -> None:
    with ThreadPoolExecutor(2) as threads:
        outcome = run_study(
            RandomSearch(SPACE), Misbehaving({2: "hang", 3: "segfault"}), budget=4, workers=2, time_limit=0.5,
            executor=threads,
        )  # fmt: skip
    reasons = [result.reason for _, result in outcome.history]
    assert reasons[0] is reasons[3] is None
    assert reasons[1:3] == [
        "time limit: not finished after 0.5 s, killed",
        "the process of the evaluation was ended by SIGSEGV",
    ]


class Parent:
    """Starts a child that would sleep for an hour, then hangs."""

    def __init__(self, file: str) -> None:
        self.file = file

    def evaluate(self, trial: Trial, *, weights: object = None) -> Result:
        child = subprocess.Popen(["sleep", "3600"])
        Path(self.file).write_text(str(child.pid))
        time.sleep(3600)
        return Result()


def test_what_a_killed_evaluation_started_is_killed_too(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    run_study(RandomSearch(SPACE), Parent(str(file)), budget=1, time_limit=1.0)
    wait_for_the_end_of([int(file.read_text())])


def test_workers_stay_warm_and_are_replaced_when_they_die(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with WorkerPool(Quick(log=str(log)), workers=1) as pool:
        trials = RandomSearch(SPACE).ask(4)
        for trial in trials[:3]:
            pool.submit(trial)
        while len(log.read_text().splitlines() if log.exists() else []) < 3:
            pool.collect(0.1)
        pids = {line.split()[1] for line in log.read_text().splitlines()}
        assert len(pids) == 1
        os.kill(int(pids.pop()), signal.SIGKILL)
        pool.submit(trials[3])
        found: list[Any] = []
        while not found or found[-1].trial.id != 4:
            found += pool.collect(1.0)
        if found[-1].lost:  # it was handed to the dying worker
            pool.submit(trials[3])
            (made,) = pool.collect()
            assert made.result is not None
        assert len({line.split()[1] for line in log.read_text().splitlines()}) == 2


class Local:
    def __reduce__(self) -> Any:
        raise TypeError("holds an open file")

    def evaluate(self, trial: Trial, *, weights: object = None) -> Result:
        return Result(metrics={"valid_accuracy": 1.0})


class Unloadable(Local):
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('no such device')",)


def test_evaluators_that_cannot_travel_are_refused() -> None:
    with pytest.raises(UserError, match=r"Local, which cannot be sent to another process \(holds an open file\)"):
        run_study(RandomSearch(SPACE), Local(), budget=1, isolate=True)
    with pytest.raises(UserError, match="processes that end while they start"):
        run_study(RandomSearch(SPACE), Unloadable(), budget=1, isolate=True)


def test_how_processes_end() -> None:
    assert how_it_ended(-11) == "was ended by SIGSEGV"
    assert how_it_ended(-99) == "was ended by signal 99"
    assert how_it_ended(1) == "ended with exit code 1"


def test_limits_are_positive() -> None:
    with pytest.raises(UserError, match="memory_limit: got 0"):
        Limits(memory_bytes=0)
    assert not Limits()
