import contextlib
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from study_samples import SPACE, Climber, Generations, KillsItselfOnce, Misbehaving, Quick, score, wait_for_the_end_of

from archsmith.core.errors import UserError
from archsmith.core.journal import Journal
from archsmith.run.stop import StopRequest
from archsmith.run.study import JournalStore, MemoryStore, StudyBudget, WorkerLost, recorded_trials, run_study
from archsmith.space import Categorical, Objective, ProductSpace, Result, Trial
from archsmith.strategies import RandomSearch, open_strategy


def trail(history: list[tuple[Trial, Result]]) -> list[tuple[int, str, int, float]]:
    return [(t.id, t.architecture.digest, t.seed, r.metrics.get("valid_accuracy", -1.0)) for t, r in history]


def stored(path: Path) -> list[tuple[int, str, int, float]]:
    assert all(result is not None for _, result in recorded_trials(path))
    return trail([(trial, result) for trial, result in recorded_trials(path) if result is not None])


@pytest.mark.parametrize("order", ["synchronous", "asynchronous"])
def test_a_serial_study_is_the_plain_loop(order: Any) -> None:
    plain, expected = Climber(seed=3), []
    for _ in range(30):
        (trial,) = plain.ask()
        result = Quick().evaluate(trial)
        plain.tell(trial.id, result)
        expected.append((trial, result))
    outcome = run_study(Climber(seed=3), Quick(), budget=30, order=order)
    assert trail(outcome.history) == trail(expected)
    assert outcome.status == "finished"
    assert outcome.reason == "the budget of 30 evaluations is spent"
    assert (outcome.told, outcome.evaluated, outcome.failed, outcome.pending) == (30, 30, 0, ())
    assert outcome.simulated_seconds == 300.0
    assert outcome.best is not None
    assert outcome.best[1].metrics["valid_accuracy"] == max(value for *_, value in trail(expected))


def test_the_trial_that_crosses_the_simulated_budget_is_the_last() -> None:
    outcome = run_study(Climber(), Quick(), budget=StudyBudget(simulated_seconds=95.0))
    assert (outcome.told, outcome.simulated_seconds) == (10, 100.0)
    assert outcome.reason == "the budget of 95 simulated seconds is spent"


def test_real_seconds_end_a_study_and_count_over_sessions(tmp_path: Path) -> None:
    outcome = run_study(
        Climber(), Quick(sleep=0.02), budget=StudyBudget(real_seconds=0.2), store=JournalStore(tmp_path)
    )
    assert outcome.reason == "the budget of 0.2 real seconds is spent"
    assert 1 < outcome.told < 11
    again = run_study(Climber(), Quick(), budget=StudyBudget(real_seconds=0.2), store=JournalStore(tmp_path))
    assert again.told == outcome.told


@pytest.mark.parametrize("order", ["synchronous", "asynchronous"])
def test_waiting_strategies_and_finished_ones(order: Any) -> None:
    with ThreadPoolExecutor(4) as threads:
        outcome = run_study(Generations(3), Quick(), budget=100, workers=4, batch=8, order=order, executor=threads)
    assert sorted(t.id for t, _ in outcome.history) == list(range(1, 10))
    assert outcome.reason == "the strategy has nothing more to ask"


class Sleepy(Quick):
    """Later trials are faster, so that results come out of order."""

    def evaluate(self, trial: Trial, *, weights: object = None) -> Result:
        time.sleep(0.004 * (5 - trial.id % 5))
        return super().evaluate(trial)


def test_synchronous_order_does_not_depend_on_the_number_of_workers() -> None:
    runs = []
    for workers in (1, 2, 6):
        with ThreadPoolExecutor(workers) as threads:
            runs.append(
                run_study(Climber(), Sleepy(), budget=30, workers=workers, batch=6, executor=threads, cache=True)
            )
    assert trail(runs[0].history) == trail(runs[1].history) == trail(runs[2].history)
    assert [t.id for t, _ in runs[2].history] == list(range(1, runs[2].told + 1))
    assert runs[0].free == runs[2].free > 0
    assert all(run.reproducible and run.evaluated == 30 for run in runs)


