import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from postgres_server import Server, server_programs
from study_samples import SPACE, Climber, KillsItselfOnce, Misbehaving, Quick, score

from archsmith.core.errors import UserError
from archsmith.run.shared import shared_trials, work_on_study
from archsmith.run.shared_store import SharedStore
from archsmith.run.stop import StopRequest
from archsmith.run.study import StudyBudget, run_study
from archsmith.space import Categorical, ProductSpace, Result, Trial
from archsmith.strategies import RandomSearch

pytest.importorskip("sqlalchemy")
pytest.importorskip("psycopg")

WORKER = """
import sys
from study_samples import SPACE, Climber, Quick
from archsmith.run.shared import work_on_study
from archsmith.run.shared_store import SharedStore
if __name__ == "__main__":
    url, log, order, sleep = sys.argv[1:]
    work_on_study(Climber(), Quick(log=log, sleep=float(sleep)), budget=20, batch=4, order=order,
                  store=SharedStore(url, "scenario", lease_seconds=1.0, patience=20.0), cache=True, isolate=False)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    programs = server_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server is installed")
    made = Server(programs)
    yield made
    made.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return new_database(request.param, request, tmp_path)


def new_database(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if kind == "sqlite":
        return f"sqlite:///{tmp_path}/study.db"
    name = f"t{os.urandom(4).hex()}"
    server: Server = request.getfixturevalue("server")
    import sqlalchemy

    engine = sqlalchemy.create_engine(server.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    return server.url.replace("/postgres?", f"/{name}?")


def worker(folder: Path, url: str, order: str = "asynchronous", sleep: float = 0.02) -> subprocess.Popen[bytes]:
    script = folder / "worker.py"
    script.write_text(WORKER)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    arguments = [url, str(folder / "log"), order, str(sleep)]
    return subprocess.Popen([sys.executable, str(script), *arguments], env={**os.environ, "PYTHONPATH": path})


def trials_in(url: str, study: str = "scenario", **header: Any) -> list[tuple[Trial, Result | None]]:
    store = SharedStore(url, study)
    stop = StopRequest()
    stop.request("only to look")
    found = work_on_study(
        header.get("strategy", Climber()), Quick(), store=store, budget=1, batch=header.get("batch", 4), stop=stop,
        order=header.get("order", "asynchronous"),
    )  # fmt: skip
    assert found.status == "stopped"
    trials = shared_trials(store)
    store.close()
    return trials


def values(trials: list[tuple[Trial, Result | None]]) -> list[tuple[int, str, int, float]]:
    assert all(result is not None and result.status == "ok" for _, result in trials)
    return [(t.id, t.architecture.digest, t.seed, r.metrics["valid_accuracy"]) for t, r in trials if r is not None]


def log_lines(folder: Path) -> list[str]:
    return (folder / "log").read_text().splitlines() if (folder / "log").exists() else []


def test_one_worker_alone_does_the_plain_study(url: str) -> None:
    store = SharedStore(url, "alone")
    outcome = work_on_study(
        Climber(), Quick(), store=store, budget=15, batch=3, order="synchronous", isolate=False, workers=2
    )
    assert (outcome.status, outcome.told, outcome.pending) == ("finished", 15, ())
    assert outcome.reason == "the budget of 15 evaluations is spent"
    plain = run_study(Climber(), Quick(), budget=15, batch=3)
    assert values(trials_in(url, "alone", batch=3, order="synchronous")) == values(list(plain.history))
    again = work_on_study(Climber(), Quick(), store=store, budget=15, batch=3, order="synchronous", isolate=False)
    assert again.told == 15


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        ("postgresql", "synchronous"),
        ("sqlite", "asynchronous"),
        pytest.param("postgresql", "asynchronous", marks=pytest.mark.slow),
        pytest.param("sqlite", "synchronous", marks=pytest.mark.slow),
    ],
)
def test_workers_share_a_study_and_one_is_killed_in_mid_evaluation(
    kind: str, order: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = new_database(kind, request, tmp_path)
    first, second = worker(tmp_path, url, order, sleep=0.05), worker(tmp_path, url, order, sleep=0.05)
    while len(log_lines(tmp_path)) < 6:
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert second.wait() == 0
    trials = trials_in(url, order=order)
    free = [trial.id for trial, result in trials if result is not None and result.seconds == 0.0]
    assert [trial.id for trial, _ in trials] == list(range(1, 21 + len(free)))
    assert all(result is not None and result.status == "ok" for _, result in trials)
    assert all(r is not None and r.metrics["valid_accuracy"] == score(t.architecture) for t, r in trials)
    evaluated = [int(line.split()[0]) for line in log_lines(tmp_path)]
    assert set(evaluated) == {trial.id for trial, _ in trials} - set(free)
    assert 20 <= len(evaluated) <= 21  # the killed one's trial was begun twice, under its id
    assert len({line.split()[1] for line in log_lines(tmp_path)}) == 2  # both worked
    if order == "synchronous":
        plain = run_study(Climber(), Quick(), budget=20, batch=4, cache=True)
        assert values(trials) == values(list(plain.history))


def test_a_worker_process_that_dies_is_no_failure(url: str, tmp_path: Path) -> None:
    evaluator = KillsItselfOnce(str(tmp_path / "died"), victim=3)
    store = SharedStore(url, "s")
    outcome = work_on_study(RandomSearch(SPACE), evaluator, store=store, budget=6, batch=2, workers=2)
    assert (tmp_path / "died").exists()
    assert (outcome.told, outcome.failed) == (6, 0)


def test_bad_candidates_are_failures(tmp_path: Path) -> None:
    store = SharedStore(f"sqlite:///{tmp_path}/s.db", "s", lease_seconds=1.0)
    evaluator = Misbehaving({2: "raise", 3: "kill", 4: "hang", 5: "nan"})
    outcome = work_on_study(
        RandomSearch(SPACE), evaluator, store=store, budget=6, batch=2, workers=2, attempts=2, time_limit=0.5
    )
    assert (outcome.told, outcome.failed) == (6, 4)
    store.open(store_header(2))
    reasons = [result.reason for _, result in shared_trials(store) if result is not None]
    assert reasons == [
        None,
        "ArithmeticError: loss diverged",
        "given up after 2 attempts: the worker process was ended by SIGKILL",
        "time limit: not finished after 0.5 s, killed",
        "valid_accuracy is NaN",
        None,
    ]


def store_header(batch: int) -> dict[str, Any]:
    from archsmith.run.ledger import study_header

    return study_header(RandomSearch(SPACE), order="asynchronous", batch=batch, settings={})


def test_a_stopped_worker_gives_its_trials_back_at_once(url: str) -> None:
    store = SharedStore(url, "s", lease_seconds=3600.0)
    stop = StopRequest(time_limit=0.5)
    outcome = work_on_study(
        RandomSearch(SPACE), Quick(sleep=60.0), store=store, budget=3, batch=2, isolate=True, workers=2, stop=stop
    )
    assert (outcome.status, outcome.reason, outcome.pending) == ("stopped", "the time limit of 0.5 s", (1, 2))
    rest = work_on_study(RandomSearch(SPACE), Quick(), store=store, budget=3, batch=2, isolate=False)
    assert (rest.status, rest.told, rest.failed) == ("finished", 3, 0)


def test_a_lease_is_renewed_while_its_worker_lives(tmp_path: Path) -> None:
    url, log = f"sqlite:///{tmp_path}/s.db", str(tmp_path / "log")
    slow = Quick(log=log, sleep=1.0)  # longer than the lease: trial 1 takes 2 s, trial 2 3 s
    outcomes = []

    def work() -> None:
        store = SharedStore(url, "s", lease_seconds=0.6)
        outcomes.append(work_on_study(RandomSearch(SPACE), slow, store=store, budget=2, batch=2, isolate=False))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [outcome.told for outcome in outcomes] == [2, 2]
    assert sorted(line.split()[0] for line in log_lines(tmp_path)) == ["1", "2"]


def test_the_result_of_a_lease_that_was_taken_over_counts_once(tmp_path: Path) -> None:
    """A worker that falls silent (suspended, say) and comes back finds its trial finished; both agree on one result."""
    url, log = f"sqlite:///{tmp_path}/s.db", str(tmp_path / "log")
    first = SharedStore(url, "s", lease_seconds=0.3)
    first.renew = lambda owner, trials: None  # type: ignore[method-assign]
    outcomes = []

    def work(store: SharedStore) -> None:
        slow = Quick(log=log, sleep=0.5)
        outcomes.append(work_on_study(RandomSearch(SPACE), slow, store=store, budget=1, batch=1, isolate=False))

    threads = [threading.Thread(target=work, args=(store,)) for store in (first, SharedStore(url, "s"))]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join()
    assert [outcome.told for outcome in outcomes] == [1, 1]
    assert [line.split()[0] for line in log_lines(tmp_path)] == ["1", "1"]
    first.open(store_header(1))
    assert [event["kind"] for event in first.events()] == ["asked", "result"]


def test_a_worker_with_another_version_of_the_space_is_refused(url: str) -> None:
    work_on_study(RandomSearch(SPACE), Quick(), store=SharedStore(url, "s"), budget=1, batch=1, isolate=False)
    other = ProductSpace("toy", {"op": Categorical(["conv", "pool"])})
    with pytest.raises(
        UserError, match=r"(?s)study: got 's' in .*This worker has another version of the space\. .*digest"
    ):
        work_on_study(RandomSearch(other), Quick(), store=SharedStore(url, "s"), budget=1, batch=1)
    with pytest.raises(UserError, match=r"(?s)Differences .*seed: 0 -> 4"):
        work_on_study(RandomSearch(SPACE, seed=4), Quick(), store=SharedStore(url, "s"), budget=1, batch=1)


def test_a_locked_database_is_waited_for_and_then_named(tmp_path: Path) -> None:
    import sqlite3

    url = f"sqlite:///{tmp_path}/s.db"
    work_on_study(RandomSearch(SPACE), Quick(), store=SharedStore(url, "s"), budget=1, batch=1, isolate=False)
    blocker = sqlite3.connect(tmp_path / "s.db", isolation_level=None, check_same_thread=False)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(UserError, match=r"store: got sqlite:///.*s.db, which cannot be used \(database is locked\)"):
        work_on_study(RandomSearch(SPACE), Quick(), store=SharedStore(url, "s", patience=0.3), budget=4, batch=1)
    threading.Timer(0.5, lambda: blocker.execute("COMMIT")).start()
    store = SharedStore(url, "s", patience=20.0)
    outcome = work_on_study(RandomSearch(SPACE), Quick(), store=store, budget=4, batch=1, isolate=False)
    assert outcome.told == 4


@pytest.mark.slow
def test_the_server_goes_away_and_comes_back(server: Server, tmp_path: Path) -> None:
    workers = [worker(tmp_path, server.url, "synchronous", sleep=0.05) for _ in range(2)]
    while len(log_lines(tmp_path)) < 6:
        time.sleep(0.01)
    server.stop()
    time.sleep(0.5)
    with pytest.raises(UserError, match=r"which cannot be used .*Tried for 0.3 s. What was recorded is safe"):
        SharedStore(server.url, "scenario", patience=0.3).open({})
    server.start()
    assert [process.wait() for process in workers] == [0, 0]
    plain = run_study(Climber(), Quick(), budget=20, batch=4, cache=True)
    assert values(trials_in(server.url, order="synchronous")) == values(list(plain.history))


def test_a_transaction_that_fails_halfway_leaves_the_worker_as_it_was(tmp_path: Path) -> None:
    """What the strategy was asked in a transaction that is not kept, it is asked again from its state before."""
    import sqlalchemy

    store = SharedStore(f"sqlite:///{tmp_path}/s.db", "s", patience=5.0)
    offer, failures = store._offer, iter([False, True, False, True, True, False])

    def failing(connection: Any, waiting: set[int]) -> None:
        offer(connection, waiting)
        if next(failures, False):
            raise sqlalchemy.exc.OperationalError("COMMIT", None, Exception("the connection broke"))

    store._offer = failing  # type: ignore[method-assign]
    work_on_study(Climber(), Quick(), store=store, budget=12, batch=2, order="synchronous", isolate=False)
    plain = run_study(Climber(), Quick(), budget=12, batch=2)
    assert next(failures, None) is None
    assert values(trials_in(f"sqlite:///{tmp_path}/s.db", "s", batch=2, order="synchronous")) == values(plain.history)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("nonsense", "url: got 'nonsense'; allowed: postgresql"),
        ("oracle://u:secret@h/d", r"url: got oracle://u:\*\*\*@h/d; allowed: a PostgreSQL or SQLite database"),
    ],
)
def test_other_urls_are_refused(url: str, text: str) -> None:
    with pytest.raises(UserError, match=text):
        SharedStore(url, "s")


def test_the_budget_is_the_whole_study_s(tmp_path: Path) -> None:
    store = SharedStore(f"sqlite:///{tmp_path}/s.db", "s")
    budget = StudyBudget(simulated_seconds=45.0)
    outcome = work_on_study(RandomSearch(SPACE), Quick(), store=store, budget=budget, batch=1, isolate=False)
    assert (outcome.told, outcome.simulated_seconds) == (5, 50.0)