def test_asynchronous_order_tells_results_as_they_come_and_says_that_it_is_not_reproducible() -> None:
    with ThreadPoolExecutor(4) as threads:
        outcome = run_study(Climber(), Sleepy(), budget=40, workers=4, executor=threads, order="asynchronous")
    ids = [t.id for t, _ in outcome.history]
    assert sorted(ids) == list(range(1, 41))
    assert ids != sorted(ids)
    assert not outcome.reproducible


def test_nothing_is_kept_where_nothing_is_wanted_and_results_are_passed_on() -> None:
    seen: list[int] = []
    store = MemoryStore(keep=False)
    outcome = run_study(
        RandomSearch(SPACE), Quick(), budget=50, store=store, on_result=lambda trial, result: seen.append(trial.id)
    )
    assert outcome.history == []
    assert seen == list(range(1, 51))


def test_the_cache_answers_equal_networks_for_free() -> None:
    evaluator = Counting()
    outcome = run_study(RandomSearch(SPACE), evaluator, budget=36, cache=True)
    assert outcome.evaluated == evaluator.calls == 36
    assert outcome.free == outcome.told - 36 > 0
    assert outcome.simulated_seconds == 360.0
    for trial, result in outcome.history:
        assert result.metrics["valid_accuracy"] == score(trial.architecture)


class Counting(Quick):
    calls = 0

    def evaluate(self, trial: Trial, *, weights: object = None) -> Result:
        self.calls += 1
        return super().evaluate(trial)


def test_a_space_that_is_through_ends_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archsmith.run.ledger.FREE_IN_A_ROW", 50)
    tiny = ProductSpace("tiny", {"op": Categorical(["a", "b"])})
    outcome = run_study(RandomSearch(tiny), Constant(), budget=3, cache=True)
    assert outcome.reason == "the last 50 trials were infeasible or known, nothing new comes"
    assert outcome.evaluated == 2


class Constant:
    def evaluate(self, trial: Trial, *, weights: object = None) -> Result:
        return Result(metrics={"valid_accuracy": 0.5})


def test_infeasible_architectures_are_told_without_an_evaluation() -> None:
    evaluator = Counting()
    outcome = run_study(
        RandomSearch(SPACE),
        evaluator,
        budget=20,
        feasible=lambda a: Result.infeasible("width above 16", costs={"params": 32}) if a["width"] > 16 else None,
    )
    assert outcome.evaluated == evaluator.calls == 20
    refused = [(t, r) for t, r in outcome.history if r.status == "infeasible"]
    assert len(refused) == outcome.infeasible == outcome.free > 0
    assert all(t.architecture["width"] == 32 for t, _ in refused)


def test_bad_candidates_are_failures_and_the_search_goes_on() -> None:
    outcome = run_study(RandomSearch(SPACE), Misbehaving({2: "raise", 3: "nan", 4: "sys.exit", 5: "nothing"}), budget=6)
    reasons = {t.id: r.reason for t, r in outcome.history}
    assert reasons == {
        1: None,
        2: "ArithmeticError: loss diverged",
        3: "valid_accuracy is NaN",
        4: "SystemExit: 4",
        5: "evaluator: got 'NoneType'; allowed: an evaluator whose evaluate returns an archsmith.space.Result.",
        6: None,
    }
    assert outcome.failed == 4


def test_wrong_use_shows_at_the_first_trial() -> None:
    with pytest.raises(UserError, match="whose evaluate returns"):
        run_study(RandomSearch(SPACE), Misbehaving({1: "nothing"}), budget=2)
    wrong = RandomSearch(SPACE, objectives=[Objective("bleu")])
    with pytest.raises(UserError, match=r"objectives: got 'bleu'; allowed: what the evaluator reports: \['valid_acc"):
        run_study(wrong, Quick(), budget=2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"budget": 0}, "budget.evaluations: got 0; allowed: an integer from 1"),
        ({"budget": 2, "workers": 0}, "workers: got 0"),
        ({"budget": 2, "batch": 0}, "batch: got 0"),
        ({"budget": 2, "order": "random"}, "order: got 'random'"),
        ({"budget": 2, "time_limit": -1.0}, "time_limit: got -1.0"),
        ({"budget": 2, "workers": 2, "isolate": False}, "isolate: got False"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        run_study(RandomSearch(SPACE), Quick(), **arguments)
    with pytest.raises(UserError, match="budget: got None; allowed: at least one of"):
        StudyBudget()


def test_a_study_stops_on_request_and_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    whole = run_study(Climber(), Quick(), budget=25)
    stop = StopRequest()

    def after(trial: Trial, result: Result) -> None:
        if trial.id == 10:
            stop.request("Ctrl-C")

    first = run_study(Climber(), Quick(), budget=25, store=JournalStore(tmp_path / "s"), stop=stop, on_result=after)
    assert (first.status, first.reason, first.pending) == ("stopped", "Ctrl-C", (11,))
    assert json.loads((tmp_path / "s" / "result.json").read_text())["status"] == "stopped"
    second = run_study(Climber(), Quick(), budget=25, store=JournalStore(tmp_path / "s"))
    assert second.status == "finished"
    assert stored(tmp_path / "s") == trail(whole.history)
    assert json.loads((tmp_path / "s" / "result.json").read_text())["told"] == 25


@pytest.mark.parametrize(
    ("strategy", "snapshot_seconds"), [(Climber, 0.0), (Climber, 1e9), (lambda: Generations(3), 1e9)]
)
def test_resuming_after_every_possible_end_of_the_journal_gives_the_same_study(
    tmp_path: Path, strategy: Any, snapshot_seconds: float
) -> None:
    """A kill leaves a prefix of the journal's lines; each of them must lead to the same end."""

    def study(path: Path) -> Any:
        store = JournalStore(path)
        return run_study(
            strategy(), Quick(), budget=7, store=store, batch=4, cache=True, snapshot_seconds=snapshot_seconds,
            feasible=lambda a: Result.infeasible("too wide") if a["width"] == 32 else None,
        )  # fmt: skip

    study(tmp_path / "whole")
    lines = (tmp_path / "whole" / "journal.jsonl").read_text().splitlines(keepends=True)
    kinds = {json.loads(line)["kind"] for line in lines}
    assert kinds >= {"run_started", "asked", "leased", "result", "told", "finished"}
    wanted = stored(tmp_path / "whole")
    for kept in range(1, len(lines)):
        path = tmp_path / f"cut{kept}"
        path.mkdir()
        (path / "journal.jsonl").write_text("".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
        outcome = study(path)
        assert stored(path) == wanted, kept
        assert outcome.status == "finished"
        events = Journal(path / "journal.jsonl").read()
        told = [e["id"] for e in events if e["kind"] == "told" or e.get("told")]
        assert told == sorted(told) == [trial_id for trial_id, *_ in wanted]


@pytest.mark.parametrize("name", ["regularized-evolution", "reinforce"])
def test_learning_strategies_resume_from_their_state_and_the_rest_of_the_journal(tmp_path: Path, name: str) -> None:
    def study(path: Path, snapshot_seconds: float) -> None:
        strategy = open_strategy(name, SPACE, seed=2)
        store = JournalStore(path)
        run_study(strategy, Quick(), budget=40, batch=4, store=store, snapshot_seconds=snapshot_seconds)

    study(tmp_path / "whole", 1e9)
    study(tmp_path / "cut", 0.0)
    lines = (tmp_path / "cut" / "journal.jsonl").read_text().splitlines(keepends=True)
    states = [i for i, line in enumerate(lines) if json.loads(line)["kind"] == "state"]
    kept = [line for i, line in enumerate(lines) if i not in states[20:]][: states[19] + 14]  # 13 entries to replay
    (tmp_path / "cut" / "journal.jsonl").write_text("".join(kept))
    study(tmp_path / "cut", 1e9)
    assert stored(tmp_path / "cut") == stored(tmp_path / "whole")


@pytest.mark.slow
def test_memory_does_not_grow_where_nothing_is_kept(tmp_path: Path) -> None:
    for store in (MemoryStore(keep=False), JournalStore(tmp_path)):
        marks: list[int] = []

        def note(trial: Trial, result: Result, marks: list[int] = marks) -> None:
            if trial.id % 1_000 == 0:
                gc.collect()
                marks.append(tracemalloc.get_traced_memory()[0])

        tracemalloc.start()
        run_study(RandomSearch(SPACE), Quick(), budget=3_000, store=store, on_result=note)
        tracemalloc.stop()
        # Bytes: a kept result is more than 500, and entries not yet written (those of 50 ms) are 150,000 at most.
        assert marks[2] - marks[0] < 2_000 * 150


def test_a_snapshot_spares_the_resumed_study_the_asking(tmp_path: Path) -> None:
    run_study(Counted(), Quick(), budget=20, store=JournalStore(tmp_path), snapshot_seconds=0.0)
    journal = tmp_path / "journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))  # without its end
    strategy = Counted()
    run_study(strategy, Quick(), budget=25, store=JournalStore(tmp_path), snapshot_seconds=0.0)
    assert strategy.proposed == 5
    assert stored(tmp_path) == trail(run_study(Counted(), Quick(), budget=25).history)


class Counted(Climber):
    proposed = 0

    def _propose(self) -> Any:
        self.proposed += 1
        return super()._propose()


def test_another_strategy_seed_space_or_order_is_refused(tmp_path: Path) -> None:
    stop = StopRequest()
    store = JournalStore(tmp_path)
    run_study(Climber(seed=1), Quick(), budget=9, store=store, stop=stop, on_result=lambda *_: stop.request("enough"))
    before = (tmp_path / "journal.jsonl").read_bytes()
    with pytest.raises(UserError, match="seed: 1 -> 2"):
        run_study(Climber(seed=2), Quick(), budget=9, store=JournalStore(tmp_path))
    with pytest.raises(UserError, match='strategy: "Climber" -> "RandomSearch"'):
        run_study(RandomSearch(SPACE, seed=1), Quick(), budget=9, store=JournalStore(tmp_path))
    other = ProductSpace("toy", {"op": Categorical(["conv", "pool"])})
    with pytest.raises(UserError, match="space_digest: "):
        run_study(Climber(other, seed=1), Quick(), budget=9, store=JournalStore(tmp_path))
    with pytest.raises(UserError, match=r"which asks now for .* Resume with the same settings"):
        run_study(Greedy(seed=1), Quick(), budget=9, store=JournalStore(tmp_path))
    assert (tmp_path / "journal.jsonl").read_bytes() == before


class Greedy(Climber):
    def _propose(self) -> Any:
        self.rng.random()
        return super()._propose()


Greedy.__name__ = "Climber"  # the same strategy in another version


def test_a_finished_study_is_not_prolonged(tmp_path: Path) -> None:
    run_study(Climber(), Quick(), budget=4, store=JournalStore(tmp_path))
    assert run_study(Climber(), Quick(), budget=3, store=JournalStore(tmp_path)).told == 4
    with pytest.raises(UserError, match=r"what the finished study spent \(4 evaluations\)"):
        run_study(Climber(), Quick(), budget=5, store=JournalStore(tmp_path))


@pytest.mark.parametrize("order", ["synchronous", "asynchronous"])
def test_twenty_evaluations_by_four_workers_one_killed(tmp_path: Path, order: Any) -> None:
    """The scenario: ids 1 to 20, all with a result, none pending, though a worker died in mid-evaluation."""
    evaluator = KillsItselfOnce(str(tmp_path / "died"), victim=7)
    outcome = run_study(
        RandomSearch(SPACE, seed=5), evaluator, budget=20, workers=4, order=order, store=JournalStore(tmp_path / "s")
    )
    assert (tmp_path / "died").exists()
    trials = list(recorded_trials(tmp_path / "s"))
    assert [trial.id for trial, _ in trials] == list(range(1, 21))
    assert all(result is not None and result.status == "ok" for _, result in trials)
    assert outcome.pending == ()
    (lost,) = [e for e in Journal(tmp_path / "s" / "journal.jsonl").read() if e["kind"] == "lost"]
    assert (lost["id"], lost["reason"]) == (7, "the worker process was ended by SIGKILL")
    plain = run_study(RandomSearch(SPACE, seed=5), Quick(), budget=20)
    assert stored(tmp_path / "s") == trail(plain.history)


COORDINATOR = """
import sys
from study_samples import SPACE, Climber, Quick
from archsmith.run.study import JournalStore, run_study
if __name__ == "__main__":
    out, log, order, workers = sys.argv[1:]
    run_study(Climber(), Quick(log=log, sleep=0.02), budget=20, workers=int(workers), batch=4, order=order,
              store=JournalStore(out))
"""


def coordinator(folder: Path, order: str, workers: int) -> subprocess.Popen[bytes]:
    script = folder / "coordinator.py"
    script.write_text(COORDINATOR)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    arguments = [str(folder / "s"), str(folder / "log"), order, str(workers)]
    return subprocess.Popen([sys.executable, str(script), *arguments], env={**os.environ, "PYTHONPATH": path})


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def kill_after(process: subprocess.Popen[bytes], log: Path, evaluations: int) -> None:
    while len(lines_of(log)) < evaluations:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("order", ["synchronous", "asynchronous"])
def test_the_coordinator_is_killed_and_resumed(tmp_path: Path, order: str) -> None:
    kill_after(coordinator(tmp_path, order, 4), tmp_path / "log", 9)
    pids = {int(line.split()[1]) for line in lines_of(tmp_path / "log")}
    wait_for_the_end_of(pids)  # workers do not outlive their coordinator
    open_trials = [t for t, result in recorded_trials(tmp_path / "s") if result is None]
    assert open_trials
    assert coordinator(tmp_path, order, 2).wait() == 0
    trials = list(recorded_trials(tmp_path / "s"))
    assert [trial.id for trial, _ in trials] == list(range(1, 21))
    again = {trial.id: trial for trial, result in trials if result is not None and result.status == "ok"}
    assert len(again) == 20
    for trial in open_trials:
        assert again[trial.id] == trial
    if order == "synchronous":
        with ThreadPoolExecutor(4) as threads:
            whole = run_study(Climber(), Quick(), budget=20, workers=4, executor=threads)
        assert stored(tmp_path / "s") == trail(whole.history)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["synchronous", "asynchronous"])
def test_kills_at_random_moments(tmp_path: Path, order: str) -> None:
    moments = random.Random(0)
    for repetition in range(5):
        folder = tmp_path / str(repetition)
        folder.mkdir()
        log, deaths = folder / "log", 0
        process = coordinator(folder, order, 4)
        while process.poll() is None:
            moment = len(lines_of(log)) + moments.randint(1, 8)
            while process.poll() is None and len(lines_of(log)) < moment:
                time.sleep(0.002)
            time.sleep(moments.uniform(0.0, 0.03))
            if moments.random() < 0.5:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(moments.choice(lines_of(log)[-4:]).split()[1]), signal.SIGKILL)  # a worker
            elif process.poll() is None:
                process.kill()
                process.wait()
                deaths += 1
                process = coordinator(folder, order, 4)
        assert process.wait() == 0
        trials = list(recorded_trials(folder / "s"))
        assert [trial.id for trial, _ in trials] == list(range(1, 21)), (repetition, deaths)
        assert all(result is not None and result.status == "ok" for _, result in trials)


def test_any_executor_will_do() -> None:
    plain = run_study(Climber(), Quick(), budget=12, batch=3)
    with ProcessPoolExecutor(2) as processes:
        apart = run_study(Climber(), Quick(), budget=12, batch=3, workers=3, executor=processes)
    assert trail(apart.history) == trail(plain.history)


class Unreliable(Executor):
    """Loses every third call, or is broken from a given call on."""

    def __init__(self, broken_from: int | None = None) -> None:
        self.calls, self.broken_from = 0, broken_from

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.calls += 1
        future: Future[Any] = Future()
        if self.broken_from is not None and self.calls >= self.broken_from:
            future.set_exception(BrokenExecutor("a process died"))
        elif self.calls % 3 == 0:
            future.set_exception(WorkerLost("node 2 went away"))
        else:
            future.set_result(fn(*args, **kwargs))
        return future


def test_calls_that_an_executor_loses_are_taken_up_again() -> None:
    executor = Unreliable()
    outcome = run_study(Climber(), Quick(), budget=10, executor=executor)
    assert executor.calls == 14
    assert trail(outcome.history) == trail(run_study(Climber(), Quick(), budget=10).history)
    given_up = run_study(RandomSearch(SPACE), Quick(), budget=3, executor=Unreliable(), attempts=1)
    assert given_up.history[2][1].reason == "given up after 1 attempts: node 2 went away"


def test_a_broken_executor_ends_the_session_and_nothing_is_lost(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Unreliable, which is broken .*the same call with a new executor goes on"):
        run_study(Climber(), Quick(), budget=5, executor=Unreliable(broken_from=3), store=JournalStore(tmp_path))
    assert [trial.id for trial, result in recorded_trials(tmp_path) if result is not None] == [1, 2]
    run_study(Climber(), Quick(), budget=5, store=JournalStore(tmp_path))
    assert stored(tmp_path) == trail(run_study(Climber(), Quick(), budget=5).history)
